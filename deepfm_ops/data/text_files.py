"""Text files (CSV, TSV) in pieces; pyarrow splits their lines, and every cell is read as bytes.

A piece is a range of bytes, or the whole of a compressed file, which has to be read from its beginning. Values with
line breaks within are not supported: a line is a record.
"""

import copy
import csv
import dataclasses

import numpy as np

from deepfm_ops.data.files import COMPRESSED, CRITEO, pyarrow, suffix
from deepfm_ops.data.records import BadRecord, bad_numbers, shown
from deepfm_ops.features import texts as texts_
from deepfm_ops.features.tables import split_entries
from deepfm_ops.features.vocabulary import native

PIECE = 1 << 22  # bytes
BLOCK = 1 << 20  # bytes that pyarrow splits at a time: they stay in the cache
BOM, BREAK = b"\xef\xbb\xbf", b"\n"


def pieces(reading):
    """The pieces of the text files of a `sources.Reading`, in order."""
    for path, size in zip(reading.files.paths, reading.files.sizes(), strict=True):
        if not size:
            raise BadRecord(f"{path} is empty")
        if suffix(path) in COMPRESSED:
            yield _Compressed(reading, path)
        else:
            for start in range(0, size, PIECE):
                yield _Range(reading, path, start, start + PIECE)


class _Range:
    """The lines of a text file that start at the bytes [start, end)."""

    def __init__(self, reading, path, start, end):
        self._reading, self._path, self._start, self._end = reading, path, start, end

    def chunks(self):
        # The byte before says whether a line starts with the first one.
        first = max(0, self._start - 1)
        with self._reading.files.system.open_input_file(self._path) as file:
            file.seek(first)
            content = file.read(self._end - first)
            if self._start:
                begin = content.find(b"\n") + 1
                if not begin:
                    return
                first, content = first + begin, content[begin:]
            while content and not content.endswith(b"\n"):
                more = file.read(BLOCK)
                end = more.find(b"\n") + 1
                content += more[:end] if end else more
                if not more or end:
                    break
        if content:
            yield lambda: _table(self._reading, self._path, content, first == 0, lambda: self._lines_before(first))

    def _lines_before(self, byte):
        """Counted only where an error needs it."""
        count = 0
        with self._reading.files.system.open_input_file(self._path) as file:
            while byte > 0:
                block = file.read(min(byte, 1 << 24))
                count, byte = count + block.count(b"\n"), byte - len(block)
        return count


class _Compressed:
    """The lines of a compressed text file, in chunks that can be read one after the other only."""

    def __init__(self, reading, path):
        self._reading, self._path = reading, path

    def chunks(self):
        rest, before = b"", 0
        with self._reading.files.stream(self._path) as stream:
            more = b"more"
            while more:
                try:
                    more = stream.read(PIECE)
                except OSError as error:
                    what = f"it is damaged or cut off: {error}"
                    raise BadRecord(f"{self._path}, after line {before + rest.count(BREAK)}: {what}") from None
                end = more.rfind(b"\n") + 1
                content, rest = (rest + more[:end], more[end:]) if end or not more else (b"", rest + more)
                if content:
                    yield self._chunk(content, before)
                    before += content.count(b"\n")

    def _chunk(self, content, before):
        return lambda: _table(self._reading, self._path, content, before == 0, lambda: before)


@dataclasses.dataclass
class Form:
    """How the columns of a text file are laid out."""

    names: list
    has_header: bool
    delimiter: str


def form_of(files, path, needs):
    """The columns of a text file, from its first line and what is asked for."""
    first_line = _first_line(files, path)
    found = next(csv.reader([first_line], delimiter=files.delimiter), [])
    shown = f"{found[:8]}{' ...' if len(found) > 8 else ''}"
    if files.names is not None:
        if len(files.names) != len(found):
            raise ValueError(
                f"{path}, line 1: {len(files.names)} names are given, but it has {len(found)} columns: {shown}"
            )
        names, has_header = list(files.names), False
    elif all(isinstance(name, int) for name in needs):
        names, has_header = list(range(len(found))), False
    elif len(found) == len(CRITEO) and all(name in CRITEO for name in needs) and not set(needs) & set(found):
        names, has_header = CRITEO, False
    else:
        names, has_header = found, True
    repeated = [name for name in needs if names.count(name) > 1]
    missing = [name for name in needs if name not in names]
    if repeated:
        raise ValueError(f"{path}: column {repeated[0]!r} is there more than once")
    if missing:
        how = " (of a file without a header give data.files(path, names=[...]), or ask for columns by number)"
        raise KeyError(f"{path}: column {missing[0]!r} is missing; it has {shown}{how if has_header else ''}")
    return Form(names, has_header, files.delimiter)


def _first_line(files, path):
    line = b""
    try:
        with files.stream(path) as stream:
            while BREAK not in line and len(line) < PIECE:
                more = stream.read(1 << 16)
                if not more:
                    break
                line += more
    except OSError as error:
        raise BadRecord(f"{path}, line 1: it is damaged or cut off: {error}") from None
    if not line.strip():
        raise BadRecord(f"{path} is empty")
    return line.split(b"\n")[0].removeprefix(BOM).rstrip(b"\r").decode("utf-8", "replace")


def _table(reading, path, content, is_first, lines_before):
    """The table of some lines of a file, or None if there is no record in them."""
    form, skipped = reading.form(path), 0
    if is_first:
        content = content.removeprefix(BOM)
        if form.has_header:
            _, _, content = content.partition(b"\n")
            skipped = 1
    if not content.strip(b"\r\n"):
        return None
    return reading.validated(TextTable(reading, path, content, form, lambda: lines_before() + skipped))


class TextTable:
    """Records of a text file; what `features.tables.Table` is for tables. An empty cell is missing.

    Args:
        reading: for what is needed, and what is done with bad records.
        path: of the file, for errors.
        content: bytes, whole lines.
        form: of the file's columns.
        lines_before: function that says how many lines of the file come before.

    """

    def __init__(self, reading, path, content, form, lines_before):
        self._path, self._lines_before, self._lines, self._content = path, lines_before, None, content
        self._numbers, self._columns = {}, {}
        lines = content.count(b"\n") + (not content.endswith(b"\n"))
        try:
            table = self._split(content, form, reading.needs, BLOCK)
        except pyarrow().ArrowInvalid:
            table = None
        if table is None or table.num_rows != lines:  # a record of another length, a quote, or empty lines
            content = self._without_bad_lines(content, form, reading.bad)
            table = self._split(content, form, reading.needs, max(BLOCK, len(content) + 1)) if content else None
        self.num_rows = 0 if table is None else table.num_rows
        if table is not None:
            table = table.combine_chunks()
            self._arrays = {name: table.column(str(name)).chunk(0) for name in reading.needs}
        self._is_utf8 = native.is_utf8(content)

    @staticmethod
    def _split(content, form, needs, block):
        pa = pyarrow()
        names = [str(name) for name in form.names]
        asked = list(dict.fromkeys(str(name) for name in needs))
        return pa.csv.read_csv(
            pa.py_buffer(content),
            pa.csv.ReadOptions(column_names=names, block_size=block, use_threads=False),
            pa.csv.ParseOptions(delimiter=form.delimiter),
            pa.csv.ConvertOptions(
                column_types=dict.fromkeys(asked, pa.binary()), include_columns=asked, strings_can_be_null=False
            ),
        )

    def _without_bad_lines(self, content, form, bad):
        """The lines that are records, looked at one by one."""
        kept, self._lines = [], []
        for number, line in enumerate(content.split(b"\n")):
            line = line.rstrip(b"\r")
            if not line:
                continue
            try:
                text = line.decode("latin-1")  # for its quotes and lengths alone
                count = len(next(csv.reader([text], delimiter=form.delimiter, strict=True)))
                what = f"it has {count} columns, not {len(form.names)}"
                is_good = count == len(form.names)
            except csv.Error as error:
                is_good, what = False, f"a quote is not closed in the line, or not at the end of a cell ({error})"
            if is_good:
                kept.append(line)
                self._lines.append(number)
            else:
                bad(self._place_of(number), what)
        return b"\n".join(kept)

    def _place_of(self, line):
        return f"{self._path}, line {self._lines_before() + line + 1}"

    def place(self, row):
        """Where a row is, for errors."""
        return self._place_of(row if self._lines is None else self._lines[row])

    def without(self, rows):
        """The table without some of its rows, [num_rows] bool."""
        pa = pyarrow()
        kept = copy.copy(self)
        kept._lines = np.flatnonzero(~rows) if self._lines is None else np.asarray(self._lines)[~rows]
        kept._lines = kept._lines.tolist()
        kept._arrays = {name: array.filter(pa.array(~rows)) for name, array in self._arrays.items()}
        kept._numbers, kept._columns, kept.num_rows = {}, {}, int((~rows).sum())
        return kept

    def bad_rows(self, name, kind, nonfinite):
        """(rows, function that says what is wrong with one) of what cannot be used in a column, or None."""
        if kind in ("numbers", "label"):
            return bad_numbers(self, name, kind, nonfinite)
        column = self._column(name)
        if column.longest <= native.LONGEST_TEXT and self._is_utf8:
            return None
        bad = [row for row in range(len(column)) if not _is_text(column[row], kind)]
        if not bad:
            return None
        return np.array(
            bad
        ), lambda row: f"{shown(column[row])} is not UTF-8 text of at most {native.LONGEST_TEXT} bytes"

    def _column(self, name):
        if name not in self._columns:
            found = texts_.of_arrow(self._arrays[name], empty_is_missing=True)
            assert found is not None  # of bytes, which pyarrow was told to make
            self._columns[name] = found[0]
        return self._columns[name]

    def spelled(self, name):
        """(the column as float64, NaN where a cell is missing or no number; whether one is none)."""
        if name not in self._numbers:
            numbers, first = self._column(name).numbers()
            self._numbers[name] = numbers, first >= 0
        return self._numbers[name]

    def coded(self, name):
        return None

    def texts(self, name, strict=True):
        """(the column as a column of text, its kinds)."""
        return self._column(name), {"text"}

    def pieces(self, name, separator, weighted=False, strict=True):
        """The entries of a column, as `Table.pieces`."""
        return split_entries(self, name, self._column(name), separator, weighted)

    def numbers(self, name):
        """The column as float64, NaN where a cell is missing."""
        return self.spelled(name)[0]

    def cells(self, name):
        """The column as a list of text."""
        column = self._column(name)
        return [
            None if (cell := column[row]) is None else cell.decode("utf-8", "replace") for row in range(len(column))
        ]


def _is_text(cell, kind):
    if cell is None:
        return True
    if kind == "text" and len(cell) > native.LONGEST_TEXT:
        return False
    try:
        cell.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
