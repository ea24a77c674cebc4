"""Feature columns on NumPy arrays: raw inputs to the pairs of a table; `columns_tensorflow` is the other side."""

import math

import numpy as np

from deepfm_ops.features.columns import SparseFeat, TablePlan, VarLenSparseFeat, column_from_plain
from deepfm_ops.features.tables import input_array


def raw_inputs(table, specs):
    """{name: array [B, size]} of a dict or DataFrame: str objects, int64 or float32."""
    missing = [name for name in specs if name not in table]
    if missing:
        raise KeyError(f"inputs are missing {missing}; got {sorted(map(str, table.keys()))}")
    arrays = {}
    for name, (shape, kind) in specs.items():
        if isinstance(table[name], str) or not hasattr(table[name], "__len__") or getattr(table[name], "ndim", 1) == 0:
            raise ValueError(f"input {name!r} must be a list or an array with an entry per sample")
        array = input_array(name, table[name], shape, kind)
        if kind not in ("string", "int64"):
            array = array.astype(kind).astype(np.float32)  # as the model's input rounds it
        arrays[name] = array.reshape(len(array), math.prod(shape))
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"inputs must be equally long, got {lengths}")
    return arrays


class ColumnEncoder:
    """`columns_tensorflow.ColumnEncoder` on NumPy: raw inputs to the pairs of one table."""

    def __init__(self, columns):
        self.plan = TablePlan([column_from_plain(column) for column in columns])

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
