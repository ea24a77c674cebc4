"""Columns of tables as columns of canonical text, which the vocabulary reads; Arrow's are used where they lie."""

import sys

import numpy as np

from deepfm_ops.features import cells
from deepfm_ops.features.vocabulary import native
from deepfm_ops.forks import cached

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
        missing = ~_are_valid(array) if array.null_count else None
        numbers = _values_of(array).astype(np.int64)
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


class Distinct:
    """The texts of an Arrow dictionary, and their indices once they were looked up.

    Args:
        dictionary: pyarrow Array of text.

    Attributes:
        texts: column of text; None if the dictionary holds something else.

    """

    def __init__(self, dictionary):
        self.dictionary, self._ids = dictionary, None
        found = of_arrow(dictionary)
        self.texts = found[0] if found is not None and found[1] <= {"text"} else None

    @cached
    def is_fine(self):
        """Whether every text may be a category."""
        return self.texts is not None and self.texts.first_bad() < 0

    def ids(self, vocabulary, number, unseen, threads):
        """int64 [n + 1], the indices of the texts, and 0 for what is missing."""
        known = self._ids  # one tuple: several threads may look at it
        if known is None or known[0] is not vocabulary:
            ids = np.zeros(len(self.dictionary) + 1, np.int64)
            vocabulary.find(number, self.texts, ids[:-1], None, unseen, threads)
            self._ids = known = vocabulary, ids
        return known[1]


def codes_of(column):
    """The codes of a pyarrow DictionaryArray, int [n], -1 where a cell is missing."""
    indices = column.indices
    codes = _values_of(indices)
    if not column.null_count:
        return codes
    codes = codes.copy()
    codes[~_are_valid(indices)] = -1
    return codes


def numbers_of(array):
    """A pyarrow Array of integers or float32 or float64 as float64, NaN where a number is missing; None of others.

    From its buffers: by way of NumPy pyarrow imports pandas, for a quarter of a second.
    """
    import pyarrow as pa

    kind = array.type
    if not (pa.types.is_integer(kind) or kind == pa.float32() or kind == pa.float64()):
        return None
    numbers = _values_of(array).astype(np.float64)
    if array.null_count:
        numbers[~_are_valid(array)] = np.nan
    return numbers


def _values_of(array):
    dtype = np.dtype({"halffloat": "f2", "float": "f4", "double": "f8"}.get(str(array.type), str(array.type)))
    buffer = array.buffers()[1]
    if buffer is None or not len(array):
        return np.zeros(len(array), dtype)
    return np.frombuffer(buffer, dtype, len(array), array.offset * dtype.itemsize)


def _are_valid(array):
    bits = np.frombuffer(array.buffers()[0], np.uint8)
    return np.unpackbits(bits, bitorder="little")[array.offset : array.offset + len(array)].astype(bool)
