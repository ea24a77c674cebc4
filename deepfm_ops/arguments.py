"""What the op and the reference accept, and the checks that need no data: one place for both."""

from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from deepfm_ops.features import cells

TABLE_DTYPES = (tf.float32, tf.float64, tf.bfloat16, tf.float16)
INDEX_DTYPES = (tf.int32, tf.int64)
OUTPUTS = ("scalar", "vector")


class Pairs(NamedTuple):
    """The (index, value) pairs of a batch.

    indices: int32 or int64 [B, F], or [nnz] with row_splits.
    values: the accumulation dtype, same shape, or None: all ones.
    row_splits: int64 [B + 1], or None.
    """

    indices: tf.Tensor
    values: tf.Tensor | None
    row_splits: tf.Tensor | None


def accumulation_dtype(table_dtype):
    """float64 for float64, float32 for float32 and narrower."""
    return tf.float64 if table_dtype == tf.float64 else tf.float32


def require(holds, text, shown):
    """Control dependencies that raise InvalidArgumentError unless `holds`.

    Args:
        holds: bool tensor, scalar.
        text: the message, with a {} for each of `shown`.
        shown: function that returns the tensors to show; called only where they are needed.

    """
    if tf.executing_eagerly():
        if not holds:
            raise tf.errors.InvalidArgumentError(
                None, None, text.format(*(tf.get_static_value(tf.convert_to_tensor(t)) for t in shown()))
            )
        return []

    def fail():
        with tf.control_dependencies([tf.debugging.Assert(False, [tf.strings.format(text, shown())])]):
            return tf.constant(False)

    return [tf.cond(holds, lambda: tf.constant(True), fail)]


def usable(name, x, what="column", allow_missing=False):
    """The numbers [B, ...], once none of them would make a loss NaN: `cells.first_unusable` in TensorFlow.

    Raises InvalidArgumentError, when it runs, that names the row.
    """
    wide = x if x.dtype == tf.float64 else tf.cast(x, tf.float32)  # in float16 the bound itself would be infinite
    size = tf.abs(wide)

    # NaN compares as false. No comparison is negated: TensorFlow's optimizer makes the opposite one of it.
    def is_bad():
        return size > cells.LARGEST if allow_missing else (size > cells.LARGEST) | tf.math.is_nan(wide)

    def shown():
        first = tf.where(is_bad())[0]
        return first[0], tf.gather_nd(x, first)

    if allow_missing:
        fine = tf.logical_not(tf.reduce_any(is_bad()))
    else:
        fine = tf.reduce_all(size <= cells.LARGEST)

    text = f"{what} {name}, row {{}}: {{}} {cells.UNUSABLE}"
    with tf.control_dependencies(require(fine, text, shown)):
        return tf.identity(x)


def on_this_machine(name, table):
    """The tensor or tf.Variable, once it is known not to be read over the network.

    Raises:
        ValueError: a variable whose parts are elsewhere, or all of it.

    """
    where = None
    if isinstance(table, tf.__internal__.distribute.ShardedVariable):
        where = f"is a ShardedVariable of {len(table.variables)} parts"
    elif isinstance(table, tf.Variable):
        device = tf.DeviceSpec.from_string(table.device or "")
        if device.job not in (None, "localhost"):
            with tf.init_scope(), tf.device(None):
                here = tf.DeviceSpec.from_string(tf.constant(0).device)
            if (device.job, device.task) != (here.job, here.task):
                where = f"is on {table.device}, and this is /job:{here.job}/task:{here.task}"
    if where is not None:
        raise ValueError(
            f"{name} {where}: all of it would be read over the network at every call. Train tables that are split over "
            "machines by deepfm_ops.cluster.ShardedDeepFM, or make the model without a strategy of parameter servers"
        )
    return table


def _table(table):
    if isinstance(table, keras.Variable):
        table = table.value
    table = on_this_machine("table", table)
    if not isinstance(table, tf.Variable):
        table = tf.convert_to_tensor(table)
    if table.dtype not in TABLE_DTYPES:
        raise TypeError(f"table must be float32, float64, bfloat16 or float16, got {table.dtype.name}")
    if table.shape.rank not in (None, 2):
        raise ValueError(f"table must be rank 2 [V, K], got shape {table.shape}")
    return table


def _values(values, dtype):
    """Values as a tensor of `dtype`. Python and NumPy numbers are converted, tensors must have it."""
    if isinstance(values, keras.Variable):
        values = values.value
    if not tf.is_tensor(values) and not isinstance(values, tf.Variable):
        array = np.asarray(values)
        if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
            raise TypeError(f"values must be numbers, got dtype {array.dtype}")
        return tf.convert_to_tensor(array.astype(dtype.as_numpy_dtype))
    values = tf.convert_to_tensor(values)
    if values.dtype != dtype:
        raise TypeError(f"values must be {dtype.name} for this table, got {values.dtype.name}")
    return values


def _matching(values, part, expected, what):
    """`values.part`, once the positions it goes with are known to be those of the indices."""
    check = tf.debugging.assert_equal(
        tf.cast(what(values), tf.int64),
        tf.cast(expected, tf.int64),
        message="values must have the positions of indices",
    )
    with tf.control_dependencies([] if check is None else [check]):
        return tf.identity(part(values))


def _flat(indices, values):
    """Flat indices, flat values and row_splits of a RaggedTensor or a SparseTensor [B, None]."""
    if isinstance(indices, tf.RaggedTensor):
        if indices.ragged_rank != 1 or indices.flat_values.shape.rank not in (None, 1):
            raise ValueError(f"indices must be ragged of rank 2 [B, None], got shape {indices.shape}")
        if isinstance(values, tf.RaggedTensor):
            values = _matching(values, lambda v: v.flat_values, indices.row_splits, lambda v: v.row_splits)
        return indices.flat_values, values, indices.row_splits
    if indices.shape.rank not in (None, 2):
        raise ValueError(f"indices must be sparse of rank 2 [B, M], got shape {indices.shape}")
    if isinstance(values, tf.SparseTensor):
        values = _matching(values, lambda v: v.values, indices.indices, lambda v: v.indices)
    rows = tf.RaggedTensor.from_value_rowids(indices.values, indices.indices[:, 0], nrows=indices.dense_shape[0])
    return indices.values, values, rows.row_splits


def parse(table, indices, values, row_splits, output):
    """Checks the arguments of `fm_interaction` and brings them into one form.

    Returns:
        (table, Pairs): the table is a tf.Variable or a Tensor.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: ranks or static shapes that do not fit, an unknown `output`, row_splits given twice; a table that is
            on another machine, or a ShardedVariable.
        InvalidArgumentError: ragged or sparse values at other positions than the indices.

    """
    if output not in OUTPUTS:
        raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
    table = _table(table)
    if isinstance(indices, tf.RaggedTensor | tf.SparseTensor):
        if row_splits is not None:
            raise ValueError(f"row_splits must be None when indices are a {type(indices).__name__}")
        indices, values, row_splits = _flat(indices, values)
    elif isinstance(values, tf.RaggedTensor | tf.SparseTensor):
        raise TypeError(
            f"values are a {type(values).__name__}, so indices must be one too, got {type(indices).__name__}"
        )
    indices = tf.convert_to_tensor(indices)
    if indices.dtype not in INDEX_DTYPES:
        raise TypeError(f"indices must be int32 or int64, got {indices.dtype.name}")
    if row_splits is None:
        if indices.shape.rank not in (None, 2):
            raise ValueError(f"indices must be rank 2 [B, F], or rank 1 with row_splits; got shape {indices.shape}")
    else:
        row_splits = tf.convert_to_tensor(row_splits)
        if row_splits.dtype not in INDEX_DTYPES:
            raise TypeError(f"row_splits must be int32 or int64, got {row_splits.dtype.name}")
        row_splits = tf.cast(row_splits, tf.int64)
        if row_splits.shape.rank not in (None, 1) or row_splits.shape.num_elements() == 0:
            raise ValueError(f"row_splits must be rank 1 [B + 1], got shape {row_splits.shape}")
        if indices.shape.rank not in (None, 1):
            raise ValueError(f"indices must be rank 1 [nnz] with row_splits, got shape {indices.shape}")
    if values is not None:
        values = _values(values, accumulation_dtype(table.dtype))
        if not values.shape.is_compatible_with(indices.shape):
            raise ValueError(f"values must have the shape of indices, {indices.shape}, got {values.shape}")
    return table, Pairs(indices, values, row_splits)
