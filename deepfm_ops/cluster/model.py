"""DeepFM whose tables are spread over parameter servers."""

import contextlib
import copy
import inspect

import keras
import numpy as np
import tensorflow as tf

from deepfm_ops import heads, saved_model
from deepfm_ops.cluster import exports, feeding
from deepfm_ops.cluster.config import ClusterError
from deepfm_ops.cluster.coordinator import connect
from deepfm_ops.cluster.initializers import RowNormal, rows_of
from deepfm_ops.cluster.passes import Pass
from deepfm_ops.cluster.steps import AVERAGES, FAR, LOOK, ROWS, SUMS, Steps, parts_of
from deepfm_ops.cluster.tables import Sharded, chunks, on_each
from deepfm_ops.data.stream import Stream
from deepfm_ops.features import counts
from deepfm_ops.layers import positive
from deepfm_ops.models import epochs as epochs_
from deepfm_ops.models import labels as labels_
from deepfm_ops.models import recipe, resizing
from deepfm_ops.models.base import check_integers, fitting, refuse_beside_stream, refuse_without_labels
from deepfm_ops.models.matrix import DeepFM, arguments_of
from deepfm_ops.models.parts import seed_for
from deepfm_ops.placement import beside

WIRES = ("float32", "bfloat16")
EVALUATED_ROWS = 4096  # of a batch that is not trained on
_SIGNATURE = inspect.signature(DeepFM.__init__)


class ShardedDeepFM:
    """DeepFM over parameter servers: each has a part of every table and of what the optimizer keeps of it.

    A step runs on a worker. The unique rows of its batch come from the servers, their gradients go back, and each
    server updates its own; dense weights lie on the servers too. Workers train side by side, on weights that the others
    change meanwhile. With one step in flight the result is `DeepFM`'s, whatever the number of servers.

    Args:
        *args: those of `DeepFM`.
        wire: what rows and their gradients are on the network: "float32", or "bfloat16", which takes half.
        prefetch: whether a worker fetches the rows of its next batch while it computes. They are as many steps older
            then as there are workers, which costs more of what is learned than it gains where the network is fast.
        wait: seconds to wait for servers and workers to be there; None: as `serve_or_continue` was told.
        **kwargs: those of `DeepFM`. num_features may be more than one machine holds; embeddings_initializer must make
            each row for itself (None: `RowNormal(0.01, seed)`), and l2_scope be "batch".

    Raises:
        ValueError: arguments that do not fit.
        ClusterError: servers or workers are not there, or not alike.

    Example:
        >>> from deepfm_ops import cluster, optimizers
        >>> model = cluster.ShardedDeepFM(num_features=1000, num_fields=3, embedding_dim=8, hidden_units=(32,), seed=1)
        >>> model.compile(optimizers.LazyAdam(1e-3), metrics=["AUC"])

    """

    train_function = None  # of which Keras's TensorBoard would draw the graph

    def __init__(self, *args, wire="float32", prefetch=False, wait=None, **kwargs):
        bound = _SIGNATURE.bind(None, *args, **kwargs)
        bound.apply_defaults()
        arguments = {name: value for name, value in bound.arguments.items() if name != "self"}
        if wire not in WIRES:
            raise ValueError(f"wire must be one of {', '.join(WIRES)}, got {wire!r}")
        if arguments["l2_scope"] != "batch":
            raise ValueError("l2_scope must be 'batch': 'table' would send whole tables at every step")
        if arguments["backend"] == "reference":
            raise ValueError("backend must be 'auto' or 'native': parameter servers run the native ops")
        initializer = arguments["embeddings_initializer"]
        initializer = RowNormal(0.01, seed_for(arguments["seed"], 0)) if initializer is None else initializer
        initializer = arguments["embeddings_initializer"] = keras.initializers.get(initializer)
        rows_of(initializer, tf.zeros([0], tf.int64), (1,), "float32")
        self.num_features = positive("num_features", arguments["num_features"])
        counted = arguments["feature_counts"]
        counted = None if counted is None else counts.checked(counted, self.num_features)
        self.features = copy.copy(arguments.pop("features"))  # another fit makes the caller's another dictionary
        self.wire, self.prefetch = wire, prefetch
        self._arguments = arguments
        one_row = {**arguments, "num_features": 1, "feature_counts": None if counted is None else [1]}
        self.cluster = connect(wait)
        self._steps = Steps(
            lambda: DeepFM(**one_row),
            self.cluster.servers,
            self.num_features,
            counted,
            arguments["num_samples"],
            wire,
        )
        self.stop_training, self.history, self.step = False, None, 0
        self._feeding = None
        self._passing = None
        self._order = None
        self._averages_are_shown = False

    @classmethod
    def from_features(cls, features, **arguments):
        """As `DeepFM.from_features`."""
        return cls(**arguments_of(features, arguments))

    @property
    def template(self):
        """The model that a worker computes; its tables have one row, in whose place those of a batch stand."""
        return self._steps.template

    @property
    def optimizer(self):
        """The optimizer, whose variables lie on the servers."""
        return self._steps.optimizer

    @property
    def metrics(self):
        return self.template.metrics

    @property
    def layers(self):
        """Those of the template."""
        return self.template.layers

    def compile(self, optimizer=None, loss=None, metrics=None, weighted_metrics=None, loss_weights=None):
        """As `DeepFM.compile`; the optimizer is made anew on the servers, from its configuration.

        Args:
            optimizer: one of `deepfm_ops.optimizers`, or a `CombinedOptimizer` of one for tables and any of Keras's for
                dense weights. None: the recommended ones, from three workers on at 2 / workers of their rates, as
                steps side by side make weights overshoot.
            loss: None: the recommended one.
            metrics: Keras's; the chief updates them, once for every batch.
            weighted_metrics: likewise.
            loss_weights: as `DeepFM.compile`'s.

        Raises:
            ValueError: an optimizer whose step costs whole tables.

        """
        if optimizer is None:
            optimizer = recipe.optimizer(self._steps.trainable, min(1.0, 2 / len(self.cluster.workers)))
        else:
            optimizer = keras.optimizers.get(optimizer)
        self._steps.compile(optimizer, keep=self._averages_are_shown)
        self._averages_are_shown = False
        loss = recipe.losses(self.template.plan.task, loss)
        self._compiled = {"loss": loss, "metrics": metrics, "weighted_metrics": weighted_metrics}
        self._compiled["loss_weights"] = loss_weights
        self.template.compile(self.optimizer, **self._compiled)
        if isinstance(self.template.plan.task, dict):  # Keras makes the losses' metrics here, not in a worker's step
            labels = self._steps.unpacked(tf.zeros([1, self._steps.num_labels]))
            scores = {name: tf.ones([1, *x.shape[1:]]) for name, x in self.template.output.items()}
            self.template.compute_loss(None, labels, scores)
            self.template.reset_metrics()

    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        epochs=1,
        verbose="auto",
        callbacks=None,
        validation_split=0.0,
        validation_data=None,
        shuffle=True,
        class_weight=None,
        sample_weight=None,
        initial_epoch=0,
        validation_batch_size=None,
        validation_freq=1,
        in_flight=None,
    ):
        """Trains as `DeepFM.fit` does.

        A worker that is lost is no error: another does what it was at, and it is taken back when it is there again.
        Every batch is trained on at least once, and counted once.

        Args:
            x: (indices, values), arrays on the chief, which travel with each step; a stream
                (`FeatureDictionary.stream`), whose files each worker reads a part of by itself, from where the chief
                has them too; or a function that returns a stream. A stream stays where it is: a
                `cluster.Checkpoint` knows how far its parts were trained on.
            y: labels of arrays.
            batch_size: of arrays.
            epochs: Keras's.
            verbose: Keras's.
            callbacks: Keras's.
            validation_split: of arrays.
            validation_data: (x, y) or (x, y, sample_weight), or a stream.
            shuffle: of arrays.
            class_weight: of arrays.
            sample_weight: of arrays.
            initial_epoch: Keras's.
            validation_batch_size: of arrays; None: batch_size.
            validation_freq: Keras's.
            in_flight: steps at a time. None: as many as there are workers, and as many that wait for one. With 1, or
                one worker, the result follows from the seed. Callbacks see a batch when it is done, while those
                after it are under way.

        Returns:
            keras.callbacks.History.

        Raises:
            ClusterError: a server was lost.
            InvalidArgumentError: an index, a value or a record that is bad; the text names the batch.

        """
        if self.optimizer is None:
            raise ValueError("call compile first")
        if in_flight is not None and in_flight < 1:
            raise ValueError(f"in_flight must be at least 1, got {in_flight}")
        is_one = 1 in (in_flight, len(self.cluster.workers))
        validation = None if validation_data is None else self._data(*_tuple(validation_data))
        data, steps = self._data(x, y, sample_weight), None
        if isinstance(data, Stream):
            others = {"class_weight": class_weight, "batch_size": batch_size}
            refuse_beside_stream(**others, validation_split=validation_split or None)
        else:
            if validation_split and validation is None:
                data, validation = epochs_.split(data, validation_split)
            data = _class_weighted(data, class_weight)
            if batch_size is None:
                batch_size = recipe.batch_size(self.optimizer, len(data[0])) or 32
            steps = -(-len(data[0]) // positive("batch_size", batch_size))
        feed, order = self._feed(data, batch_size, shuffle, 1 if is_one else len(self.cluster.workers))
        weighted = not isinstance(data, Stream) and len(data) > 3
        what = SUMS if not is_one and self._steps.can_sum else ROWS
        # Of several workers each would hold a batch of its own, and which of them is next would be chance.
        prefetch = self.prefetch and (not is_one or len(self.cluster.workers) == 1)
        callbacks = epochs_.callback_list(self, callbacks, 1 if verbose == "auto" else verbose, epochs, steps)
        self.stop_training, self._epoch, self._within = False, initial_epoch, False
        self._feeding, self._order, logs = feed, order, {}
        with self._watched():
            callbacks.on_train_begin()  # where a checkpoint is resumed
            first = self._epoch
            for epoch in range(first, epochs):
                if order is not None:
                    order.epoch = epoch
                if not self._within:
                    feed.begin(epoch - initial_epoch)
                self._epoch, self._within = epoch, True
                if self._averages_are_shown:
                    self._steps.settle()
                    self._averages_are_shown = False
                self.step = self._feeding.num_done
                callbacks.on_epoch_begin(epoch)
                logs = self._pass("train", feed, weighted, what, in_flight, prefetch, is_one, callbacks)
                self._epoch, self._within = epoch + 1, False
                self._averages_are_shown = bool(self.optimizer.use_ema)
                if validation is not None and (epoch + 1 - initial_epoch) % validation_freq == 0:
                    found = self._test(validation, validation_batch_size or batch_size)
                    logs |= {f"val_{name}": value for name, value in found.items()}
                callbacks.on_epoch_end(epoch, logs)
                if self.stop_training:
                    break
            callbacks.on_train_end(logs)
        self._feeding = None
        return self.history

    @contextlib.contextmanager
    def _watched(self):
        """Inside, an error that comes of the loss of a server is a ClusterError that says so."""
        try:
            yield
        except (tf.errors.OpError, ClusterError) as error:
            if not isinstance(error, tf.errors.InvalidArgumentError):
                self.cluster.check(error)
            raise

    def evaluate(self, x=None, y=None, batch_size=None, verbose="auto", sample_weight=None, return_dict=False):
        """Loss and metrics, of averaged weights where there are some; as Keras's."""
        if self.optimizer is None:
            raise ValueError("call compile first")
        del verbose
        with self._watched():
            logs = self._test(self._data(x, y, sample_weight), batch_size)
        return logs if return_dict else list(logs.values()) if len(logs) > 1 else next(iter(logs.values()))

    def predict(self, x, batch_size=None, verbose="auto"):
        """Scores, float32 [n, 1] or what else `DeepFM.predict` gives, of averaged weights where there are some."""
        del verbose
        data = self._data(x, labels=False)
        if not isinstance(data, Stream) and not len(data[0]):
            return self._by_head(np.zeros(0, np.float32))
        feed, _ = self._feed(data, batch_size or EVALUATED_ROWS, whole=True)  # in one part, which has an order
        with self._watched(), contextlib.closing(iter(self._steps_of("predict", feed, False, AVERAGES))) as results:
            found = {batch.number: scores for batch, scores in results}
        _refuse_empty(feed)
        return self._by_head(np.concatenate([found[number] for number in sorted(found)]))

    def _by_head(self, scores):
        """What a step gave of scores as `DeepFM.predict` gives them."""
        plan = self.template.plan
        return heads.joined(plan.task, [x for _, x in heads.split(plan.task, scores.reshape(-1, plan.width))])

    # Data.

    def _data(self, x, y=None, sample_weight=None, labels=True):
        """A stream, or arrays; labels: whether they are needed."""
        x = x() if callable(x) and not isinstance(x, Stream) else x
        if not isinstance(x, Stream):
            return self._arrays(x, y, sample_weight, labels)
        refuse_beside_stream(y=y, sample_weight=sample_weight)
        fitting(self.template, x.features, self.num_features)
        if labels:
            refuse_without_labels(x)
        return x

    def _arrays(self, x, y, sample_weight, labels):
        """[indices int [n, P], values float32 [n, P], labels float32 [n, heads], and weights float32 [n] if any]."""
        x = (x["indices"], x["values"]) if isinstance(x, dict) else x
        if not isinstance(x, list | tuple) or len(x) != 2:
            raise ValueError(f"x must be (indices, values), a stream or a function that returns one, got {type(x)}")
        self.template._as_inputs(tuple(x))
        check_integers("indices", x[0])
        shape = (len(x[0]), self.template.inputs[0].shape[1])
        arrays = [np.asarray(x[0]), np.asarray(x[1], np.float32)]
        for name, array in zip(("indices", "values"), arrays, strict=True):
            if array.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
        if labels and y is None:
            raise ValueError("y must be given beside x: the labels, 1-D")
        if labels:
            arrays.append(self._packed(y, shape[0]))
        else:
            arrays.append(np.zeros((shape[0], self._steps.num_labels), np.float32))
        if sample_weight is not None:
            arrays.append(np.asarray(sample_weight, np.float32).reshape(-1))
        for name, array in zip(("y", "sample_weight"), arrays[2:], strict=False):
            if len(array) != shape[0]:
                raise ValueError(f"{name} must have {shape[0]} samples, as x has, got {len(array)}")
        return arrays

    def _packed(self, y, samples):
        """Labels float32 [n, heads]."""
        found = []
        for head, some in zip(heads.of(self.template.plan.task), self._labels_by_head(y), strict=True):
            some = np.asarray(some, np.float32)
            some = some[:, np.newaxis] if some.ndim == 1 else some
            name = "y" if head.name is None else f"y[{head.name!r}]"
            if some.shape[1:] != (1,):
                raise ValueError(f"{name} must have shape ({samples},), got {some.shape}")
            if len(some) != samples:
                raise ValueError(f"{name} must have {samples} samples, as x has, got {len(some)}")
            found.append(some)
        return np.concatenate(found, axis=1)

    def _labels_by_head(self, y):
        return labels_.by_head(self.template.plan.task, self.template._targets(y))

    def _feed(self, data, batch_size, shuffle=False, parts=1, whole=False):
        """(what gives batches to workers, their order in epochs or None)."""
        if isinstance(data, Stream):
            return feeding.StreamParts(data, parts, self.template.plan.task, whole), None
        length, batch_size = len(data[0]), positive("batch_size", batch_size)
        order = epochs_.EpochOrder(data, batch_size) if shuffle else None
        fill = [] if len(data) > 3 else [np.zeros(0, np.float32)]

        known = {}  # the order of the epoch

        def batch(start):
            if order is None:
                some = [array[start : start + batch_size] for array in data]
            else:
                of = order.seed, order.epoch
                if of not in known:
                    known.clear()
                    known[of] = order.order()
                some = order.take(known[of][start : start + batch_size])
            return [some[0].astype(np.int64, copy=False), *some[1:], *fill]

        return feeding.Arrays(batch, range(0, length, batch_size)), order

    # Passes.

    def _steps_of(self, kind, feed, weighted, what, in_flight=None, prefetch=False, alone=True):
        """The `Pass` of (Batch, results) of each step, see `Steps`."""
        get = ("pull", weighted, what) if feed.job is None else ("read", what)
        run = "run", kind, weighted, what, alone
        functions = [self._steps.function(*name) for name in (get, run, *([("both", get, run)] if prefetch else []))]
        if in_flight is None:  # one at work and one that waits; here, where there is none to wait for, one
            in_flight = 1 if self.cluster.coordinator is None else 2 * len(self.cluster.workers)
        return Pass(self.cluster, feed, in_flight, *functions)

    def _pass(self, kind, feed, weighted, what, in_flight=None, prefetch=False, alone=True, callbacks=None):
        """Logs of a pass."""
        self.template.reset_metrics()
        logs, steps = {}, self._steps_of(kind, feed, weighted, what, in_flight, prefetch, alone)
        if callbacks is not None:
            self._passing = steps
        with contextlib.closing(iter(steps)) as results:
            for _, found in results:
                logs = self._counted(found[0], found[1:], weighted)
                if callbacks is not None:
                    callbacks.on_train_batch_begin(self.step)
                    self.step += 1
                    callbacks.on_train_batch_end(self.step - 1, dict(logs))
                    if self.stop_training:
                        break
                    if not alone and self.step % LOOK == 0 and self._steps.decay < FAR:
                        steps.drain()
                        self._steps.settle()
        _refuse_empty(feed)
        return {name: float(value) for name, value in logs.items()}

    def _counted(self, loss, found, weighted):
        """Logs after one batch more, of what its step gave: scores [B, H], labels [B, heads] and maybe weights [B]."""
        template, width, columns = self.template, self.template.plan.width, self._steps.num_labels
        samples = len(found) // (width + columns + weighted)
        scores, labels, weights = np.split(found, [samples * width, samples * (width + columns)])
        template._loss_tracker.update_state(loss, sample_weight=samples)
        labels = self._steps.unpacked(tf.constant(labels.reshape(samples, columns)))
        scores = keras.tree.map_structure(tf.constant, self._by_head(scores))
        weights = tf.constant(weights) if weighted else None
        if isinstance(labels, dict):
            template.compute_loss(None, labels, scores, weights, training=False)  # which adds up those of each head
        return template.compute_metrics(None, labels, scores, weights)

    def _test(self, data, batch_size):
        feed, _ = self._feed(data, batch_size or EVALUATED_ROWS, parts=len(self.cluster.workers), whole=True)
        return self._pass("test", feed, not isinstance(data, Stream) and len(data) > 3, AVERAGES)

    # What a checkpoint holds.

    def sharded(self):
        """[`Sharded`]: everything that has a value per row."""
        steps, rows = self._steps, self.num_features
        found = [Sharded("feature_counts", steps.counts, rows)] if steps.counts else []
        for table in steps.tables:
            found.append(Sharded(table.name, [part.value for part in table.parts], rows))
            for name, of in _slots(steps.part_of(table.parts[0]) if steps.parts else None).items():
                found.append(Sharded(f"{table.name}/{name}", [of[id(part)].value for part in table.parts], rows))
        return found

    def dense_variables(self):
        """{name: tf.Variable} of everything else."""
        steps = self._steps
        return _named(steps.dense, steps.state, steps.parts, steps.samples)

    def identity(self):
        """What must be the same of a model that goes on from a checkpoint: a dict for JSON."""
        kinds = [type(part).__name__ for part in self._steps.parts]
        averages = bool(self.optimizer is not None and self.optimizer.use_ema)
        return {"num_features": self.num_features, "optimizers": kinds, "averages": averages}

    def progress(self):
        """How far training is: a dict for JSON. Waits for the steps in flight."""
        found = {"epoch": self._epoch, "step": 0, "averages_are_shown": self._averages_are_shown}
        if self._within:
            self._passing.drain()
            found |= {"step": self._feeding.num_done, "within": self._feeding.state()}
        if self._order is not None:
            found["order_seed"] = self._order.seed
        return found

    def restore_progress(self, progress):
        """Goes on there, from `on_train_begin` of a callback.

        Raises:
            ValueError: a position in other data.

        """
        self._epoch, self._averages_are_shown = progress["epoch"], progress["averages_are_shown"]
        if (seed := progress.get("order_seed")) is not None and self._order is not None:
            self._order.seed = seed
        within = progress.get("within")
        if within is not None:
            if within["kind"] != self._feeding.kind:
                raise ValueError(
                    f"the checkpoint was written while {within['kind']} were trained on, now it is another"
                )
            self._feeding.restore(within)
            self._within = not self._feeding.is_finished
            if not self._within:  # all of it was done, and callbacks would be told of no step
                self._epoch, self._averages_are_shown = self._epoch + 1, bool(self.optimizer.use_ema)

    # Copies.

    def get_weights(self):
        """A copy of the weights, averaged ones where averages are kept; it stays on the servers. For `set_weights`."""

        def copy(variable):
            with beside(variable):
                value = tf.convert_to_tensor(variable.value)
                averaged = self._steps.average(variable, value)
                return tf.raw_ops.DeepCopy(x=value) if averaged is value else averaged

        return on_each(copy, self._weights)

    def set_weights(self, weights):
        """Gives weights the values that `get_weights` gave; training, and averages, go on from there."""

        def give(variable, value):
            with beside(variable):
                variable.value.assign(value)
                if (found := self._steps.lag_of(variable)) is not None:
                    found[0].assign(tf.zeros_like(found[0]))

        on_each(give, self._weights, weights)
        self._averages_are_shown = False
        for part in self._steps.parts if self.optimizer.use_ema else ():
            part._decay_so_far.assign(1.0)

    @property
    def _weights(self):
        return [*self._steps.trainable, *self._steps.state]

    def to_single(self):
        """A `DeepFM` of this process with all of it: weights, averages, and the optimizer if there is one.

        It needs the memory; `export_scorer` does not.
        """
        initializer = self._arguments["embeddings_initializer"]
        single = DeepFM(**{**self._arguments, "embeddings_initializer": "zeros"}, features=self.features)
        source, dense, state = parts_of(single)
        single._config["embeddings_initializer"] = keras.initializers.serialize(initializer)
        if hasattr(source, "embeddings_initializer"):
            source.embeddings_initializer = initializer
        parts = ()
        if self.optimizer is not None:
            config = keras.optimizers.serialize(self.optimizer)
            single.compile(keras.optimizers.deserialize(config), **self._compiled)
            single.optimizer.build(single.trainable_variables)
            parts = getattr(single.optimizer, "_parts", (single.optimizer,))
        tables = [variable for variable, _ in source.tables()]
        known = {variable.path: variable.value for variable in tables}
        for part in parts:
            for name, of in _slots(part).items():
                known |= {f"{v.path}/{name}": of[id(v)].value for v in tables if id(v) in of}
        if source.feature_counts is not None:
            known["feature_counts"] = source.feature_counts.value
        for some in self.sharded():
            start = 0
            for rows in chunks(some):
                local = tf.range(start, start + len(rows))
                known[some.name].scatter_update(tf.IndexedSlices(rows, local))
                start += len(rows)
        samples = None if source.samples is None else source.samples.value
        given = self.dense_variables()
        for name, variable in _named(dense, state, parts, samples).items():
            variable.assign(given[name].numpy())
        return single

    def resize(self, features):
        """As `DeepFM.resize`: the model follows its dictionary after `update` and `evict`."""
        if self.features is None:
            raise ValueError(
                "this model does not know its features: set model.features to them as they were, then resize"
            )
        rows = resizing.fresh_rows(self.features, features)
        self._steps.resize(rows, features.num_features, features.counts, features.num_samples)
        self.num_features = self._arguments["num_features"] = features.num_features
        if self._arguments["feature_counts"] is not None:
            self._arguments |= {"feature_counts": features.counts, "num_samples": features.num_samples}
        self.features = copy.copy(features)
        return self

    def save(self, path, **options):
        """Saves `to_single()`, which needs its memory."""
        self.to_single().save(path, **options)

    def save_weights(self, path, **options):
        """Saves the weights of `to_single()`, which needs its memory."""
        self.to_single().save_weights(path, **options)

    def export(self, path, **options):
        """`deepfm_ops.export` of `to_single()`, which needs its memory."""
        saved_model.export(self.to_single(), path, **options)

    def export_scorer(self, path, table="float32", *, features=None, shards=False):
        """Writes the file of `deepfm_ops.scorer.Scorer`, of a table that no process holds.

        Args:
            path: of the file.
            table: as for `deepfm_ops.export_scorer`.
            features: likewise; None: the model's own.
            shards: whether each server writes its rows by itself, to a file beside `path`, in a folder that all share.
                Else the rows pass through the chief, some at a time.

        Raises:
            ValueError: as `deepfm_ops.export_scorer`.
            ClusterError: a server was lost, or does not share the folder.

        """
        with self._watched():
            exports.export(self._steps, path, table, self.features if features is None else features, shards)


def _slots(part):
    """{name of a slot: {id of a variable: its slot}} of an optimizer."""
    if part is None:
        return {}
    variables = part._trainable_variables
    lists = {
        name: slots for name, slots in vars(part).items() if isinstance(slots, list) and name != "_trainable_variables"
    }
    return {
        name.strip("_"): {id(v): slot for v, slot in zip(variables, slots, strict=True)}
        for name, slots in lists.items()
        if len(slots) == len(variables) and all(isinstance(slot, keras.Variable) for slot in slots)
    }


def _named(dense, state, parts, samples):
    """{name: tf.Variable} of dense weights and of what optimizers keep that is not per row."""
    found = {v.path: v.value for v in dense}
    found |= {f"state_{number}/{v.name}": v.value for number, v in enumerate(state)}  # paths count in the process
    found |= {} if samples is None else {"samples": samples}
    for number, part in enumerate(parts):
        slots = _slots(part)
        for name, of in slots.items():
            found |= {f"{v.path}/{name}": of[id(v)].value for v in dense if id(v) in of}
        known = {id(slot) for of in slots.values() for slot in of.values()}
        known |= {id(getattr(part, name, None)) for name in ("_shown", "_shown_as")}  # averages never are, here
        found |= {f"optimizer_{number}/{v.name}": v.value for v in part.variables if id(v) not in known}
    return found


def _class_weighted(arrays, class_weight):
    """Arrays whose samples have the weights of their classes, {label: weight} or None."""
    if class_weight is None:
        return arrays
    if arrays[2].shape[1] > 1:
        raise ValueError("class_weight is for one head: give sample_weight")
    if len(arrays) > 3:
        raise ValueError("class_weight and sample_weight exclude each other: give one of them")
    weights = [class_weight.get(int(label), 1.0) for label in arrays[2][:, 0]]
    return [*arrays, np.array(weights, np.float32)]


def _refuse_empty(feed):
    if not feed.num_done:
        raise ValueError("x holds no sample, or no record for a batch: give it some")


def _tuple(data):
    return data if isinstance(data, list | tuple) else (data,)
