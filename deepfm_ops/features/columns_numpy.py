"""Feature columns on NumPy arrays: raw inputs to the pairs of a table; `columns_tensorflow` is the other side."""

import copy
import math

import numpy as np

from deepfm_ops.features import cells
from deepfm_ops.features.columns import SparseFeat, TablePlan, VarLenSparseFeat, column_from_plain, input_specs
from deepfm_ops.features.tables import Table, flat, number


def raw_inputs(source, specs, sequences=(), unchecked=()):
    """The inputs of feature columns as arrays.

    Args:
        source: a table, or a dict of plain values, one for each input, for one sample.
        specs: {name: (shape of a sample, "string", "int64" or another dtype)}.
        sequences: names of inputs whose samples may be shorter: they are filled up, with "" or 0.
        unchecked: names of inputs that may hold any number, because the model transforms them.

    Returns:
        {name: array [B, *shape]}: canonical text as str objects, int64, or numbers.

    Raises:
        KeyError: inputs that are missing.
        TypeError: content of another kind, by its place.
        ValueError: other shapes, inputs that are not equally long, or numbers that no model can use.

    """
    table = Table(source, specs, [name for name, (shape, _) in specs.items() if math.prod(shape) > 1], what="input")
    arrays = {}
    for name, (shape, kind) in specs.items():
        array = _from_array(name, table, shape, kind, name in sequences)
        if array is None:
            array = _from_cells(name, table, shape, kind, name in sequences)
        if kind not in ("string", "int64") and name not in unchecked:
            _check_numbers(name, array, kind)
        arrays[name] = array
    return arrays


def _from_array(name, table, shape, kind, is_sequence):
    """The input, if it is an array of numbers in the model's shape; None for all that is read cell by cell."""
    array = None if kind == "string" else table.array(name, is_sequence)
    if array is None:
        return None
    if array.shape[1:] != tuple(shape) and len(array):
        if math.prod(array.shape[1:]) != math.prod(shape):
            raise ValueError(f"input {name!r} must have shape {('B', *shape)}, got {array.shape}")
        array = array.reshape(len(array), *shape)
    if not len(array):
        array = np.zeros((0, *shape), array.dtype)
    if kind != "int64":
        return array
    if array.dtype.kind == "f":
        whole = np.isfinite(array) & (array == np.floor(array))
        if not whole.all():
            first = tuple(np.argwhere(~whole)[0])
            raise TypeError(
                f"input {name!r} must hold integers, got {array.dtype} with fractions or NaN: {array[first]} in row "
                f"{first[0]}; nothing can be missing in it, so fill it before"
            )
    if array.dtype.kind in "fu" and ((array < -(2.0**63)) | (array >= 2.0**63)).any():
        raise TypeError(f"input {name!r} must hold integers of at most 64 bits")
    return array.astype(np.int64)


def _from_cells(name, table, shape, kind, is_sequence):
    """The input, from samples of Python objects."""
    convert = {"string": _text, "int64": _integer}.get(kind, _number)
    width, cells_of = math.prod(shape), table.objects(name)
    samples = [flat(cell) for cell in cells_of]
    if is_sequence:
        samples = [
            [] if sample is None and cells.is_missing(cell) else sample
            for cell, sample in zip(cells_of, samples, strict=True)
        ]
    lengths = {-1 if sample is None else len(sample) for sample in samples}
    if -1 in lengths and len(lengths) > 1:
        row = next(row for row, sample in enumerate(samples) if sample is None)
        raise ValueError(f"input {name!r} must hold equally long lists, or none; got {cells_of[row]!r} in row {row}")
    # Plain values are each a sample by itself.
    samples = [[cell] if sample is None else sample for cell, sample in zip(cells_of, samples, strict=True)]
    longest = max(map(len, samples), default=0)
    if is_sequence and longest <= width:
        empty = "" if kind == "string" else 0
        samples = [sample + [empty] * (width - len(sample)) for sample in samples]
    elif any(len(sample) != width for sample in samples):
        if not is_sequence and len(set(map(len, samples))) > 1:
            raise ValueError(f"input {name!r} must hold equally long lists")
        row = next(row for row, sample in enumerate(samples) if len(sample) == longest)
        raise ValueError(
            f"input {name!r} must have shape {('B', *shape)}, got ({len(samples)}, {longest}): "
            f"row {row} has {longest} values"
        )
    found = [convert(name, value, row) for row, sample in enumerate(samples) for value in sample]
    dtype = {"string": object, "int64": np.int64}.get(kind, np.float64)
    return np.fromiter(found, dtype, len(found)).reshape(len(samples), *shape)


def _text(name, value, row):
    if type(value) is str:
        return value
    if cells.is_missing(value):
        return ""
    try:
        return cells.text(value)
    except (TypeError, ValueError):
        raise TypeError(f"input {name!r} must hold text, got {value!r} in row {row}") from None


def _integer(name, value, row):
    number = integer(value)
    if number is None:
        kind = "integers" if isinstance(value, float) else f"numbers, got dtype {np.asarray(value).dtype}"
        raise TypeError(f"input {name!r} must hold {kind}: {value!r} in row {row} is none")
    if not -(2**63) <= number < 2**63:
        raise TypeError(f"input {name!r} must hold integers of at most 64 bits, got {value!r} in row {row}")
    return number


def integer(value):
    """The integer that a category is, or whose canonical text it is; None for any other."""
    try:
        text = str(int(value)) if isinstance(value, bool | np.bool_) else cells.text(value)
        return int(text) if cells.is_integer(text) else None
    except (TypeError, ValueError):
        return None


def _number(name, value, row):
    return number(value, "input", name, row)


def _check_numbers(name, array, kind):
    """Raises where a number, as the model's input rounds it, is one that no model can use; NaN is one here."""
    with np.errstate(over="ignore"):
        rounded = array if kind == "bfloat16" else array.astype(kind)
    bad = cells.first_unusable(rounded)
    if bad is not None:
        raise ValueError(f"input {name!r}, row {bad[0]}: {array[bad]} {cells.UNUSABLE}")


class ColumnEncoder:
    """`columns_tensorflow.ColumnEncoder` on NumPy: raw inputs to the pairs of one table."""

    def __init__(self, columns):
        self.plan = TablePlan([column_from_plain(column) for column in columns])

    def part(self, names):
        """The encoder of the columns whose inputs are among `names`.

        Returns:
            (encoder, or None without such a column; whether each pair is one of theirs, a list of bool).

        Raises:
            ValueError: a column that has some of its inputs there and some not.

        """
        part, kept = copy.copy(self), []
        part.plan = copy.copy(self.plan)
        part.plan.columns = []
        for column in self.plan.columns:
            specs = input_specs([column])
            here = {name in names for name in specs}
            if len(here) > 1:
                raise ValueError(f"column {column.name!r} needs {list(specs)} of one side, the user's or the items'")
            kept += [*here] * math.prod(specs[column.name][0])
            part.plan.columns += [column] * here.pop()
        return part if part.plan.columns else None, kept

    def __call__(self, inputs):
        indices, values, masks = [], [], []
        for column in self.plan.columns:
            start = self.plan.offsets[column.name]
            if isinstance(column, VarLenSparseFeat):
                index, value, mask = self._sequence(column, inputs)
            elif isinstance(column, SparseFeat):
                index = self._encode(column, inputs[column.name], padded=False)
                value = mask = np.ones(index.shape, np.float32)
            else:
                value = inputs[column.name].astype(np.float32, copy=False)
                mask = np.ones_like(value)
                index = np.broadcast_to(np.arange(column.dimension), value.shape)
            indices.append(index + start)
            values.append(value)
            masks.append(mask)
        return tuple(np.ascontiguousarray(np.concatenate(parts, axis=1)) for parts in (indices, values, masks))

    def _encode(self, column, x, padded):
        """int64 [B, width] in [0, vocabulary_size)."""
        name, size = column.name, column.vocabulary_size
        if column.vocabulary is None and not column.use_hash:
            bad = (x < 0) | (x >= size)
            if bad.any():
                row, place = np.argwhere(bad)[0]
                raise IndexError(f"column {name}: index in row {row} = {x[row, place]} is not in [0, {size})")
            return x
        texts = list(map(str, x.flat))
        if column.vocabulary is not None:
            index = np.fromiter((column.vocabulary.get(text, 0) for text in texts), np.int64, len(texts))
        elif not padded:
            index = _hashed(texts, size)
        else:
            hashed = np.minimum(1 + _hashed(texts, max(1, size - 1)), size - 1)
            is_padding = np.fromiter((text in ("", "0") for text in texts), bool, len(texts))
            index = np.where(is_padding, 0, hashed)
        return index.reshape(x.shape)

    def _sequence(self, column, inputs):
        """(indices, pooling weights, mask), each [B, maxlen]."""
        width = column.maxlen
        index = self._encode(column, inputs[column.name], padded=True)
        if column.length_name is None:
            mask = index != 0
        else:
            mask = np.arange(width) < inputs[column.length_name]
        present = mask.astype(np.float32)
        weights = present
        if column.weight_name is not None:
            weights = inputs[column.weight_name]
            if column.weight_norm:
                weights = np.where(mask, weights, np.finfo(np.float32).min)
                weights = np.exp(weights - weights.max(axis=1, keepdims=True))
                weights /= weights.sum(axis=1, keepdims=True)
            weights = np.where(mask, weights, np.float32(0))
        if column.combiner == "mean":
            count = present.sum(axis=1, keepdims=True)
            weights = np.divide(weights, count, out=np.zeros_like(weights), where=count > 0)
        return index, weights, present


def _hashed(texts, buckets):
    from deepfm_ops import kernels  # a pure-Python install has none, and does not score

    return kernels.hash_buckets(texts, buckets)
