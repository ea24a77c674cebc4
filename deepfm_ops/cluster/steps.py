"""What a worker computes in a step, and what servers do for it: the graphs of a `ShardedDeepFM`."""

import contextlib

import keras
import numpy as np
import tensorflow as tf

from deepfm_ops import _library, heads
from deepfm_ops.cluster import feeding
from deepfm_ops.cluster.initializers import rows_of
from deepfm_ops.cluster.tables import CHUNK, Table, is_wide, on_each, split
from deepfm_ops.features import counts
from deepfm_ops.layers import first_pass_of, samples_at_start
from deepfm_ops.models import resizing
from deepfm_ops.optimizers import _Sparse
from deepfm_ops.placement import beside

ROWS, AVERAGES, SUMS = "rows", "averages", "sums"  # what a step needs of its batch
OF_TABLES = ("embeddings", "w", "feature_counts", "samples")  # weights of the layer that owns tables
MOST_SUMS = 8  # servers, from which each sample's sums are more than the rows of its batch
# Of averages' decay: from there on lags are settled. Of steps side by side one would scale lags down, and the others go
# on adding what is of the scale before. It is looked at every so many batches.
FAR, LOOK = 2.0**-40, 16
_CLIPS = ("clipnorm", "clipvalue", "global_clipnorm")


class Steps:
    """A model whose tables are in parts on servers.

    Args:
        make: function that makes the `DeepFM` that a worker computes, of tables of one row, in whose place the rows of
            a batch stand. Its dense weights come to lie on the servers.
        servers: devices.
        rows: of the tables.
        counted, num_samples: feature counts, int32 [rows], or None; rows that were counted, or None.
        wire: dtype of rows and gradients on the network.

    Attributes:
        template: that model, and its layer that owns the tables.
        tables: `Table` of each table.
        dense: the other trainable weights.
        state: weights that steps set, of batch normalization and dropout.
        counts: tf.Variable int32 of each server, or [].
        samples: tf.Variable int64 [2], (seen in training, counted), or None.

    """

    def __init__(self, make, servers, rows, counted, num_samples, wire):
        self.servers, self.rows, self.wire = servers, rows, wire
        with _spread(servers):
            self.template = make()
        self.source, self.dense, self.state = parts_of(self.template)
        self.counts, self.samples = [], None
        if counted is not None:
            parts = len(servers)
            self.counts = [_variable(server, counted[part::parts]) for part, server in enumerate(servers)]
            self.samples = _variable(servers[0], np.array(samples_at_start(counted, num_samples)))
        self.tables = [
            Table(variable, initializer, servers, rows, self._row_counts)
            for variable, initializer in self.source.tables()
        ]
        self.optimizer, self.parts = None, ()
        self._functions = {}

    @property
    def trainable(self):
        """All weights that are trained, parts of tables first."""
        return [part for table in self.tables for part in table.parts] + self.dense

    def _row_counts(self, part):
        if self.samples is None:
            return None
        return tf.convert_to_tensor(self.counts[part]), *first_pass_of(self.samples)

    def compile(self, optimizer, keep=False):
        """Gives it an optimizer of the same configuration, whose variables lie beside what they are of.

        Args:
            optimizer: Keras's.
            keep: whether weights become the averages that the optimizer before this one kept.

        Raises:
            ValueError: one whose step costs whole tables.

        """
        _refuse(getattr(optimizer, "_parts", (optimizer,))[0])
        if keep:
            self.settle(keep)
        with tf.device(self.servers[0]):
            self.optimizer = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
            self.parts = getattr(self.optimizer, "_parts", (self.optimizer,))
            self.optimizer.build(self.trainable)
        for part in self.parts:
            _update_beside(part)
        self._functions = {}

    def function(self, kind, *options):
        """A concrete function: see `_make_...`. It is traced here, outside of a strategy's scope."""
        key = (kind, *options)
        if key not in self._functions:
            make, specs = getattr(self, f"_make_{kind}")(*options)
            self._functions[key] = tf.function(make, autograph=False, input_signature=specs).get_concrete_function()
        return self._functions[key]

    # Averages.

    def lag_of(self, variable):
        """(lag, the decay that it is scaled by) of a variable whose average is kept, else None."""
        part = self.part_of(variable) if self.optimizer is not None and self.optimizer.use_ema else None
        if part is None:
            return None
        return part._lag_of(variable).value, part._decay_so_far.value

    def part_of(self, variable):
        """The optimizer that a variable is updated by, or None."""
        return next((part for part in self.parts if any(variable is v for v in part._trainable_variables)), None)

    def average(self, variable, value, local=None):
        """The average of a variable that has this value, or of some of its rows; the value, where there is none."""
        if (found := self.lag_of(variable)) is None:
            return value
        lag, decay = found
        lag = tf.convert_to_tensor(lag) if local is None else _gather(lag, local)
        return value + lag * tf.cast(decay, value.dtype)

    def settle(self, keep=False):
        """What showing averages and hiding them again does to lags, to the same bits; keep: they are not hidden."""

        def settle(variable):
            if (found := self.lag_of(variable)) is None:
                return
            with beside(variable):
                for begin in range(0, variable.shape[0], CHUNK) if variable.shape.rank else ():
                    local = tf.range(begin, min(begin + CHUNK, variable.shape[0]))
                    raw = tf.gather(variable.value, local)
                    average = self.average(variable, raw, local)
                    if keep:
                        variable.value.scatter_update(tf.IndexedSlices(average, local))
                    found[0].scatter_update(tf.IndexedSlices(average - raw, local))

        on_each(settle, self.trainable)
        for part in self.parts:
            part._decay_so_far.assign(1.0)

    @property
    def decay(self):
        """Of the averages since they were settled; 1 where there are none."""
        return min(float(part._decay_so_far.value.numpy()) if part.use_ema else 1.0 for part in self.parts)

    def resize(self, rows, size, counted, num_samples):
        """See `DeepFM.resize`.

        Args:
            rows: int64 [n], ascending, those that get fresh values, the added ones among them.
            size: rows of the tables from now on.
            counted: see the class.
            num_samples: likewise.

        """
        parts, grown = len(self.servers), []
        for part, server in enumerate(self.servers):
            mine = rows[rows % parts == part]
            for table in self.tables:
                with tf.device(server):
                    fresh = rows_of(table.initializer, tf.constant(mine), table.columns, table.dtype)
                grown.append((table.parts[part], mine // parts, fresh))
        resizing.grow_tables(self.optimizer, grown)
        self.rows = size
        for table in self.tables:
            table.rows = size
        if self.counts and counted is not None:
            counted = counts.checked(counted, size)
            seen = self.samples.numpy()[0]
            self.counts = [_variable(server, counted[part::parts]) for part, server in enumerate(self.servers)]
            self.samples.assign([seen, num_samples or 0])
        self._functions = {}

    # A step.

    def _pull(self, indices, averaged):
        """(positions [B, P], local rows of each part, rows [U, n] of each table, counts [U] or none) of a batch."""
        positions, local = split(indices, len(self.servers), self.rows)
        pulled, counted = [[] for _ in self.tables], []
        for part, server in enumerate(self.servers):
            with tf.device(server):
                for table, rows in zip(self.tables, pulled, strict=True):
                    some = _gather(table.parts[part].value, local[part])
                    some = self.average(table.parts[part], some, local[part]) if averaged else some
                    rows.append(tf.cast(some, tf.bfloat16) if self.wire == "bfloat16" else some)
                if self.counts:
                    counted.append(_gather(self.counts[part], local[part]))
        rows = [
            tf.ensure_shape(tf.cast(tf.concat(some, 0), table.dtype), (None, *table.columns))
            for table, some in zip(self.tables, pulled, strict=True)
        ]
        return positions, tuple(local), tuple(rows), tuple([tf.concat(counted, 0)] if counted else [])

    def _forward(self, pulled, values, labels, weights, training):
        """(scores, loss or None) of a batch whose rows are there; averaged weights, where it is no training."""
        positions, _, rows, counted = pulled
        scope = keras.StatelessScope(collect_losses=True)
        instead = {id(table.variable): some for table, some in zip(self.tables, rows, strict=True)}
        if counted:
            instead |= {id(self.source.feature_counts): counted[0], id(self.source.samples): self.samples + 0}
        for variable in self.dense:  # in training too: Keras's regularizers ask the scope alone
            with beside(variable):
                value = tf.convert_to_tensor(variable.value)
                instead[id(variable)] = value if training else self.average(variable, value)
        scope.state_mapping.update(instead)  # not by its arguments: rows are not of the table's shape
        loss = None
        with scope:
            scores = self.template((positions, values), training=training)
            if labels is not None:
                loss = self._loss(labels, scores, weights, training)
        if training:
            for variable in self.state:
                if (value := scope.get_current_value(variable)) is not None:
                    variable.value.assign(value)
        return scores, loss

    def _loss(self, labels, scores, weights, training):
        with _untracked(self.template):
            return self.template.compute_loss(None, self.unpacked(labels), scores, weights, training=training)

    @property
    def num_labels(self):
        """Of a sample: one for each head."""
        return len(heads.of(self.template.plan.task))

    def unpacked(self, labels):
        """[B, heads] as Keras takes them: {head: [B, 1]}, or of a model that predicts one thing as they are."""
        task = self.template.plan.task
        return {name: labels[:, i : i + 1] for i, name in enumerate(task)} if isinstance(task, dict) else labels

    def _train(self, pulled, values, labels, weights):
        _, local, rows, _ = pulled
        with tf.GradientTape() as tape:
            tape.watch(rows)
            scores, loss = self._forward(pulled, values, labels, weights, True)
        gradients = tape.gradient(loss, [*rows, *(v.value for v in self.dense)])
        self._count(values)
        self._push(local, gradients[: len(rows)], gradients[len(rows) :])
        return scores, loss

    def _count(self, values):
        if self.samples is not None:
            self.samples.assign_add([tf.shape(values, tf.int64)[0], 0])

    def _push(self, local, of_rows, of_dense):
        # Every row was used, so that every one is named, in their order: the values are all of the gradient.
        of_rows = [g.values if isinstance(g, tf.IndexedSlices) else g for g in of_rows]
        of_rows, of_dense = self._clipped(of_rows, of_dense)
        slices, sizes = [], [tf.size(rows) for rows in local]
        for gradient in of_rows:
            gradient = tf.cast(gradient, tf.bfloat16) if self.wire == "bfloat16" else gradient
            pieces = tf.split(gradient, sizes, num=len(sizes))
            slices += [tf.IndexedSlices(piece, rows) for piece, rows in zip(pieces, local, strict=True)]
        with contextlib.ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(_unclipped(part))
            self.optimizer.apply([*slices, *of_dense], self.trainable)

    # A step of a factorization machine alone: servers add up their own rows, and no row crosses the network.

    @property
    def can_sum(self):
        """Whether sums can stand for rows, and are less: [B, 2K + 1] numbers of each server, instead of the rows."""
        plan, clips = self.template.plan, [getattr(part, name) for part in self.parts for name in _CLIPS]
        is_fm = bool(plan.second_order) and plan.deep is None and set(self.source.field_sizes) == {1}
        is_fm = is_fm and plan.is_plain
        is_fm = is_fm and {self.source.compute_dtype, *(table.dtype for table in self.tables)} == {"float32"}
        return is_fm and plan.width == 1 and len(self.servers) <= MOST_SUMS and not any(clips)

    def _pull_sums(self, indices, values):
        """(row splits, local indices and values of each part's pairs, sums [B, K], second and first order [B, 1])."""
        parts, samples = len(self.servers), tf.shape(indices)[0]
        with tf.control_dependencies([split(indices, parts, self.rows)[0]]):  # which says what is out of range
            flat = tf.reshape(indices, [-1])
        owner = tf.cast(flat % parts, tf.int32)
        local = tf.dynamic_partition(tf.cast(flat // parts, tf.int64 if self.is_wide else tf.int32), owner, parts)
        weighted = tf.dynamic_partition(tf.reshape(values, [-1]), owner, parts)
        bins = tf.repeat(tf.range(samples), self._columns) * parts + owner
        counted = tf.reshape(tf.math.bincount(bins, minlength=samples * parts), [samples, parts])
        splits = tf.unstack(tf.concat([tf.zeros((1, parts), tf.int32), tf.cumsum(counted)], 0), parts, axis=1)
        all_ones = tf.reduce_all(tf.equal(values, 1))
        weighted = [tf.cond(all_ones, lambda: tf.zeros([0]), lambda x=x: x) for x in weighted]
        sums, squares, linear = 0.0, 0.0, 0.0
        for part, server in enumerate(self.servers):
            with tf.device(server):
                op = _library.native_ops("native").deepfm_ops_resource_fm_interaction
                found, mine, _, first, _ = op(
                    **self._of_part(part, local[part], weighted[part], splits[part]),
                    counts=[],
                    priors=[],
                    Tacc=self.source.compute_dtype,
                    return_embeddings=False,
                )
                square = tf.reduce_sum(mine * mine, 1, keepdims=True) - 2 * found  # of the pairs' rows, added up
                answer = tf.concat([mine, square, *([first] if self.source.use_linear else [])], 1)
            width = self.source.embedding_dim
            sums += answer[:, :width]
            squares += answer[:, width : width + 1]
            linear += answer[:, width + 1 :]
        second = 0.5 * (tf.reduce_sum(sums * sums, 1, keepdims=True) - squares)
        return tuple(splits), tuple(local), tuple(weighted), sums, second, linear

    def _of_part(self, part, local, weighted, splits):
        """What the op and its gradient have in common, of the pairs of a part; on its server."""
        handles = [table.parts[part].value.handle for table in self.tables]
        values = tf.concat([weighted, tf.ones([tf.size(local) - tf.size(weighted)])], 0)  # none: they are ones
        return {
            "table": handles[0],
            "weights": handles[1:],
            "indices": local,
            "values": [tf.ensure_shape(values, [None])],
            "row_splits": [tf.cast(splits, tf.int64)],
            "l2": self.source.l2,
            "l2_linear": self.source.l2_linear,
            "output": "scalar",
            "field_splits": [],
            "field_weights": [],
            "T": self.tables[0].dtype,
        }

    def _train_sums(self, pulled, values, labels, weights):
        splits, local, weighted, sums, second, linear = pulled
        orders = [linear, second] if self.source.use_linear else [second]
        with tf.GradientTape() as tape:
            tape.watch(orders)
            scores = self.template.plan.head(orders)
            loss = self._loss(labels, scores, weights, True)
        found = tape.gradient(loss, [*orders, *(v.value for v in self.dense)])
        *of_linear, of_second = found[: len(orders)]
        message = tf.concat([sums, of_second, *of_linear], 1)
        penalty, source = None, self.source
        if self.counts:
            scope = keras.StatelessScope()
            scope.state_mapping[id(source.samples)] = self.samples + 0
            with scope:
                strengths = source.l2, source.l2_linear, source.embedding_prior, source.linear_prior
                penalty, _ = source._penalty(tf.shape(values)[0], False, *strengths)
        self._count(values)
        slices = []
        for part, server in enumerate(self.servers):
            with tf.device(server):
                got = tf.identity(message)
                width = source.embedding_dim
                unique, *rows = _library.native_ops("native").deepfm_ops_resource_fm_interaction_grad(
                    **self._of_part(part, local[part], weighted[part], splits[part]),
                    counts=[] if penalty is None else [tf.convert_to_tensor(self.counts[part])],
                    priors=[] if penalty is None else [penalty.priors],
                    sums=got[:, :width],
                    embeddings=[],
                    d_interaction=got[:, width : width + 1],
                    d_embeddings=[],
                    d_linear=[got[:, width + 1 :]] if source.use_linear else [],
                    d_penalty=tf.ones([]),
                    need_values=False,
                )
                slices.append([tf.IndexedSlices(rows[place], unique) for place in (0, 2)[: len(self.tables)]])
        ordered = [some for table in zip(*slices, strict=True) for some in table]
        self.optimizer.apply([*ordered, *found[len(orders) :]], self.trainable)
        return scores, loss

    def _clipped(self, of_rows, of_dense):
        """Clipped by the norms of whole tables, whatever the number of parts."""
        gradients = [*of_rows, *of_dense]
        owners = [self.part_of(v) for v in (*(table.parts[0] for table in self.tables), *self.dense)]
        for part in self.parts:
            mine = [i for i, owner in enumerate(owners) if owner is part]
            for i, gradient in zip(mine, part._clip_gradients([gradients[i] for i in mine]), strict=True):
                gradients[i] = gradient
        return gradients[: len(of_rows)], gradients[len(of_rows) :]

    # The functions that workers run: (function, signature).

    @property
    def _columns(self):
        return self.template.inputs[0].shape[1]

    def _of_batch(self, weighted):
        numbers = lambda *shape: tf.TensorSpec(shape, tf.float32)  # noqa: E731
        indices = tf.TensorSpec((None, self._columns), tf.int64)
        labels = numbers(None, self.num_labels)
        return [indices, numbers(None, self._columns), labels, numbers(None if weighted else 0)]

    def _pulled(self, what, indices, values):
        return self._pull_sums(indices, values) if what == SUMS else self._pull(indices, what == AVERAGES)

    def _make_pull(self, weighted, what):
        """The arrays of a batch to what a step needs: ROWS, AVERAGES or SUMS."""

        def pull(indices, values, labels, weights):
            return self._pulled(what, indices, values), values, labels, weights

        return pull, self._of_batch(weighted)

    def _make_read(self, what):
        """A stream's job and state to (the state after the batch there: `feeding.next_batch`; what a step needs)."""

        def read(job, state):
            after, indices, values, labels = feeding.next_batch(job, state)
            indices, values = tf.reshape(indices, [-1, self._columns]), tf.reshape(values, [-1, self._columns])
            labels = tf.reshape(labels, [-1, self.num_labels])
            return after, (self._pulled(what, indices, values), values, labels, tf.zeros([0]))

        return read, [tf.TensorSpec((), tf.string)] * 2

    def _make_run(self, kind, weighted, what, alone):
        """What a step needs to its results, float32: the loss, scores, and of training and tests labels and weights."""

        def run(pulled, values, labels, weights):
            given = weights if weighted else None
            if kind == "train":
                with contextlib.ExitStack() as stack:
                    for part in self.parts if not alone else ():
                        stack.enter_context(_unscaled(part))
                    train = self._train_sums if what == SUMS else self._train
                    scores, loss = train(pulled, values, labels, given)
            else:
                scores, loss = self._forward(pulled, values, labels if kind == "test" else None, given, False)
            scores = tf.concat(keras.tree.flatten(scores), 1)
            found = [scores] if kind == "predict" else [loss, scores, labels, weights]
            return tf.concat([tf.reshape(tf.cast(x, tf.float32), [-1]) for x in found], 0)

        vectors = lambda dtype: tuple(tf.TensorSpec((None,), dtype) for _ in self.servers)  # noqa: E731
        local = vectors(tf.int64 if self.is_wide else tf.int32)
        if what == SUMS:
            widths = self.source.embedding_dim, 1, int(self.source.use_linear)
            answers = [tf.TensorSpec((None, width), tf.float32) for width in widths]
            pulled = (vectors(tf.int32), local, vectors(tf.float32), *answers)
        else:
            pulled = (
                tf.TensorSpec((None, self._columns), tf.int64),
                local,
                tuple(tf.TensorSpec((None, *table.columns), table.dtype) for table in self.tables),
                tuple(tf.TensorSpec((None,), tf.int32) for _ in self.counts[:1]),
            )
        return run, [pulled, *self._of_batch(weighted)[1:]]

    @property
    def is_wide(self):
        """Whether the rows of a part are numbered by int64."""
        return is_wide(len(self.servers), self.rows)

    def _make_both(self, get, run):
        """What `run` takes, and then what `get` takes, of the next batch, to (results, what that needs)."""
        (get, asked), (run, needed) = (getattr(self, f"_make_{kind}")(*options) for kind, *options in (get, run))

        def both(*arguments):
            following = get(*arguments[len(needed) :])  # first, as updates wait for those who read before them
            return run(*arguments[: len(needed)]), following

        return both, [*needed, *asked]


def parts_of(model):
    """(the layer that owns the tables, the other trainable weights, what else steps set) of a DeepFM."""
    source = (model.plan.lookups or model.plan.first_orders)[0].source
    apart = [*(variable for variable, _ in source.tables()), source.feature_counts, source.samples]
    is_other = lambda v: not any(v is known for known in apart)  # noqa: E731
    state = [v for v in model.non_trainable_variables if v.trainable is False]
    return source, list(filter(is_other, model.trainable_variables)), list(filter(is_other, state))


def _variable(server, value):
    with tf.device(server):
        return tf.Variable(value, trainable=False)


def _gather(variable, rows):
    """Rows of a variable, which is not read as a whole."""
    return tf.raw_ops.ResourceGather(resource=variable.handle, indices=rows, dtype=variable.dtype)


@contextlib.contextmanager
def _spread(servers):
    """Inside, each dense weight is made on the server that has the least as yet."""
    sizes = [0] * len(servers)

    def make(next_creator, **kwargs):
        if kwargs.get("name") in OF_TABLES:  # of one row, and only there to be replaced
            return next_creator(**kwargs)
        least = int(np.argmin(sizes))
        with tf.device(servers[least]):
            variable = next_creator(**kwargs)
        sizes[least] += int(np.prod(variable.shape))
        return variable

    with tf.variable_creator_scope(make):
        yield


def _refuse(optimizer):
    """Raises ValueError for an optimizer that cannot update parts of tables by their rows."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, _Sparse):
        raise ValueError(
            f"tables on servers need an optimizer of deepfm_ops.optimizers, got {name} of Keras: use LazyAdam, or "
            "CombinedOptimizer(LazyAdam(...), ...) to keep it for dense weights"
        )
    if optimizer._moves_absent_rows or optimizer.gradient_accumulation_steps or optimizer.loss_scale_factor:
        raise ValueError(
            f"{name} with momentum, gradient_accumulation_steps or loss_scale_factor would send whole tables at every "
            "step: leave them out"
        )
    if optimizer.ema_overwrite_frequency:
        raise ValueError("ema_overwrite_frequency must be left out: averages are shown where they are read")


def _update_beside(optimizer):
    """Has an optimizer update each variable where it lies, and count steps there."""
    update = optimizer.update_step

    def update_step(gradient, variable, learning_rate):
        with beside(variable):
            return update(gradient, variable, learning_rate)

    optimizer.update_step = update_step
    # Keras's reads it, adds and sets it: of two workers at once one would be lost.
    optimizer._iterations.assign_add = optimizer._iterations.value.assign_add


@contextlib.contextmanager
def _untracked(model):
    """Inside, the losses of heads are not added up in Keras's metrics, which are the chief's."""
    losses = model._compile_loss
    kept = losses._metrics
    losses._metrics = [None] * max(1, len(kept))
    try:
        yield
    finally:
        losses._metrics = kept


@contextlib.contextmanager
def _unscaled(optimizer):
    """Inside, the optimizer leaves it to the chief to scale lags down, see `FAR`."""
    if not optimizer.use_ema:
        yield
        return
    optimizer._rescale = optimizer._keep
    try:
        yield
    finally:
        del optimizer._rescale


@contextlib.contextmanager
def _unclipped(optimizer):
    """Inside, the optimizer takes gradients as they are: they were clipped."""
    kept = {name: getattr(optimizer, name) for name in _CLIPS}
    for name in _CLIPS:
        setattr(optimizer, name, None)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(optimizer, name, value)
