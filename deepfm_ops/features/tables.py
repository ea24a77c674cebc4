"""Whatever holds columns: pandas, polars and pyarrow tables, dicts of arrays or lists, one record.

None of the libraries is imported here.

A column is read as cells (Python objects), as numbers, or as lists of cells.
"""

import collections.abc
import decimal

import numpy as np

from deepfm_ops.features import cells

NUMBERS = (int, float, np.number, np.bool_)
NARROW = ("float32", "float16", "Float32", "float", "halffloat", "float[pyarrow]", "halffloat[pyarrow]", "bfloat16")


class Table:
    """The columns of a table of any library.

    Args:
        source: a pandas or polars DataFrame, a pyarrow Table or RecordBatch, a NumPy array with fields, or a dict of
            equally long arrays, lists or tensors.
        names: of the columns that are needed.
        lists: those of them whose cells may be lists.
        record: whether a dict of plain values, one for each of the columns, is a table of one row.
        what: the errors' word for a column.

    Attributes:
        num_rows: int.

    Raises:
        TypeError: something that holds no columns.
        KeyError: a column that is missing.
        ValueError: columns that are not equally long, or a name of several columns.

    """

    def __init__(self, source, names, lists=(), record=True, what="column"):
        self._what = what
        names, known = list(names), column_names(source)
        missing = [name for name in names if name not in known]
        if missing and what == "input":
            raise KeyError(f"inputs are missing {missing}; got {sorted(map(str, known))}")
        if missing:
            raise KeyError(f"column {missing[0]!r} is missing; the table has {known}")
        self._columns = {name: _column(source, name) for name in names}
        if record and isinstance(source, collections.abc.Mapping):
            self._read_record(lists)
        lengths = {name: self._length(name, column) for name, column in self._columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{what}s must be equally long, got {lengths}")
        self.num_rows = next(iter(lengths.values()), 0)

    def _read_record(self, lists):
        """Makes a column of one cell of every value, if all are plain but for lists where cells may be lists."""
        plain = [name for name, value in self._columns.items() if _is_plain(value)]
        others = [name for name in self._columns if name not in plain and name not in lists]
        if plain and others:
            raise ValueError(
                f"{self._what} {plain[0]!r} must be a list or an array with an entry per row, as {others[0]!r} is; or "
                "every one a single value, for one row"
            )
        if plain:
            self._columns = {name: [value] for name, value in self._columns.items()}

    def _length(self, name, column):
        if _is_sparse(column):
            return int(column.dense_shape[0])
        if hasattr(column, "nrows"):  # tf.RaggedTensor
            return int(column.nrows())
        if _is_plain(column) or isinstance(column, set | frozenset) or not hasattr(column, "__len__"):
            raise ValueError(
                f"{self._what} {name!r} must be a list or an array with an entry per row, got {type(column).__name__}"
            )
        return len(column)

    def array(self, name, lists=False):
        """The column as an array of numbers of any shape, None where it has to be read cell by cell."""
        column = self._columns[name]
        if _is_sparse(column) or hasattr(column, "nrows"):
            return None
        if isinstance(column, list | tuple) and (lists or not _all_numbers(column)):
            return None  # NumPy would make text of numbers among texts, each as long as the longest
        try:
            array = _array(column)
        except ValueError:  # lists of different lengths
            return None
        return array if array.dtype.kind in "iufb" else None

    def samples(self, name):
        """The column as an iterable of Python objects, which may be lists of any kind."""
        return _lists(self._columns[name])

    def cells(self, name):
        """The column as a list of Python objects, narrow floats as NumPy's, which know their own digits."""
        return _cells(name, self._columns[name])

    def numbers(self, name):
        """The column as float64, NaN where a cell is missing, infinite where it holds no number of that size.

        Raises:
            TypeError: a cell that is no number, by row.

        """
        column = self._columns[name]
        if isinstance(column, list | tuple):
            array = None
        elif _is_flat(array := _array(column)) and array.dtype.kind in "iufb":
            return array.astype(np.float64).reshape(-1)
        if array is not None and array.dtype.name == "bfloat16":
            return array.astype(np.float64).reshape(-1)
        found = _cells(name, column)
        numbers = np.empty(len(found))
        for row, cell in enumerate(found):
            numbers[row] = _number(cell, name, row)
        return numbers

    def entries(self, name, separator):
        """The column as lists of categories: text is split at the separator, missing cells are left out.

        Raises:
            TypeError: an entry that is neither a list nor text, by row.

        """
        found = []
        for row, cell in enumerate(_lists(self._columns[name])):
            if isinstance(cell, bytes):
                cell = cells.category(cell, name)
            if isinstance(cell, str):
                cell = [value for value in cell.split(separator) if value]
            elif hasattr(cell, "tolist"):  # NumPy's arrays, and pandas's
                cell = cell.tolist()
            elif hasattr(cell, "to_list"):
                cell = cell.to_list()
            if not isinstance(cell, list | tuple | set | frozenset):
                if not cells.is_missing(cell):
                    raise TypeError(f"column {name!r}: an entry must be a list or a string, got {cell!r} in row {row}")
                cell = []
            found.append([value for value in cell if not cells.is_missing(value)])
        return found


def column_names(source):
    """The names of a table's columns.

    Raises:
        TypeError: something that is no table, by its type, with what to pass.

    """
    if type(source).__name__ == "LazyFrame":
        raise TypeError("a LazyFrame has no rows yet: pass .collect() of it")
    if hasattr(source, "column_names"):  # pyarrow
        return list(source.column_names)
    if getattr(getattr(source, "dtype", None), "names", None):
        return list(source.dtype.names)
    if isinstance(source, collections.abc.Mapping):
        return list(source)
    if hasattr(source, "columns") and hasattr(source, "__getitem__"):
        return list(source.columns)
    raise TypeError(
        "a table must be a pandas or polars DataFrame, a pyarrow Table, or a dict of columns, "
        f"got {type(source).__name__}"
    )


def is_table(source):
    """Whether it holds columns, by name."""
    if type(source).__name__ == "LazyFrame":  # it will, and `column_names` says how
        return True
    try:
        column_names(source)
    except TypeError:
        return False
    return True


def _column(source, name):
    column = source[name]
    if hasattr(column, "columns"):  # pandas gives a table for a name of several columns
        raise ValueError(f"column {name!r} must be one column of values, got shape {column.shape}")
    return column


def _is_plain(value):
    """Whether a value is a cell: not a column, nor a list."""
    if isinstance(value, str | bytes | int | float | bool | np.generic | decimal.Decimal) or cells.is_missing(value):
        return True
    return getattr(value, "shape", None) == () or type(value).__name__ in ("Timestamp", "datetime", "date")


def _all_numbers(values):
    """Whether a list, of lists maybe, holds numbers alone."""
    return all(_all_numbers(x) if isinstance(x, list | tuple) else isinstance(x, NUMBERS) for x in values)


def _is_sparse(column):
    """Whether it is a tf.SparseTensor [B, n]."""
    return hasattr(column, "dense_shape") and hasattr(column, "indices")


def _array(column):
    """The column as a NumPy array, as its library makes one."""
    if hasattr(column, "numpy") and not hasattr(column, "to_numpy"):  # tensors
        column = column.numpy()
    return np.asarray(column)


def _is_flat(array):
    """Whether the array is [B], or [B, 1], which is the same to a column of cells."""
    return array.ndim >= 1 and array.size == len(array)


def _cells(name, column):
    if isinstance(column, list | tuple):
        return list(column)
    dtype = str(getattr(column, "dtype", None) or getattr(column, "type", None))
    if dtype in NARROW or not (hasattr(column, "to_pylist") or hasattr(column, "to_list")):
        array = _array(column)
        if array.ndim == 0 or not _is_flat(array):
            raise ValueError(f"column {name!r} must be one column of values, got shape {array.shape}")
        array = array.reshape(-1)
        # Of narrow floats and of times NumPy's lists would hold something else.
        return list(array) if array.dtype.kind in "fmMV" else array.tolist()
    return column.to_pylist() if hasattr(column, "to_pylist") else column.to_list()


def _lists(column):
    """The column's cells, which may be lists of any kind."""
    if _is_sparse(column):
        rows = [[] for _ in range(int(column.dense_shape[0]))]
        for (row, *_), value in zip(np.asarray(column.indices).tolist(), _array(column.values).tolist(), strict=True):
            rows[row].append(value)
        return rows
    if str(getattr(column, "dtype", None)) in NARROW:
        return _array(column)
    if hasattr(column, "to_pylist"):
        return column.to_pylist()
    if hasattr(column, "to_list"):
        return column.to_list()
    return column.numpy() if hasattr(column, "numpy") else column


def _number(cell, name, row):
    if cells.is_missing(cell):
        is_time = type(cell).__name__ == "NaTType" or isinstance(cell, np.datetime64 | np.timedelta64)
        return np.inf if is_time else np.nan  # NaT is not the mark of a missing number
    try:
        if isinstance(cell, str | bytes | int | float | np.number | np.bool_ | decimal.Decimal):
            return float(cell)
    except OverflowError:
        return np.inf
    except ValueError:
        pass
    raise TypeError(f"column {name!r} must hold numbers, got {cell!r} in row {row}")
