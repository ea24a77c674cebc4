"""Parquet files in pieces: their row groups, in chunks of so many rows."""

import numpy as np

from deepfm_ops.data.files import pyarrow
from deepfm_ops.data.records import BadRecord, bad_numbers
from deepfm_ops.features import texts as texts_
from deepfm_ops.features.tables import Table
from deepfm_ops.features.texts import Distinct

ROWS = 1 << 15


def pieces(reading):
    """The row groups of the Parquet files of a `sources.Reading`, in order."""
    pa = pyarrow()
    for path in reading.files.paths:
        try:
            with pa.parquet.ParquetFile(reading.files.system.open_input_file(path)) as file:
                rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                names = file.schema_arrow.names
        except (OSError, pa.ArrowInvalid) as error:
            raise BadRecord(f"{path} is no whole Parquet file: {error}") from None
        missing = [name for name in reading.needs if name not in names]
        if missing:
            raise KeyError(f"{path}: column {missing[0]!r} is missing; it has {names}")
        for group, count in enumerate(rows):
            if count:
                yield _RowGroup(reading, path, group)


class _RowGroup:
    def __init__(self, reading, path, group):
        self._reading, self._path, self._group = reading, path, group

    def chunks(self):
        pa, needs = pyarrow(), self._reading.needs
        texts = [name for name, kind in needs.items() if kind == "text"] if self._reading.dictionaries else None
        try:
            source = self._reading.files.system.open_input_file(self._path)
            with pa.parquet.ParquetFile(source, read_dictionary=texts) as file:
                options = {"row_groups": [self._group], "columns": list(needs), "use_threads": False}
                first, coded = 0, {}
                for batch in file.iter_batches(ROWS, **options):
                    # A row group's dictionary comes with every batch: its texts are looked up once.
                    columns = {name: batch.column(name) for name in texts or ()}
                    columns = {name: x for name, x in columns.items() if pa.types.is_dictionary(x.type)}
                    coded = {name: _same(coded.get(name), x.dictionary) for name, x in columns.items()}
                    yield self._chunk(batch, first, coded)
                    first += batch.num_rows
        except (OSError, pa.ArrowInvalid) as error:
            raise BadRecord(f"{self._path}, row group {self._group}: it is damaged: {error}") from None

    def _chunk(self, batch, first, coded):
        where = f"{self._path}, row group {self._group}, row "
        return lambda: self._reading.validated(
            FileTable(batch, self._reading.needs, where, range(first, first + len(batch)), coded)
        )


def _same(before, dictionary):
    """The `Distinct` of a dictionary: the one before, if it has the same texts."""
    if before is not None and len(before.dictionary) == len(dictionary) and before.dictionary.equals(dictionary):
        return before
    return Distinct(dictionary)


class FileTable(Table):
    """Rows of a Parquet file.

    Args:
        batch: pyarrow RecordBatch.
        needs: {column: "text", "entries", "numbers" or "label"}.
        where: of the rows, for errors.
        rows: their numbers.
        distinct: {column: `Distinct`} of its dictionaries.

    """

    def __init__(self, batch, needs, where, rows, distinct):
        super().__init__(batch, needs, record=False)
        self._distinct = distinct
        self._batch, self._needs, self._where, self._rows, self._numbers = batch, needs, where, rows, {}

    def place(self, row):
        """Where a row is, for errors: in its row group."""
        return f"{self._where}{self._rows[row]}"

    def without(self, rows):
        """The table without some of its rows, [num_rows] bool."""
        kept = np.asarray(self._rows)[~rows].tolist()
        batch = self._batch.filter(pyarrow().array(~rows))
        return FileTable(batch, self._needs, self._where, kept, self._distinct)

    def coded(self, name):
        """As `Table.coded`; the dictionary's texts are those of other chunks, too."""
        column = self._columns[name]
        if name not in self._distinct or self._distinct[name].texts is None:
            return super().coded(name)
        return texts_.codes_of(column), self._distinct[name]

    def spelled(self, name):
        """(the column as float64, NaN where a cell is missing or no number; whether one is none); text is read."""
        if name not in self._numbers:
            pa, column = pyarrow(), self._columns[name]
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            if (
                pa.types.is_integer(column.type)
                or pa.types.is_floating(column.type)
                or pa.types.is_boolean(column.type)
            ):
                self._numbers[name] = super().numbers(name), False
            elif pa.types.is_decimal(column.type) or pa.types.is_null(column.type):
                self._numbers[name] = np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False)), False
            else:
                found = texts_.of_arrow(column, empty_is_missing=True)
                if found is None:
                    raise BadRecord(
                        f"{self.place(0)} on, column {name!r}: it must hold numbers, it holds {column.type}"
                    )
                numbers, first = found[0].numbers()
                self._numbers[name] = numbers, first >= 0
        return self._numbers[name]

    def numbers(self, name):
        """As `Table.numbers`."""
        return self.spelled(name)[0]

    def bad_rows(self, name, kind, nonfinite):
        """(rows, function that says what is wrong with one) of what cannot be used in a column, or None."""
        return bad_numbers(self, name, kind, nonfinite) if kind in ("numbers", "label") else None
