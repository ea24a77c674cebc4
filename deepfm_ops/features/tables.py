"""Whatever holds columns: pandas, polars and pyarrow tables, dicts of arrays or lists, one record.

None of the libraries is imported here.
"""

import collections.abc
import decimal
import re

import numpy as np
import numpy.ma  # NumPy would import it when it is first asked for: inside a request

from deepfm_ops.features import cells, texts
from deepfm_ops.features.vocabulary import native

NUMBERS = (int, float, np.number, np.bool_)
PLAIN = frozenset([str, bytes, int, float, bool, type(None)])  # what most cells are


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
        prefix: of a row's place, in errors.

    Raises:
        TypeError: something that holds no columns.
        KeyError: columns that are missing.
        ValueError: columns that are not equally long, or a name of several columns.

    """

    prefix = ""

    def __init__(self, source, names, lists=(), record=True, what="column"):
        self._what = what
        names = require_columns(source, names, what)
        self._columns = {name: _column(source, name) for name in names}
        if record and isinstance(source, collections.abc.Mapping):
            self._read_record(lists)
        lengths = {name: self._length(name, column) for name, column in self._columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{what}s must be equally long, got {lengths}")
        self.num_rows = next(iter(lengths.values()), 0)

    def _read_record(self, lists):
        """Makes a column of one cell of every value, if all are plain but for lists where cells may be lists."""
        plain = [name for name, value in self._columns.items() if is_plain(value)]
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
        no_order = isinstance(column, set | frozenset | collections.abc.Mapping)
        if is_plain(column) or no_order or not hasattr(column, "__len__"):
            raise ValueError(
                f"{self._what} {name!r} must be a list or an array with an entry per row, got {type(column).__name__}"
                + (" (of a DataFrame, pass itself, or to_dict('list'))" if isinstance(column, dict) else "")
            )
        return len(column)

    def array(self, name, lists=False):
        """The column as an array of numbers of any shape; None where it has to be read cell by cell.

        Args:
            name: of the column.
            lists: whether a list is one of lists that may be shorter.

        """
        column = self._columns[name]
        if _is_sparse(column) or hasattr(column, "nrows") or isinstance(column, np.ma.MaskedArray):
            return None
        if isinstance(column, list | tuple) and (lists or not _all_numbers(column)):
            return None  # NumPy would make text of numbers among texts, each as long as the longest
        try:
            array = _array(column)
        except ValueError:  # lists of different lengths
            return None
        return array if array.dtype.kind in "iufb" else None

    def objects(self, name):
        """The column as a list of Python objects: cells, or lists of cells."""
        return objects(self._columns[name])

    def cells(self, name):
        """The column as a list of cells; [B, 1] counts as [B].

        Raises:
            ValueError: an array of another shape.

        """
        column = self._columns[name]
        shape = getattr(column, "shape", None)
        if shape is not None and not _is_sparse(column) and len(shape) > 1:
            array = _array(column)
            if array.size != len(array):
                raise ValueError(f"{self._what} {name!r} must be one column of values, got shape {array.shape}")
            column = array.reshape(-1)
        return objects(column)

    def numbers(self, name):
        """The column as float64: NaN where a cell is missing, infinite where it is NaT or larger than float64 holds.

        Raises:
            TypeError: a cell that is no number, by row.
            ValueError: an array of another shape.

        """
        array = self.array(name)
        if array is not None and array.ndim >= 1 and array.size == len(array):
            return array.astype(np.float64).reshape(-1)
        found = self.cells(name)
        return np.array(
            [number(cell, self._what, name, row, self.prefix) for row, cell in enumerate(found)], np.float64
        )

    def place(self, row):
        """Where a row is, for errors."""
        return f"{self.prefix}row {row}"

    def coded(self, name):
        """(codes, -1 where a cell is missing; `texts.Distinct`) of a pyarrow dictionary of text; None of others."""
        column = self._columns[name]
        if not hasattr(column, "combine_chunks") and not hasattr(column, "indices"):
            return None
        import pyarrow as pa

        if not pa.types.is_dictionary(column.type):
            return None
        if isinstance(column, pa.ChunkedArray):
            column = column.unify_dictionaries().combine_chunks()
        distinct = texts.Distinct(column.dictionary)
        return None if distinct.texts is None else (texts.codes_of(column), distinct)

    def texts(self, name, strict=True):
        """(the column as a column of canonical texts, what kinds of categories they are).

        Args:
            name: of the column.
            strict: whether a cell that cannot be a category is an error; else it is a text that nothing has.

        """
        column = self._columns[name]
        arrow = texts.as_arrow(column)
        if arrow is not None:
            array = arrow.combine_chunks() if hasattr(arrow, "combine_chunks") else arrow
            found = texts.of_arrow(array)
            if found is not None:
                return found
        # Of a list of numbers and booleans NumPy would make numbers.
        is_list = isinstance(column, list | tuple) and set(map(type, column)) != {int}
        array = None if is_list else self.array(name)
        if array is not None and array.size == len(array):
            found = texts.of_array(array.reshape(-1))
            if found is not None:
                return found
        return texts.of_cells(self.cells(name), name, strict)

    def pieces(self, name, separator, weighted=False, strict=True):
        """The column's entries: (row_splits, their values one after the other as texts, weights or None, kinds).

        Args:
            name: of the column.
            separator: text, None for blanks.
            weighted: whether values carry weights, "drama:0.7".
            strict: as for `texts`.

        Raises:
            TypeError: an entry that is neither a list nor text, by row.
            ValueError: a weight that is no number, by row.

        """
        found = self.objects(name)
        if set(map(type, found)) <= {str, type(None)}:
            return split_entries(self, name, native.Column.of_list(found), separator, weighted)
        entries = self.entries(name, separator)
        splits = np.concatenate([[0], np.cumsum([len(entry) for entry in entries], dtype=np.int64)])
        values, kinds = texts.of_cells([value for entry in entries for value in entry], name, strict)
        if weighted:
            row_of = np.repeat(np.arange(len(entries)), np.diff(splits))
            per_value, values, weights, _ = split_entries(self, name, values, "\0", True, row_of)
            splits = per_value[splits]
            return splits.astype(np.int64), values, weights, kinds
        return splits.astype(np.int64), values, None, kinds

    def entries(self, name, separator):
        """The column as lists of cells: text is split at the separator, missing cells are left out.

        Raises:
            TypeError: an entry that is neither a list nor text, by row.

        """
        found = []
        for row, cell in enumerate(self.objects(name)):
            if isinstance(cell, bytes):
                cell = cells.category(cell, name)
            if isinstance(cell, str):
                entry = [value for value in cell.split(separator) if value]
            else:
                entry = flat(cell)
            if entry is None:
                if not cells.is_missing(cell):
                    raise TypeError(
                        f"column {name!r}: an entry must be a list or a string, got {cell!r} in {self.place(row)}"
                    )
                entry = []
            found.append([value for value in entry if not cells.is_missing(value)])
        return found


class BadWeights(ValueError):
    """An entry of a multi-valued column has a weight that is no number.

    Attributes:
        what: is wrong.
        rows: function that gives all rows of such entries.

    """

    def __init__(self, place, what, rows):
        super().__init__(f"{place}: {what}")
        self.what, self.rows = what, rows


def split_entries(table, name, column, separator, weighted, row_of=None):
    """`Table.pieces` of a column of text; `row_of` are the rows of its cells, if these are values of entries."""
    mark = "" if separator is None else separator
    row_splits, pieces, weights, bad = column.split(mark, weighted)
    if bad >= 0:

        def rows():
            given = [column[i] for i in range(len(column))]
            found = [native.Column.of_list([text]).split(mark, True)[3] >= 0 for text in given]
            return np.unique(np.flatnonzero(found) if row_of is None else row_of[np.flatnonzero(found)]).tolist()

        pair = "value:weight"
        what = f"{column[bad]!r} has a weight that is no number; an entry is '{pair}{separator or ' '}{pair}'"
        row = bad if row_of is None else int(row_of[bad])
        raise BadWeights(f"column {name!r}, {table.place(row)}", what, rows)
    return row_splits, pieces, weights, {"text"}


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
        + ("; of records, pass pandas.DataFrame(records)" if isinstance(source, list) else "")
    )


def require_columns(source, names, what="column"):
    """The names as a list, once the table is known to have them; else a KeyError, or a TypeError for no table."""
    names, known = list(names), column_names(source)
    missing = [name for name in names if name not in known]
    if missing and what == "input":
        raise KeyError(f"inputs are missing {missing}; got {sorted(map(str, known))}")
    if missing:
        raise KeyError(f"column {missing[0]!r} is missing; the table has {known}")
    return names


def is_table(source):
    """Whether it holds columns, by name."""
    if type(source).__name__ == "LazyFrame":  # it will, and `column_names` says how
        return True
    try:
        column_names(source)
    except TypeError:
        return False
    return True


def objects(column):
    """A column of any kind as a list of Python objects, cells or lists of cells.

    Narrow floats and times stay NumPy's: they know their own digits, and would become something else.
    """
    if isinstance(column, list | tuple):
        return list(column)
    if _is_sparse(column):
        rows = [[] for _ in range(int(column.dense_shape[0]))]
        for (row, *_), value in zip(np.asarray(column.indices).tolist(), objects(column.values), strict=True):
            rows[row].append(value)
        return rows
    if hasattr(column, "nrows"):  # tf.RaggedTensor
        values, splits = objects(column.values), np.asarray(column.row_splits).tolist()
        return [values[start:end] for start, end in zip(splits[:-1], splits[1:], strict=True)]
    if isinstance(column, np.ma.MaskedArray):
        masks = np.ma.getmaskarray(column).reshape(-1)
        cells_of = [None if mask else cell for mask, cell in zip(masks, objects(column.data.reshape(-1)), strict=True)]
        return cells_of if column.ndim == 1 else np.array(cells_of, object).reshape(column.shape).tolist()
    if hasattr(column, "to_pylist") or hasattr(column, "to_list"):
        found = column.to_pylist() if hasattr(column, "to_pylist") else column.to_list()
        narrow = _narrow_type(column)
        return found if narrow is None else _as_narrow(found, narrow)
    array = _array(column)
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    if array.dtype.kind in "mM" or (array.dtype.kind == "f" and array.itemsize < 8):
        return list(array) if array.ndim <= 1 else [objects(row) for row in array]
    return array.tolist()


def flat(cell):
    """The cells of a list of any kind and depth; None for a cell."""
    if type(cell) in PLAIN or isinstance(cell, np.generic | collections.abc.Mapping):
        return None
    if not isinstance(cell, list | tuple | set | frozenset):
        if not (hasattr(cell, "to_list") or hasattr(cell, "to_pylist") or getattr(cell, "ndim", 0)):
            return None
        cell = objects(cell)
    found = []
    for value in cell:
        inner = flat(value)
        if inner is None:
            found.append(value)
        else:
            found += inner
    return found


def number(cell, what, name, row, prefix=""):
    """A cell as a float: NaN where it is missing, infinite for NaT, which marks no missing number, and huge integers.

    Raises TypeError for a cell that is no number, with its place.
    """
    is_time = type(cell).__name__ == "NaTType" or isinstance(cell, np.datetime64 | np.timedelta64)
    if cells.is_missing(cell):
        return np.inf if is_time else np.nan
    try:
        if not is_time and isinstance(cell, (str, bytes, decimal.Decimal, *NUMBERS)):
            return float(cell)
    except OverflowError:
        return np.inf
    except ValueError:
        pass
    dtype = f"dtype {np.asarray(cell).dtype}: " if what == "input" else ""
    raise TypeError(f"{what} {name!r} must hold numbers, got {dtype}{cell!r} in {prefix}row {row}")


def _column(source, name):
    column = source[name]
    if hasattr(column, "columns"):  # pandas gives a table for a name of several columns
        raise ValueError(f"column {name!r} must be one column of values, got shape {column.shape}")
    return column


def is_plain(value):
    """Whether a value is a cell: not a column, nor a list."""
    if type(value) is list:  # what most columns of a request are
        return False
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


def _narrow_type(column):
    """NumPy's type of the floats of less than 64 bits that a column of pandas, polars or pyarrow holds, or None."""
    dtype = getattr(column, "dtype", None)
    dtype = dtype if dtype is not None else getattr(column, "type", "")
    dtype = getattr(getattr(dtype, "categories", None), "dtype", dtype)  # pandas's categories
    if re.search(r"float16|halffloat", str(dtype), re.IGNORECASE):
        return np.float16
    # pyarrow calls float64 double.
    return np.float32 if re.search(r"float32|\bfloat\b(?!64)", str(dtype), re.IGNORECASE) else None


def _as_narrow(values, narrow):
    if isinstance(values, list | np.ndarray):
        return [_as_narrow(value, narrow) for value in values]
    return narrow(values) if isinstance(values, float) else values
