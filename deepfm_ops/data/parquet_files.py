"""Parquet files in pieces: their row groups, in chunks of so many rows."""

import contextlib

import numpy as np

from deepfm_ops.data.files import COMPRESSED, pyarrow, suffix
from deepfm_ops.data.records import BadRecord, bad_entries, bad_numbers, bad_texts
from deepfm_ops.features import texts as texts_
from deepfm_ops.features.tables import Table, split_entries
from deepfm_ops.features.texts import Distinct

ROWS = 1 << 15


def pieces(reading):
    """The row groups of the Parquet files of a `sources.Reading`, in order."""
    pa = pyarrow()
    for path in reading.files.paths:
        try:
            with _opened(reading.files, path) as file:
                rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                schema = file.schema_arrow
        except (OSError, pa.ArrowException) as error:
            reading.bad(f"{path} is no whole Parquet file: {error}")
            continue
        for name, kind in reading.needs.items():
            if name not in schema.names:
                raise KeyError(f"{path}: column {name!r} is missing; it has {schema.names}")
            if schema.names.count(name) > 1:
                raise ValueError(f"{path}: column {name!r} is there more than once")
            found = schema.field(name).type
            if not _can_be(pa, found, kind):
                raise BadRecord(f"{path}: column {name!r} must hold {_KINDS[kind]}, it holds {found}")
        for group, count in enumerate(rows):
            if count:
                yield _RowGroup(reading, path, group, count)


@contextlib.contextmanager
def _opened(files, path, **options):
    """A Parquet file; one that is compressed as a whole is unpacked in memory."""
    pa = pyarrow()
    if suffix(path) in COMPRESSED:
        with files.stream(path) as stream:
            source = pa.BufferReader(stream.read())
    else:
        source = files.system.open_input_file(path)
    with source, pa.parquet.ParquetFile(source, page_checksum_verification=True, **options) as file:
        yield file


_KINDS = {
    "text": "text or numbers",
    "entries": "lists of text or numbers, or text",
    "numbers": "numbers",
    "label": "numbers",
}


def _can_be(pa, found, kind):
    """Whether a column of such a type can be read as one of a kind."""
    if kind == "entries" and _is_list(pa, found):
        while _is_list(pa, found):
            found = found.value_type
        return _can_be(pa, found, "text")
    if pa.types.is_dictionary(found):
        found = found.value_type
    if pa.types.is_null(found) or _is_text(pa, found):
        return True
    names = ("integer", "floating", "decimal", "boolean")
    return kind != "entries" and any(getattr(pa.types, f"is_{name}")(found) for name in names)


def _is_list(pa, found):
    return pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found)


def _is_text(pa, found):
    names = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return any(getattr(pa.types, f"is_{name}")(found) for name in names)


class _RowGroup:
    def __init__(self, reading, path, group, rows):
        self._reading, self._path, self._group, self._rows = reading, path, group, rows

    def chunks(self):
        pa, needs, first = pyarrow(), self._reading.needs, 0
        texts = [name for name, kind in needs.items() if kind == "text"] if self._reading.dictionaries else None
        try:
            with _opened(self._reading.files, self._path, read_dictionary=texts) as file:
                options = {"row_groups": [self._group], "columns": list(needs), "use_threads": False}
                coded = {}
                for batch in file.iter_batches(ROWS, **options):
                    # A row group's dictionary comes with every batch: its texts are looked up once.
                    columns = {name: batch.column(name) for name in texts or ()}
                    columns = {name: x for name, x in columns.items() if pa.types.is_dictionary(x.type)}
                    coded = {name: _same(coded.get(name), x.dictionary) for name, x in columns.items()}
                    yield self._chunk(batch, first, coded)
                    first += batch.num_rows
        except (OSError, pa.ArrowException) as error:
            what = f"{self._path}, row group {self._group}, row {first} on: it is damaged: {error}"
            self._reading.bad(what, self._rows - first)

    def _chunk(self, batch, first, coded):
        where = f"{self._path}, row group {self._group}, row "
        rows = range(first, first + len(batch))
        return lambda: self._reading.validated(FileTable(self._reading, batch, where, rows, coded))


def _same(before, dictionary):
    """The `Distinct` of a dictionary: the one before, if it has the same texts."""
    if before is not None and len(before.dictionary) == len(dictionary) and before.dictionary.equals(dictionary):
        return before
    return Distinct(dictionary)


class FileTable(Table):
    """Rows of a Parquet file.

    Args:
        reading: `sources.Reading`.
        batch: pyarrow RecordBatch.
        where: of the rows, for errors.
        rows: their numbers.
        distinct: {column: `Distinct`} of its dictionaries.

    """

    def __init__(self, reading, batch, where, rows, distinct):
        super().__init__(batch, reading.needs, record=False)
        self._reading, self._batch, self._where, self._rows = reading, batch, where, rows
        self._distinct, self._numbers, self._pieces = distinct, {}, {}

    def place(self, row):
        """Where a row is, for errors: in its row group."""
        return f"{self._where}{self._rows[row]}"

    def without(self, rows):
        """The table without some of its rows, [num_rows] bool."""
        kept = np.asarray(self._rows)[~rows].tolist()
        batch = self._batch.filter(pyarrow().array(~rows))
        return FileTable(self._reading, batch, self._where, kept, self._distinct)

    def coded(self, name):
        """As `Table.coded`; the dictionary's texts are those of other chunks, too."""
        column = self._columns[name]
        if name not in self._distinct or self._distinct[name].texts is None:
            return super().coded(name)
        return texts_.codes_of(column), self._distinct[name]

    def spelled(self, name):
        """(the column as float64, NaN where a cell is missing or no number; whether one is none); text is read."""
        if name not in self._numbers:
            pa, column = pyarrow(), self._decoded(name)
            if (
                pa.types.is_integer(column.type)
                or pa.types.is_floating(column.type)
                or pa.types.is_boolean(column.type)
            ):
                self._numbers[name] = super().numbers(name), False
            elif pa.types.is_decimal(column.type) or pa.types.is_null(column.type):
                self._numbers[name] = np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False)), False
            else:
                texts = texts_.of_arrow(column, empty_is_missing=True)
                assert texts is not None  # the types were looked at before
                numbers, first = texts[0].numbers()
                self._numbers[name] = numbers, first >= 0
        return self._numbers[name]

    def numbers(self, name):
        """As `Table.numbers`."""
        return self.spelled(name)[0]

    def cells(self, name):
        """As `Table.cells`; bytes are text, whatever they are."""
        found = texts_.of_arrow(self._decoded(name))
        if found is None or found[1] != {"text"}:
            return super().cells(name)
        cells = [found[0][row] for row in range(self.num_rows)]
        return [None if cell is None else cell.decode("utf-8", "replace") for cell in cells]

    def pieces(self, name, separator, weighted=False, strict=True):
        """As `Table.pieces`, with the text of lists where it lies."""
        if name not in self._pieces:
            values, rows = self._values(name)
            if rows is not None and values.null_count:
                rows, values = rows[np.asarray(values.is_valid())], values.drop_null()
            found = texts_.of_arrow(values)
            if found is None:
                self._pieces[name] = super().pieces(name, separator, weighted, strict)
            elif rows is None:
                self._pieces[name] = split_entries(self, name, found[0], separator, weighted)
            else:
                splits, weights, texts = np.searchsorted(rows, np.arange(self.num_rows + 1)), None, found[0]
                if weighted:
                    per_value, texts, weights, _ = split_entries(self, name, texts, "\0", True, rows)
                    splits = per_value[splits]
                self._pieces[name] = splits, texts, weights, found[1]
        return self._pieces[name]

    def _decoded(self, name):
        column = self._columns[name]
        return column.dictionary_decode() if pyarrow().types.is_dictionary(column.type) else column

    def bad_rows(self, name, kind, nonfinite):
        """(rows, function that says what is wrong with one) of what cannot be used in a column, or None."""
        if kind in ("numbers", "label"):
            return bad_numbers(self, name, kind, nonfinite, self._reading.labels)
        coded = self.coded(name) if kind == "text" else None
        if coded is not None and coded[1].is_fine:
            return None
        values, rows = self._values(name)
        found = texts_.of_arrow(values)
        bad = None if found is None or kind == "entries" and rows is None else bad_texts(found[0], rows)
        return bad_entries(self, name, *self._reading.entries[name]) if bad is None and kind == "entries" else bad

    def _values(self, name):
        """(the values of the column's lists, their rows), or (the column, None)."""
        pa, values, rows = pyarrow(), self._decoded(name), None
        while _is_list(pa, values.type):
            here = np.asarray(pa.compute.list_parent_indices(values))
            rows, values = here if rows is None else rows[here], pa.compute.list_flatten(values)
        return (values.dictionary_decode() if pa.types.is_dictionary(values.type) else values), rows
