"""float32 numbers as bfloat16 and as rows of int8, the layout of csrc/kernels/fm.h; NumPy alone."""

import numpy as np

INT8_HEADER = 6  # bytes before the codes of a row
_CHUNK = 1 << 20  # rows that are quantized at a time


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


def quantized(rows, weights=None):
    """Rows as the kernels' int8: uint8 [V, K + 6] of scale, offset and weight as bfloat16, then the codes.

    The offset is the row's minimum rounded down to 8 bits of precision, and the scale what its maximum then needs,
    rounded up, so that no element is clipped. The error is at most half of the scale: about (max - min) / 510 for rows
    around zero, and up to |min| / 65,000 more for rows far from it.

    Args:
        rows: float32 [V, K].
        weights: float32 [V, 1], or None.

    Raises:
        ValueError: NaN or infinity in a row.

    """
    result = np.zeros((len(rows), rows.shape[1] + INT8_HEADER), np.uint8)
    header = np.zeros((len(rows), INT8_HEADER // 2), np.uint16)
    for start in range(0, len(rows), _CHUNK):
        here = slice(start, start + _CHUNK)
        x = rows[here]
        finite = np.isfinite(x).all(axis=1)
        if not finite.all():
            raise ValueError(f"row {start + int(np.argmin(finite))} of a table holds NaN or infinity")
        header[here, 1] = _outward(x.min(axis=1), up=False)
        offset = _wide(header[here, 1]).astype(np.float64)[:, np.newaxis]
        if not np.isfinite(offset).all():
            raise ValueError(f"row {start + int(np.argmin(np.isfinite(offset)))} of a table is too large for int8")
        header[here, 0] = _outward(((x.max(axis=1, keepdims=True) - offset) / 255).astype(np.float32)[:, 0], up=True)
        scale = _wide(header[here, 0]).astype(np.float64)[:, np.newaxis]
        codes = np.divide(x - offset, scale, out=np.zeros(x.shape), where=scale > 0)
        result[here, INT8_HEADER:] = np.clip(np.rint(codes), 0, 255)
    if weights is not None:
        header[:, 2] = bfloat16(weights[:, 0])
    result[:, :INT8_HEADER] = header.view(np.uint8)
    return result


def decoded(rows):
    """Rows that `quantized` made, as float32 [V, K]; rows of another dtype as they are."""
    if rows.dtype != np.uint8:
        return rows
    header = _wide(rows[:, :INT8_HEADER].copy().view(np.uint16))
    return header[:, 1:2] + header[:, :1] * rows[:, INT8_HEADER:].astype(np.float32)
