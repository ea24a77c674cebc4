"""Feature columns in TensorFlow: raw inputs to the pairs of a table; `columns_numpy` is the other side."""

import dataclasses
import math

import keras
import tensorflow as tf

from deepfm_ops import arguments
from deepfm_ops.features.columns import DenseFeat, SparseFeat, TablePlan, VarLenSparseFeat, column_from_plain


def column_to_config(column):
    """A column as JSON-ready dict."""
    config = {field.name: getattr(column, field.name) for field in dataclasses.fields(column)}
    if "sparsefeat" in config:
        config["sparsefeat"] = column_to_config(column.sparsefeat)
    for key, serialize in (
        ("embeddings_initializer", lambda given: keras.initializers.serialize(keras.initializers.get(given))),
        ("transform_fn", keras.saving.serialize_keras_object),
    ):
        if config.get(key) is not None and not isinstance(config[key], dict):
            config[key] = dict(serialize(config[key]))
            config[key].pop("shared_object_id", None)  # Keras numbers objects while it saves
    return {"kind": type(column).__name__, **config}


def column_from_config(config):
    """The column that `column_to_config` described."""
    if not isinstance(config, dict):
        return config
    config = dict(config)
    if "sparsefeat" in config:
        config["sparsefeat"] = dict(config["sparsefeat"])
    sparse = config.get("sparsefeat", config)
    if sparse.get("embeddings_initializer"):
        sparse["embeddings_initializer"] = keras.initializers.get(sparse["embeddings_initializer"])
    if isinstance(config.get("transform_fn"), dict):
        config["transform_fn"] = keras.saving.deserialize_keras_object(config["transform_fn"])
    return column_from_plain(config)


def encoding(column):
    """The column without what its encoding does not depend on, for comparison."""
    if isinstance(column, VarLenSparseFeat):
        return dataclasses.replace(column, sparsefeat=encoding(column.sparsefeat))
    if isinstance(column, SparseFeat):
        plain = {"embedding_dim": 1, "embeddings_initializer": None, "group_name": "", "trainable": True}
        return dataclasses.replace(column, **plain)
    return column


def check_shared(columns):
    """Raises ValueError where columns of one embedding_name do not agree on the embedding."""
    seen = {}
    for column in columns:
        if isinstance(column, DenseFeat):
            continue
        sparse = getattr(column, "sparsefeat", column)
        initializer = sparse.embeddings_initializer and keras.initializers.serialize(sparse.embeddings_initializer)
        mine = {"vocabulary_size": sparse.vocabulary_size, "embedding_dim": sparse.embedding_dim}
        mine |= {"trainable": sparse.trainable, "embeddings_initializer": initializer}
        other, theirs = seen.setdefault(sparse.embedding_name, (column.name, mine))
        for what, value in mine.items():
            if theirs[what] != value:
                raise ValueError(
                    f"columns {other!r} and {column.name!r} share embedding {sparse.embedding_name!r}, so their {what} "
                    f"must be one, got {theirs[what]!r} and {value!r}"
                )


def as_text(name, x):
    """A tensor as the canonical text of its values; missing values do not exist in tensors of numbers."""
    if x.dtype == tf.string:
        return x
    if x.dtype == tf.bool:
        return tf.where(x, "True", "False")
    if x.dtype.is_integer:
        return tf.strings.as_string(x)
    text = f"input {name} must hold text or whole numbers, got {{}}: write fractions out as text"
    is_whole = tf.equal(x, tf.round(x)) & (tf.abs(x) < 2.0**63)  # NaN equals nothing

    def shown():
        flat, wrong = tf.reshape(x, [-1]), tf.reshape(tf.logical_not(is_whole), [-1])
        return (flat[tf.argmax(tf.cast(wrong, tf.int32))],)

    with tf.control_dependencies(arguments.require(tf.reduce_all(is_whole), text, shown)):
        return tf.strings.as_string(tf.cast(x, tf.int64))


def as_input(name, x, shape, kind, is_sequence):
    """A tensor of raw input as the model takes it, [B, *shape].

    Args:
        name: of the input.
        x: Tensor [B, *shape], or [B] where a sample has one value; RaggedTensor or SparseTensor where it may have
            fewer.
        shape: of a sample.
        kind: "string", "int64" or another dtype.
        is_sequence: whether samples may be shorter: they are filled up with "" or 0.

    Raises:
        TypeError, ValueError: another kind or shape.
        InvalidArgumentError: a sample with more values, when it runs.

    """
    if isinstance(x, tf.SparseTensor):
        x = tf.RaggedTensor.from_value_rowids(x.values, x.indices[:, 0], nrows=x.dense_shape[0])
    if isinstance(x, tf.RaggedTensor):
        if not is_sequence:
            raise ValueError(f"input {name!r} must be dense, as only multi-valued columns may be ragged or sparse")
        x = _filled(name, x.with_flat_values(as_text(name, x.flat_values)) if kind == "string" else x, shape)
    if kind == "string":
        x = as_text(name, x)
    elif kind == "int64" and not x.dtype.is_integer:
        raise TypeError(f"input {name!r} must be int32 or int64, got {x.dtype.name}")
    if x.shape.rank is None or x.shape[1:] != tuple(shape):
        if x.shape.rank is not None and x.shape[1:].num_elements() not in (None, math.prod(shape)):
            raise ValueError(f"input {name!r} must have shape {('B', *shape)}, got {tuple(x.shape)}")
        x = tf.reshape(x, (1 if x.shape.rank == 0 else tf.shape(x)[0], *shape))
    return x


def _filled(name, x, shape):
    """A RaggedTensor [B, None] as [B, width], filled up."""
    width, lengths = shape[0], x.row_lengths()
    fits = tf.reduce_all(lengths <= width)
    text = f"input {name} has {{}} values in row {{}}, the model takes at most {width}"
    shown = lambda: (tf.reduce_max(lengths), tf.argmax(lengths))  # noqa: E731
    with tf.control_dependencies(arguments.require(fits, text, shown)):
        return x.to_tensor("" if x.dtype == tf.string else 0, shape=(None, width))


@keras.saving.register_keras_serializable("deepfm_ops")
class StackedInitializer(keras.initializers.Initializer):
    """Rows of one table with an initializer for each block of them.

    Args:
        parts: list of (number of rows, Keras initializer).

    """

    def __init__(self, parts):
        self.parts = [(int(rows), keras.initializers.get(initializer)) for rows, initializer in parts]

    def __call__(self, shape, dtype=None):
        return tf.concat([initializer((rows, *shape[1:]), dtype=dtype) for rows, initializer in self.parts], axis=0)

    def get_config(self):
        return {"parts": [(rows, keras.initializers.serialize(initializer)) for rows, initializer in self.parts]}


def table_initializer(plan, default):
    """The initializer of a `TablePlan`'s table, `default` for the blocks without one."""
    if all(initializer is None for _, initializer in plan.blocks):
        return default
    return StackedInitializer([(rows, initializer or default) for rows, initializer in plan.blocks])


@keras.saving.register_keras_serializable("deepfm_ops")
class ColumnEncoder(keras.layers.Layer):
    """Turns a dict of inputs into the pairs of one table.

    Args:
        columns: SparseFeat, VarLenSparseFeat, and DenseFeat with an embedding.

    Call arguments:
        inputs: dict of tensors [B, 1], [B, maxlen] or [B, dimension].

    Returns:
        indices: int64 [B, P], rows of the table.
        values: float32 [B, P]: one, a dense column's number, or the pooling weight of a value; 0 for padding.
        mask: float32 [B, P]: 0 for padding.

    Raises:
        InvalidArgumentError: an index outside its column's [0, vocabulary_size): it would be another
            column's row.

    """

    def __init__(self, columns, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.columns = [column_from_config(column) for column in columns]
        self.plan = TablePlan(self.columns)
        self.supports_jit = False
        self.vocabularies = {}
        for column in self.columns:
            vocabulary = getattr(column, "vocabulary", None)
            if vocabulary is not None:
                content = tf.lookup.KeyValueTensorInitializer(
                    tf.constant(list(vocabulary), tf.string), tf.constant(list(vocabulary.values()), tf.int64)
                )
                self.vocabularies[column.name] = tf.lookup.StaticHashTable(content, default_value=0)

    def build(self, input_shape=None):
        pass

    def index(self, column, x, padded):
        """int64 indices in [0, vocabulary_size). With `padded`, hashing keeps 0 for the value 0."""
        if column.vocabulary is not None:
            return self.vocabularies[column.name].lookup(as_text(column.name, x))
        if not column.use_hash:
            if not x.dtype.is_integer:
                raise TypeError(f"column {column.name!r} must hold integers, got {x.dtype.name}")
            x = tf.cast(x, tf.int64)
            good = tf.reduce_all((x >= 0) & (x < column.vocabulary_size))

            def shown():
                flat = tf.reshape(x, [-1])
                first = tf.argmax(tf.cast((flat < 0) | (flat >= column.vocabulary_size), tf.int32))
                return first // tf.shape(x, tf.int64)[1], flat[first], column.vocabulary_size

            text = f"column {column.name}: index in row {{}} = {{}} is not in [0, {{}})"
            with tf.control_dependencies(arguments.require(good, text, shown)):
                return tf.identity(x)
        x = as_text(column.name, x)
        if not padded:
            return tf.strings.to_hash_bucket_fast(x, column.vocabulary_size)
        hashed = 1 + tf.strings.to_hash_bucket_fast(x, max(1, column.vocabulary_size - 1))
        is_padding = (x == "0") | (x == "")
        return tf.where(is_padding, tf.zeros_like(hashed), tf.minimum(hashed, column.vocabulary_size - 1))

    def _sequence(self, column, inputs):
        """(indices, pooling weights, mask) of a VarLenSparseFeat, each [B, maxlen]."""
        indices = self.index(column, inputs[column.name], padded=True)
        if column.length_name is None:
            mask = indices != 0
        else:
            lengths = tf.reshape(tf.cast(inputs[column.length_name], tf.int64), [-1, 1])
            mask = tf.range(column.maxlen, dtype=tf.int64)[tf.newaxis] < lengths
        present = tf.cast(mask, tf.float32)
        weights = present
        if column.weight_name is not None:
            given = tf.reshape(tf.cast(inputs[column.weight_name], tf.float32), [-1, column.maxlen])
            given = arguments.usable(column.weight_name, given)
            if column.weight_norm:
                given = tf.nn.softmax(tf.where(mask, given, given.dtype.min))
            weights = tf.where(mask, given, 0.0)
        if column.combiner == "mean":
            weights = tf.math.divide_no_nan(weights, tf.reduce_sum(present, axis=1, keepdims=True))
        return indices, weights, present

    def call(self, inputs):
        indices, values, masks = [], [], []
        for column in self.plan.columns:
            start = self.plan.offsets[column.name]
            if isinstance(column, VarLenSparseFeat):
                index, value, mask = self._sequence(column, inputs)
            elif isinstance(column, SparseFeat):
                index = self.index(column, inputs[column.name], padded=False)
                value = mask = tf.ones(tf.shape(index), tf.float32)
            else:
                value = transformed(column, inputs[column.name])
                mask = tf.ones_like(value)
                index = tf.zeros(tf.shape(value), tf.int64) + tf.range(column.dimension, dtype=tf.int64)
            indices.append(index + start)
            values.append(value)
            masks.append(mask)
        return tf.concat(indices, 1), tf.concat(values, 1), tf.concat(masks, 1)

    def compute_output_spec(self, inputs):
        batch = next(iter(inputs.values())).shape[0]
        shape = (batch, sum(self.plan.field_sizes))
        return tuple(keras.KerasTensor(shape, dtype) for dtype in ("int64", "float32", "float32"))

    def get_config(self):
        return {**super().get_config(), "columns": [column_to_config(column) for column in self.columns]}


def transformed(column, x):
    """A dense column's numbers [B, dimension] as float32, transformed.

    Raises InvalidArgumentError, when it runs, for a number that would make a loss NaN.
    """
    x = tf.cast(x, tf.float32)
    x = x if column.transform_fn is None else tf.cast(column.transform_fn(x), tf.float32)
    return arguments.usable(column.name, x)


@keras.saving.register_keras_serializable("deepfm_ops")
class DenseColumns(keras.layers.Layer):
    """The transformed numbers of dense columns side by side: a dict of inputs to [B, sum of dimensions]."""

    def __init__(self, columns, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.supports_jit = False  # its error says where
        self.columns = [column_from_config(column) for column in columns]

    def build(self, input_shape=None):
        pass

    def call(self, inputs):
        return tf.cast(tf.concat([transformed(c, inputs[c.name]) for c in self.columns], axis=1), self.compute_dtype)

    def compute_output_spec(self, inputs):
        batch = next(iter(inputs.values())).shape[0]
        return keras.KerasTensor((batch, sum(c.dimension for c in self.columns)), self.compute_dtype)

    def get_config(self):
        return {**super().get_config(), "columns": [column_to_config(column) for column in self.columns]}


@keras.saving.register_keras_serializable("deepfm_ops")
class PoolMax(keras.layers.Layer):
    """Pools the fields of columns whose combiner is "max"; the other fields pass through.

    Args:
        spans: list of (number of fields of a column, whether to take their maximum).

    Call arguments:
        inputs: (embeddings [B, F, K], mask [B, F]), the mask 0 for padding.

    Returns:
        [B, F', K]. A sample without values pools to zeros.

    """

    def __init__(self, spans, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.spans = [(int(fields), bool(is_max)) for fields, is_max in spans]

    def build(self, input_shape=None):
        pass

    def call(self, inputs):
        embeddings, mask = inputs
        pooled, first = [], 0
        for fields, is_max in self.spans:
            part = embeddings[:, first : first + fields]
            if is_max:
                present = mask[:, first : first + fields, tf.newaxis] > 0
                part = tf.reduce_max(tf.where(present, part, part.dtype.min), axis=1, keepdims=True)
                part = tf.where(tf.reduce_any(present, axis=1, keepdims=True), part, tf.zeros_like(part))
            pooled.append(part)
            first += fields
        return tf.concat(pooled, axis=1)

    def compute_output_shape(self, input_shape):
        batch, _, dim = input_shape[0]
        return (batch, sum(1 if is_max else fields for fields, is_max in self.spans), dim)

    def get_config(self):
        return {**super().get_config(), "spans": self.spans}
