"""DeepFM over feature columns: `DeepFM.from_columns`."""

import itertools
import types
from collections.abc import Mapping

import keras
import numpy as np
import tensorflow as tf

from deepfm_ops import heads
from deepfm_ops.features import cells, counts
from deepfm_ops.features import columns_tensorflow as encoding
from deepfm_ops.features.columns import (
    DEFAULT_GROUP_NAME,
    DenseFeat,
    TablePlan,
    VarLenSparseFeat,
    as_columns,
    get_feature_names,
    input_specs,
    sequence_names,
)
from deepfm_ops.features.columns_numpy import integer, raw_inputs
from deepfm_ops.features.tables import is_table, require_columns
from deepfm_ops.layers import FirstOrder, FMInteraction, check_interaction, positive
from deepfm_ops.models import recipe
from deepfm_ops.models.base import ConfiguredModel, DtypePolicy, check_integers, clonable
from deepfm_ops.models.parts import BiInteraction, Fields, Head, Sum, mlp, second_order, seed_for, with_changes
from deepfm_ops.models.penalties import Penalties, l2_regularizer
from deepfm_ops.plan import Lookup, Plan

COUNTED_ROWS = 1 << 16  # at a time


@keras.saving.register_keras_serializable("deepfm_ops")
@clonable
class ColumnDeepFM(ConfiguredModel):
    """`DeepFM.from_columns`: DeepFM over a dict of named inputs; DeepCTR's arguments, names and defaults.

    The columns of one width share one table, so that one op call looks all of them up.

    Args:
        linear_feature_columns: columns of the first order.
        dnn_feature_columns: columns of the second order and the deep part.
        fm_group: names of the groups whose columns interact, each group within itself.
        dnn_hidden_units: widths of the MLP's layers.
        l2_reg_linear: L2 strength on the first order.
        l2_reg_embedding: L2 strength on the embeddings.
        l2_reg_dnn: L2 strength on the MLP's kernels.
        seed: int for repeatable initial weights and dropout, or None.
        dnn_dropout: rate after each hidden layer.
        dnn_activation: of the hidden layers.
        dnn_use_bn: normalize before each activation.
        task: "binary", "regression", ("multiclass", classes), or a dict of names to these; see `DeepFM`.
        use_linear, use_fm, use_deep: which parts there are.
        order: 2, or 3 for triples of the columns of a group too; see `FMInteraction`.
        field_weights: whether every pair of columns of a group has a trained weight; see there.
        l2_scope: what l2_reg_linear and l2_reg_embedding act on: "batch", or "table" for whole tables as in DeepCTR;
            see `DeepFM`.
        count_features: have the first `fit`, on arrays, count them before it trains, which turns on the priors of
            `FMInteraction`.
        embedding_prior, linear_prior: their deviations; None: none on that part.
        backend: "auto", "native" or "reference".

    Call arguments:
        inputs: a dict of [B, 1] or [B], [B, maxlen] and [B, dimension], or a list in the order of
            `get_feature_names`; keys that the model does not need are ignored.

    Returns:
        [B, 1] float32, of "multiclass" [B, classes]; of a dict of tasks a dict of them.

    Raises:
        ValueError, TypeError: columns or arguments that do not fit.
        KeyError: when called, a missing input.

    """

    def __init__(
        self,
        linear_feature_columns,
        dnn_feature_columns,
        fm_group=(DEFAULT_GROUP_NAME,),
        dnn_hidden_units=(256, 128, 64),
        l2_reg_linear=0.00001,
        l2_reg_embedding=0.00001,
        l2_reg_dnn=0,
        seed=1024,
        dnn_dropout=0,
        dnn_activation="relu",
        dnn_use_bn=False,
        task="binary",
        *,
        use_linear=True,
        use_fm=True,
        use_deep=True,
        order=2,
        field_weights=False,
        l2_scope="batch",
        count_features=False,
        embedding_prior=recipe.EMBEDDING_PRIOR,
        linear_prior=recipe.LINEAR_PRIOR,
        backend="auto",
        name=None,
        trainable=True,
        frozen=(),
        adapted=None,
        dtype=None,
    ):
        linear = [encoding.column_from_config(column) for column in as_columns(linear_feature_columns)]
        dnn = [encoding.column_from_config(column) for column in as_columns(dnn_feature_columns)]
        linear, dnn = linear if use_linear else [], dnn if use_fm or use_deep else []
        specs = input_specs([*linear, *dnn])
        # Indices come in as int64 whatever the column says: a cast to fewer bits would wrap them round.
        kinds = {name: kind if kind == "string" or "float" in kind else "int64" for name, (_, kind) in specs.items()}
        fm_group = [fm_group] if isinstance(fm_group, str) else list(fm_group)
        for columns in (linear, dnn):
            encoding.check_shared(columns)
        check_interaction(order, field_weights, use_fm)
        if not specs:
            raise ValueError("the model needs at least one feature column in a part that is in use")
        task = heads.plain(task)
        config = {
            "linear_feature_columns": [encoding.column_to_config(column) for column in linear],
            "dnn_feature_columns": [encoding.column_to_config(column) for column in dnn],
            "fm_group": fm_group,
            "dnn_hidden_units": [positive("a hidden width", units) for units in dnn_hidden_units],
            "l2_reg_linear": l2_reg_linear,
            "l2_reg_embedding": l2_reg_embedding,
            "l2_reg_dnn": l2_reg_dnn,
            "seed": seed,
            "dnn_dropout": dnn_dropout,
            "dnn_activation": dnn_activation
            if isinstance(dnn_activation, str)
            else keras.activations.serialize(dnn_activation),
            "dnn_use_bn": dnn_use_bn,
            "task": task,
            "use_linear": use_linear,
            "use_fm": use_fm,
            "use_deep": use_deep,
            "order": order,
            "field_weights": field_weights,
            "l2_scope": l2_scope,
            "count_features": count_features,
            "embedding_prior": embedding_prior,
            "linear_prior": linear_prior,
            "backend": backend,
        }
        with DtypePolicy(dtype):
            inputs = {key: keras.Input(shape, dtype=kinds[key], name=key) for key, (shape, _) in specs.items()}
            encode = _Encoders(inputs)
            plan = Plan(task, inputs={key: (shape, kinds[key]) for key, (shape, _) in specs.items()}, order=order)
            plan.columns = list({id(column): column for column in (*linear, *dnn)}.values())
            strengths = (l2_scope, l2_reg_embedding, l2_reg_linear, embedding_prior, linear_prior)
            penalties = Penalties(*strengths, counted_later=count_features).checked()
            fused = _fused(linear, dnn)
            parts = _linear_parts(inputs, linear, fused, penalties, seed, backend, encode, plan, adapted or {})
            groups = _groups(dnn, fm_group) if use_fm else []
            kind = {"order": order, "field_weights": field_weights}
            embeddings, first_orders = _embeddings(dnn, groups, kind, fused, penalties, seed, backend, encode, plan)
            parts += first_orders + _second_order(embeddings, groups, kind, plan, seed)
            dense = [column for column in dnn if isinstance(column, DenseFeat)]
            if use_deep and dnn:
                deep = [keras.layers.Flatten()(tensor) for tensor, _, _ in embeddings]
                if dense:
                    plan.deep_dense = dense
                    deep.append(encoding.DenseColumns(dense, name="deep_dense")(_needed(inputs, dense)))
                x = keras.layers.Concatenate(name="deep_input")(deep) if len(deep) > 1 else deep[0]
                units = config["dnn_hidden_units"]
                parts.append(
                    mlp(x, plan, units, dnn_activation, dnn_dropout, dnn_use_bn, l2_reg_dnn, seed, adapted or {})
                )
            if not parts:
                raise ValueError(
                    "no part of the model is left: no linear columns, no interacting columns, no deep part"
                )
            plan.encoders = encode.columns
            plan.head = Head(task, name="head")
            plan = plan.used()
            inputs = {name: inputs[name] for name in plan.inputs or ()}
            self._finish(config, inputs, plan.head(parts), name, trainable, frozen, plan)

    def _before_training(self, x):
        """Counts the features of the arrays, if that was asked for and has not been done."""
        lookups = [*self.plan.first_orders, *self.plan.lookups] if self._config["count_features"] else []
        lookups = [part for part in lookups if not part.source.is_counted()]
        if not lookups:
            return
        if x is None:
            raise ValueError("count_features needs fit on arrays first: what is iterated over cannot be counted before")
        num_samples = len(next(iter(x.values())))
        for number in {part.encoder for part in lookups}:
            encoder = encoding.ColumnEncoder(self.plan.encoders[number])
            total = np.zeros(encoder.plan.num_rows, np.int64)
            for start in range(0, num_samples, COUNTED_ROWS):
                part = {name: tf.constant(x[name][start : start + COUNTED_ROWS]) for name in x}
                indices, values, _ = encoder(_needed(part, encoder.columns))
                total += counts.occurrences(indices.numpy(), values.numpy(), len(total))
            for part in lookups:
                if part.encoder == number:
                    part.source.set_feature_counts(total, num_samples)

    def _checked(self, inputs):
        inputs = self._as_inputs(inputs)
        for name in self._index_inputs:
            check_integers(f"input {name!r}", inputs[name])
        # Keras takes arrays or tensors, and text is a tensor already.
        return {name: tf.constant(x) if isinstance(x, np.ndarray) else x for name, x in inputs.items()}

    def _as_inputs(self, x):
        """The inputs that the model needs, in its form, from whatever holds them; what Keras iterates over, mapped."""
        if isinstance(x, list | tuple) and any(isinstance(part, Mapping) for part in x):
            raise TypeError("inputs must be a table or a dict of columns; of records, pass pandas.DataFrame(records)")
        if isinstance(x, list | tuple):
            names = get_feature_names(self.plan.columns)
            if len(x) != len(names):
                raise ValueError(f"inputs must be a dict, or a list in this order: {names}")
            return self._columns(dict(zip(names, x, strict=True)))
        if isinstance(x, tf.data.Dataset):
            return x.map(lambda *element: self._element(element))
        if isinstance(x, keras.utils.PyDataset):
            return _Mapped(x, self._element)
        if isinstance(x, types.GeneratorType):
            return (self._element(element) for element in x)
        if is_table(x):
            return self._columns(x)
        if isinstance(x, np.ndarray) or _is_tensor(x):
            raise TypeError(
                f"inputs must be a table or a dict of {get_feature_names(self.plan.columns)}, got {type(x).__name__}"
            )
        return x

    def _element(self, element):
        """A batch of something iterable, (inputs, labels, weights) or inputs, with its inputs in the model's form."""
        if isinstance(element, tuple) and len(element) == 1 and isinstance(element[0], tuple):
            element = element[0]
        x, *rest = element if isinstance(element, tuple) else (element,)
        return (self._as_inputs(x), *rest)

    def _columns(self, source):
        """{name: tensor, or array that Keras can slice} in the form that the model takes."""
        specs = self.plan.inputs
        require_columns(source, specs, what="input")
        tensors = {name: source[name] for name in specs if _is_tensor(source[name])}
        others = {name: spec for name, spec in specs.items() if name not in tensors}
        sequences = sequence_names(self.plan.columns)
        transformed = {c.name for c in self.plan.columns if isinstance(c, DenseFeat) and c.transform_fn is not None}
        arrays = raw_inputs(source, others, sequences, transformed) if others else {}
        for name, array in arrays.items():
            if specs[name][1] == "string":  # Keras slices no NumPy array of text
                arrays[name] = tf.constant(array, tf.string, shape=array.shape)
        for name, tensor in tensors.items():
            if not isinstance(tensor, keras.KerasTensor):
                arrays[name] = encoding.as_input(name, tensor, *specs[name], name in sequences)
            else:
                arrays[name] = tensor
        lengths = {name: array.shape[0] for name, array in arrays.items()}
        if len(set(lengths.values()) - {None}) > 1:
            raise ValueError(f"inputs must be equally long, got {lengths}")
        return {name: arrays[name] for name in specs}

    def _rows(self, parts, column, value):
        for part in parts:
            members = self.plan.encoders[part.encoder]
            for member in members:
                if member.name == column:
                    start = TablePlan(members).offsets[column]
                    return part.source, _rows_of(member, start, value)
        return None

    def _named_rows(self, column):
        plans = [TablePlan(self.plan.encoders[part.encoder]) for part in self.plan.lookups]
        plan, member = next((p, member) for p in plans for member in p.columns if member.name == column)
        if isinstance(member, DenseFeat) or (member.use_hash and member.vocabulary is None):
            raise ValueError(f"the values of column {column!r} have no names: it is numeric, or hashed")
        start = plan.offsets[column]
        names = range(member.vocabulary_size)
        if member.vocabulary is not None:
            names = {index: key for key, index in member.vocabulary.items()}
        # Without lengths, index 0 of a sequence is padding.
        is_padded = isinstance(member, VarLenSparseFeat) and member.length_name is None
        rows = np.array([index for index in sorted(names) if index or not is_padded], np.int64)
        return start + rows, lambda row: names[row - start]

    def _dense_weights(self, column):
        first = 0
        for dense in self.plan.linear_dense:
            if dense.name == column:
                return keras.ops.convert_to_numpy(self.plan.linear_kernel.kernel)[first : first + dense.dimension]
            first += dense.dimension
        return None

    def _column_names(self):
        return [column.name for column in self.plan.columns]


def _rows_of(column, start, value):
    """The rows of a column's values, or the row of one, in a table where they start at `start`."""
    if isinstance(column, DenseFeat):
        return np.arange(start, start + column.dimension)
    if value is None:
        return np.arange(start, start + column.vocabulary_size)
    if column.vocabulary is None and not column.use_hash:
        index = integer(value)
        if index is None or not 0 <= index < column.vocabulary_size:
            raise KeyError(f"column {column.name!r} has no value {value!r}; it has 0 to {column.vocabulary_size - 1}")
        return start + index
    text, encoder = cells.category(value, column.name), encoding.ColumnEncoder([column])
    index = encoder.index(column, tf.constant([[text]]), isinstance(column, VarLenSparseFeat))
    return start + int(index[0, 0])


def _is_tensor(x):
    return tf.is_tensor(x) or isinstance(x, keras.KerasTensor)


class _Mapped(keras.utils.PyDataset):
    """A PyDataset whose elements are changed."""

    def __init__(self, dataset, change):
        super().__init__(dataset.workers, dataset.use_multiprocessing, dataset.max_queue_size)
        self._dataset, self._change = dataset, change

    @property
    def num_batches(self):
        return self._dataset.num_batches

    def __getitem__(self, index):
        return self._change(self._dataset[index])

    def on_epoch_begin(self):
        self._dataset.on_epoch_begin()

    def on_epoch_end(self):
        self._dataset.on_epoch_end()


def _needed(inputs, columns):
    return {name: inputs[name] for name in input_specs(columns)}


def _tables(columns, width):
    """The columns with an embedding, in lists that can share one table: same width, same trainable."""
    key = lambda column: (width(column), getattr(column, "trainable", True))  # noqa: E731
    with_rows = [c for c in columns if not isinstance(c, DenseFeat) or c.embedding_dim is not None]
    return [(k, list(group)) for k, group in itertools.groupby(sorted(with_rows, key=key), key)]


class _Encoders:
    """The encoders of a model and the pairs they give: one for all parts that have the same columns."""

    def __init__(self, inputs):
        self.inputs, self.made, self.columns = inputs, [], []

    def __call__(self, columns):
        """(number of the encoder, its pairs)."""
        wanted = [encoding.encoding(column) for column in columns]
        for number, (encodings, pairs) in enumerate(self.made):
            if encodings == wanted:
                return number, pairs
        number = len(self.made)
        encoder = encoding.ColumnEncoder(columns, name=f"encode_{number}")
        self.made.append((wanted, encoder(_needed(self.inputs, columns))))
        self.columns.append(columns)
        return number, self.made[-1][1]


def _is_max(column):
    return isinstance(column, VarLenSparseFeat) and column.combiner == "max"


def _spans(columns):
    """What `PoolMax` makes of the fields of these columns, None where it is not needed."""
    if not any(map(_is_max, columns)):
        return None
    return [
        (column.maxlen, True) if _is_max(column) else (getattr(column, "dimension", 1), False) for column in columns
    ]


def _pooled(embeddings, mask, columns, plan):
    spans = _spans(columns)
    if spans is None:
        return embeddings
    first_columns = [0, *itertools.accumulate(plan.field_sizes[:-1])]  # a max-pooled field is one column
    return encoding.PoolMax(spans)((embeddings, Fields(first_columns)(mask)))


def _linear_tables(columns):
    return _tables([column for column in columns if not isinstance(column, DenseFeat)], lambda column: 1)


def _fused(linear, dnn):
    """{number of an embedding table: number of the first-order table that the same op call looks up}.

    Those whose rows are the same columns', in the same order; max pooling needs each weight by itself.
    """
    fused = {}
    for number, ((_, trainable), members) in enumerate(_tables(dnn, lambda column: column.embedding_dim)):
        wanted = [encoding.encoding(column) for column in members]
        for candidate, ((_, its_trainable), others) in enumerate(_linear_tables(linear)):
            same = wanted == [encoding.encoding(column) for column in others] and trainable == its_trainable
            if same and candidate not in fused.values() and not any(map(_is_max, [*members, *others])):
                fused[number] = candidate
                break
    return fused


def _linear_parts(inputs, columns, fused, penalties, seed, backend, encode, plan, changes):
    """The first order: sparse columns with a weight per row, dense columns with a kernel."""
    parts = []
    for number, ((_, trainable), members) in enumerate(_linear_tables(columns)):
        if number in fused.values():
            continue
        table = TablePlan(members)
        encoder, (indices, values, mask) = encode(members)
        shared = {"field_sizes": table.field_sizes, "backend": backend, "trainable": trainable}
        shared["name"] = f"first_order_{number}"
        if any(map(_is_max, members)):
            layer = FMInteraction(
                table.num_rows,
                plan.width,
                return_embeddings=True,
                embeddings_initializer="zeros",
                **penalties.over(table.num_rows).of_weights_in_a_table(),
                **shared,
            )
            weights, _ = layer((indices, values))
            parts.append(Sum()(_pooled(weights, mask, members, table)))
        else:
            options = {**penalties.over(table.num_rows).of_weights(), "units": plan.width}
            layer = FirstOrder(table.num_rows, **options, **shared)
            parts.append(layer((indices, values)))
        plan.first_orders.append(Lookup(layer, table.field_sizes, True, encoder, _spans(members)))
    dense = [column for column in columns if isinstance(column, DenseFeat)]
    if dense:
        numbers = encoding.DenseColumns(dense, name="linear_dense")(_needed(inputs, dense))
        initializer = keras.initializers.GlorotNormal(seed_for(seed, 5))
        plan.linear_dense = dense
        kernel = keras.layers.Dense(
            plan.width,
            use_bias=False,
            kernel_initializer=initializer,
            kernel_regularizer=l2_regularizer(penalties.l2_linear),
            name="linear_kernel",
        )
        plan.linear_kernel = with_changes(kernel, changes)
        parts.append(plan.linear_kernel(numbers))
    return parts


def _groups(columns, fm_group):
    """What interacts, for each group of more than one field: the number of a table of which it is all, or else its
    [(table, field)], fields after pooling.
    """
    groups, whole = {}, []
    for number, ((dim, _), members) in enumerate(_tables(columns, lambda column: column.embedding_dim)):
        fields = [column.group_name for column in members for _ in range(getattr(column, "dimension", 1))]
        for field, group in enumerate(fields):
            groups.setdefault(group, []).append((number, field, dim))
        whole.append(0 if any(map(_is_max, members)) else len(fields))
    unknown = [group for group in fm_group if group not in groups and group != DEFAULT_GROUP_NAME]
    if unknown:
        raise ValueError(f"fm_group names {unknown}, but the columns' groups are {sorted(groups)}")
    found = []
    for group in fm_group:
        members = groups.get(group, [])
        widths = {dim for _, _, dim in members}
        if len(widths) > 1:
            raise ValueError(f"columns of FM group {group!r} must have one embedding_dim, got {sorted(widths)}")
        tables = {table for table, _, _ in members}
        if len(tables) == 1 and len(members) == whole[min(tables)]:
            found += tables
        elif len(members) > 1:
            found.append([(table, field) for table, field, _ in members])
    return found


def _embeddings(columns, groups, kind, fused, penalties, seed, backend, encode, plan):
    """The lookups.

    Returns:
        [(embeddings [B, F, K], layer, interaction of all of them)], and the first orders [B, H] of the tables in
        `fused`.

    """
    found, first_orders = [], []
    for number, ((dim, trainable), members) in enumerate(_tables(columns, lambda column: column.embedding_dim)):
        initializer = keras.initializers.RandomNormal(stddev=0.0001, seed=seed_for(seed, number))
        table = TablePlan(members)
        encoder, (indices, values, mask) = encode(members)
        use_linear = number in fused
        layer = FMInteraction(
            table.num_rows,
            dim,
            use_linear=use_linear,
            linear_apart=use_linear,
            linear_units=plan.width if use_linear else 1,
            output=_kind(plan),
            return_embeddings=True,
            embeddings_initializer=encoding.table_initializer(table, initializer),
            **penalties.over(table.num_rows).of_table(use_linear),
            field_sizes=table.field_sizes,
            backend=backend,
            trainable=trainable,
            name=f"fm_{number}",
            **(kind if number in groups else {}),
        )
        embeddings, interaction, *linear = layer((indices, values))
        plan.lookups.append(Lookup(layer, table.field_sizes, use_linear, encoder, _spans(members)))
        first_orders += linear
        found.append((_pooled(embeddings, mask, members, table), layer, interaction))
    return found, first_orders


def _kind(plan):
    return "vector" if plan.width > 1 else "scalar"


def _second_order(embeddings, groups, kind, plan, seed):
    """The second order of each group: from the op where the group is a whole table, else from the embeddings."""
    parts = []
    for group in groups:
        if isinstance(group, int):
            _, layer, interaction = embeddings[group]
        else:
            tables = sorted({table for table, _ in group})
            chosen = [Fields([f for t, f in group if t == table])(embeddings[table][0]) for table in tables]
            tensor = keras.layers.Concatenate(axis=1)(chosen) if len(chosen) > 1 else chosen[0]
            layer = BiInteraction(_kind(plan), **kind)
            interaction = layer(tensor)
        parts.append(second_order(interaction, plan, seed))
        plan.second_order.append(group)
        plan.field_weights += [layer] if kind["field_weights"] else []
    return parts
