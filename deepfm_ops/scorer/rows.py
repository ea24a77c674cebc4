"""float32 numbers as bfloat16 and as rows of int8, the layout of csrc/kernels/fm.h; NumPy alone."""

import numpy as np

from deepfm_ops.container import Rows

INT8_HEADER = 6  # bytes before the codes of a row


def bfloat16(x):
    """The bits of float32 numbers rounded to bfloat16, to nearest, ties to even: uint16 of the same shape."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _outward(x, up):
    """The bits of numbers rounded to bfloat16, up or down."""
    bits = x.view(np.uint32)
    away = (bits & 0xFFFF != 0) & ((bits >> 31 == 0) == up)
    return ((bits >> 16) + away).astype(np.uint16)


def _wide(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def quantized(rows, weights=None, first=0, step=1):
    """Rows as the kernels' int8: uint8 [V, K + 6] of scale, offset and weight as bfloat16, then the codes.

    The offset is the row's minimum rounded down to 8 bits of precision, and the scale what its maximum then needs,
    rounded up, so that no element is clipped. The error is at most half of the scale: about (max - min) / 510 for rows
    around zero, and up to |min| / 65,000 more for rows far from it.

    Args:
        rows: float32 [V, K].
        weights: float32 [V, 1], or None.
        first: the number of the first row, of which errors speak.
        step: from the number of a row to that of the next.

    Raises:
        ValueError: NaN or infinity in a row.

    """
    result = np.zeros((len(rows), rows.shape[1] + INT8_HEADER), np.uint8)
    header = np.zeros((len(rows), INT8_HEADER // 2), np.uint16)
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise ValueError(f"row {first + step * int(np.argmin(finite))} of a table holds NaN or infinity")
    header[:, 1] = _outward(rows.min(axis=1), up=False)
    offset = _wide(header[:, 1]).astype(np.float64)[:, np.newaxis]
    finite = np.isfinite(offset)
    if not finite.all():
        raise ValueError(f"row {first + step * int(np.argmin(finite))} of a table is too large for int8")
    header[:, 0] = _outward(((rows.max(axis=1, keepdims=True) - offset) / 255).astype(np.float32)[:, 0], up=True)
    scale = _wide(header[:, 0]).astype(np.float64)[:, np.newaxis]
    codes = np.divide(rows - offset, scale, out=np.zeros(rows.shape), where=scale > 0)
    result[:, INT8_HEADER:] = np.clip(np.rint(codes), 0, 255)
    if weights is not None:
        header[:, 2] = bfloat16(weights[:, 0])
    result[:, :INT8_HEADER] = header.view(np.uint8)
    return result


def stored(name, embeddings, w, table, index=0, count=1):
    """The arrays of a table in the scorer's file, which read their source when they are written.

    Args:
        name: of the table.
        embeddings: [V, K], an array or `Rows`; None: a first order alone, which is a table of one column.
        w: [V, H], an array or `Rows`, or None; of several columns it is a table of its own.
        table: "float32", "bfloat16" or "int8".
        index: of the shard that it is: row r here is row index + r * count of the table, of which errors speak.
        count: how many shards there are.

    Returns:
        {name of an array: Rows}.

    Raises:
        ValueError: w of another shape than embeddings need; writing the arrays, rows that int8 cannot hold.

    """
    if embeddings is None:
        embeddings, w = w, None
    if w is not None and w.shape[0] != embeddings.shape[0]:
        raise ValueError(f"w must have {embeddings.shape[0]} rows, as the embeddings have, got {tuple(w.shape)}")
    if w is not None and w.shape[1] > 1:
        apart = stored("apart", None, w, table, index, count)["apart_rows"]
        return stored(name, embeddings, None, table, index, count) | {f"{name}_weights": apart}
    if table == "int8" and embeddings.shape[1] > 1:
        shape = (embeddings.shape[0], embeddings.shape[1] + INT8_HEADER)
        return {f"{name}_rows": Rows(shape, np.uint8, lambda: _quantized(embeddings, w, index, count))}
    arrays = {f"{name}_rows": embeddings} if w is None else {f"{name}_rows": embeddings, f"{name}_weights": w}
    return {name: _narrow(source, table) for name, source in arrays.items()}


def _narrow(source, table):
    if table == "float32":
        return Rows(source.shape, np.float32, lambda: Rows.of(source).blocks())
    return Rows(source.shape, np.uint16, lambda: map(bfloat16, _float32(source)))


def _float32(source):
    """The blocks of a source as float32."""
    return (np.ascontiguousarray(block, np.float32) for block in Rows.of(source).blocks())


def _quantized(embeddings, w, index, count):
    if w is None:
        pairs = ((rows, None) for rows in _float32(embeddings))
    else:
        pairs = _together(_float32(embeddings), _float32(w))
    for rows, weights in pairs:
        yield quantized(rows, weights, index, count)
        index += count * len(rows)


def _together(first, second):
    """Pairs of blocks of equally many rows, of two sources of equally many rows that end their blocks anywhere."""
    rest = np.zeros((0, 1), np.float32)
    for block in first:
        while len(rest) < len(block):
            rest = np.concatenate([rest, next(second)])
        yield block, rest[: len(block)]
        rest = rest[len(block) :]


def decoded(rows):
    """Rows that `quantized` made, as float32 [V, K]; rows of another dtype as they are."""
    if rows.dtype != np.uint8:
        return rows
    header = _wide(rows[:, :INT8_HEADER].copy().view(np.uint16))
    return header[:, 1:2] + header[:, :1] * rows[:, INT8_HEADER:].astype(np.float32)


class Sharded:
    """A table in shards: row r is row r // N of shard r % N.

    Args:
        parts: the rows of each shard, arrays [., K] of one dtype; None: a shard without the table.

    Attributes:
        shape: [V, K].
        dtype: of the rows.
        ndim: 2.

    Raises:
        ValueError: parts that are not the shards of one table.

    """

    ndim = 2

    def __init__(self, parts):
        if any(part is None or part.ndim != 2 for part in parts):
            raise ValueError("its shards must hold the same tables, of two dimensions")
        self.parts, self.dtype = parts, parts[0].dtype
        self.shape = (sum(len(part) for part in parts), parts[0].shape[1])
        for index, part in enumerate(parts):
            want = (len(range(index, self.shape[0], len(parts))), self.shape[1])
            if (part.dtype, part.shape) != (self.dtype, want):
                raise ValueError(f"shard {index} has {part.dtype} {part.shape}, it should have {self.dtype} {want}")


def gathered(tables, indices):
    """The rows of indices, out of tables in the same shards.

    Args:
        tables: a list of `Sharded`.
        indices: integers in [0, V), of any shape, n in all.

    Returns:
        ([rows [n, K] of each table], positions of the shape of indices, int64): row positions[i] is that of indices[i].

    """
    flat, count = indices.reshape(-1), len(tables[0].parts)
    shards = (flat % count).astype(np.uint16)
    order = np.argsort(shards, kind="stable")  # of 16 bits: a radix sort
    positions = np.empty(len(flat), np.int64)
    positions[order] = np.arange(len(flat))
    rows, shards = flat[order] // count, shards[order]
    starts = np.flatnonzero(np.diff(shards, prepend=count)).tolist()
    found = [np.empty((len(flat), table.shape[1]), table.dtype) for table in tables]
    for start, end in zip(starts, [*starts[1:], len(flat)], strict=False):  # without indices, no starts
        for table, out in zip(tables, found, strict=True):
            table.parts[shards[start]].take(rows[start:end], axis=0, out=out[start:end], mode="clip")
    return found, positions.reshape(indices.shape)
