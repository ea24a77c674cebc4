"""Columns of tables as columns of canonical text, which the vocabulary reads; Arrow's are used where they lie."""

import sys

import numpy as np

from deepfm_ops.features import cells
from deepfm_ops.features.vocabulary import native

NO_CATEGORY = b"\xff"  # what no text is: a cell that cannot be a category, and was not asked to be one


def of_cells(found, name, strict=True):
    """(column of text, kinds of the categories) of a list of cells.

    Args:
        found: list of Python objects.
        name: of the column, for errors.
        strict: whether a cell that cannot be a category is an error; else it is unknown.

    """
    if set(map(type, found)) <= {str, type(None)}:
        return native.Column.of_list(found), {"text"} if found else set()
    texts, kinds = [], set()
    for cell in found:
        if type(cell) is str:
            texts.append(cell)
            kinds.add("text")
        elif cells.is_missing(cell):
            texts.append(None)
        else:
            try:
                text = cells.category(cell, name)
            except (TypeError, ValueError):
                if strict:
                    raise
                texts.append(NO_CATEGORY)
                continue
            texts.append(text)
            kinds.add(cells.kind(cell, text))
    return native.Column.of_list(texts), kinds


def of_array(array):
    """(column of text, kinds) of a NumPy array [n] of numbers; None if it has to be read cell by cell."""
    missing = None
    if array.dtype.kind == "f":
        missing = np.isnan(array)
        with np.errstate(invalid="ignore"):
            whole = array.astype(np.int64)
        if (
            not np.array_equal(np.where(missing, 0, array), np.where(missing, 0, whole))
            or (np.abs(array) >= 2**53).any()
        ):
            return None
        array = whole
    elif array.dtype.kind not in "iu" or (array.dtype == np.uint64 and (array >= 2**63).any()):
        return None
    kinds = {"integer"} if missing is None or not missing.all() else set()
    return native.Column.of_integers(array.astype(np.int64, copy=False), missing), kinds if len(array) else set()


def of_arrow(array, empty_is_missing=False):
    """(column of text, kinds) of a pyarrow Array of text or integers; None for other types."""
    import pyarrow as pa

    kind = array.type
    if pa.types.is_integer(kind) and kind != pa.uint64():
        missing = np.asarray(array.is_null()) if array.null_count else None
        numbers = np.asarray((array.fill_null(0) if array.null_count else array).cast(pa.int64()))
        return native.Column.of_integers(numbers, missing), {"integer"} if len(array) > array.null_count else set()
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        array, kind = array.cast(pa.large_binary()), pa.large_binary()
    wide = pa.types.is_large_string(kind) or pa.types.is_large_binary(kind)
    if not (wide or pa.types.is_string(kind) or pa.types.is_binary(kind)):
        return None
    validity, offsets, data = array.buffers()
    count, first = len(array), array.offset
    offsets = np.frombuffer(offsets or b"\0" * 8, np.int64 if wide else np.int32)[first : first + count + 1]
    data = np.frombuffer(data, np.uint8) if data is not None and data.size else np.zeros(0, np.uint8)
    if not count:
        offsets = np.zeros(1, offsets.dtype)
    bits = None if not array.null_count else np.frombuffer(validity, np.uint8)
    column = native.Column(offsets[:-1], offsets[1:], data, bits, first, empty_is_missing)
    return column, {"text"} if count > array.null_count else set()


def as_arrow(column):
    """A column of pandas or polars as pyarrow's, if it holds text there and pyarrow is installed; else None."""
    if "pyarrow" not in sys.modules and not (hasattr(column, "to_arrow") or hasattr(column, "dtype")):
        return None
    try:
        import pyarrow as pa
    except ImportError:
        return None
    if isinstance(column, pa.Array | pa.ChunkedArray):
        return column
    dtype = str(getattr(column, "dtype", ""))
    if dtype in ("str", "string", "String", "string[pyarrow]", "large_string[pyarrow]"):
        if hasattr(column, "to_arrow"):  # polars
            return column.to_arrow()
        if hasattr(column, "array"):  # pandas
            return pa.array(column, from_pandas=True)
    return None
