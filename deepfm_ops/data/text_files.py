"""Text files (CSV, TSV) in pieces; pyarrow splits their lines, and every cell is read as bytes.

A piece is a range of bytes, or the whole of a compressed file, which has to be read from its beginning. Values with
line breaks within are not supported: a line is a record.
"""

import copy
import dataclasses
import functools
import re

import numpy as np

from deepfm_ops.data.files import COMPRESSED, CRITEO, pyarrow, suffix
from deepfm_ops.data.records import BadRecord, bad_entries, bad_numbers, bad_texts
from deepfm_ops.features import texts as texts_
from deepfm_ops.features.tables import split_entries
from deepfm_ops.features.vocabulary import native

PIECE = 1 << 22  # bytes
BLOCK = 1 << 20  # bytes that pyarrow splits at a time: they stay in the cache
STEP = 1 << 16  # bytes of a compressed file that are read at a time, and lost where it is cut off
LONGEST_LINE = 1 << 26  # bytes, beyond which a file is none of lines
BOM, BREAK = b"\xef\xbb\xbf", b"\n"
_NO_TEXT = {
    b"\xff\xfe": "is UTF-16: write it in UTF-8",
    b"\xfe\xff": "is UTF-16: write it in UTF-8",
    b"\x1f\x8b": "is compressed: its name must end in .gz",
    b"\x28\xb5\x2f\xfd": "is compressed: its name must end in .zst",
    b"PAR1\x15": "is a Parquet file: its name must end in .parquet",
}


def pieces(reading):
    """The pieces of the text files of a `sources.Reading`, in order."""
    for path, size in zip(reading.files.paths, reading.files.sizes(), strict=True):
        try:
            reading.form(path)
        except BadRecord as error:  # nothing of the file can be read
            reading.bad(str(error))
            continue
        if suffix(path) in COMPRESSED:
            yield _Compressed(reading, path)
        else:
            for start in range(0, size, PIECE):
                yield _Range(reading, path, start, min(start + PIECE, size))


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
            if len(content) < self._end - first:
                raise BadRecord(f"{self._path} is shorter than it was when it was opened")
            if self._start:
                begin = content.find(BREAK) + 1
                if not begin:
                    return
                first, content = first + begin, content[begin:]
            parts = [content]  # a line may be long, and what is added to bytes copies them
            while parts[-1] and not parts[-1].endswith(BREAK):
                more = file.read(max(BLOCK, 1 << 12))
                end = more.find(BREAK) + 1
                parts.append(more[:end] if end else more)
                _check_line(self._path, sum(map(len, parts)) - len(content))
            content = b"".join(parts)
        if content:
            yield lambda: _table(self._reading, self._path, content, first, lambda: self._lines_before(first))

    def _lines_before(self, byte):
        """Counted only where an error needs it."""
        count = 0
        with self._reading.files.system.open_input_file(self._path) as file:
            while byte > 0 and (block := file.read(min(byte, 1 << 24))):
                count, byte = count + block.count(BREAK), byte - len(block)
        return count


class _Compressed:
    """The lines of a compressed text file, in chunks that can be read one after the other only."""

    def __init__(self, reading, path):
        self._reading, self._path = reading, path

    def chunks(self):
        held, size, first, before, more, damage = [], 0, 0, 0, b"more", None
        with self._reading.files.stream(self._path) as stream:
            while more:
                try:
                    more = stream.read(min(PIECE, STEP))
                except OSError as error:
                    more, damage = b"", error
                held.append(more)
                size += len(more)
                if more and size < PIECE:
                    continue
                content = b"".join(held)
                end = len(content) if not more and damage is None else content.rfind(BREAK) + 1
                content, held, size = content[:end], [content[end:]], 0
                _check_line(self._path, len(held[0]))
                if content:
                    yield self._chunk(content, first, before)
                    first, before = first + len(content), before + content.count(BREAK)
        if damage is not None:
            what = f"it is damaged or cut off ({damage}), and what follows cannot be read"
            self._reading.bad(f"{self._path}, after line {before}: {what}")

    def _chunk(self, content, first, before):
        return lambda: _table(self._reading, self._path, content, first, lambda: before)


def _check_line(path, length):
    if length > LONGEST_LINE:
        raise BadRecord(f"{path}: a line is longer than {LONGEST_LINE:,} bytes, or lines do not end in \\n")


@dataclasses.dataclass
class Form:
    """How the columns of a text file are laid out.

    Attributes:
        names: of the columns.
        delimiter: of the columns.
        begin: the byte, decompressed, with which the records begin: behind blank lines, and the header.

    """

    names: list
    delimiter: str
    begin: int


def form_of(files, path, needs):
    """The columns of a text file, from its first line and what is asked for."""
    line, number, begin, end = _first_line(files, path)
    place = f"{path}, line {number}"
    found = _split_line(line, files.delimiter)
    if found is None:
        raise BadRecord(f"{place}: {NO_CELLS}")
    found = [cell.decode("utf-8", "replace") for cell in found]
    shown = f"{[name[:60] for name in found[:8]]}{' ...' if len(found) > 8 else ''}"
    if files.names is not None:
        if len(files.names) != len(found):
            raise ValueError(f"{place}: {len(files.names)} names are given, but it has {len(found)} columns: {shown}")
        if list(files.names) == found:
            raise ValueError(f"{place} is a header, {shown}: names are for files without one")
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
    return Form(names, files.delimiter, end if has_header else begin)


def _first_line(files, path):
    """(the first line that is not blank, its number from 1 on, its first byte, the first one after it)."""
    content, begin, number = b"", 0, 1
    try:
        with files.stream(path) as stream:
            while True:
                end = content.find(BREAK, begin) + 1
                line = content[begin : end or len(content)]
                if end and line.strip(b"\r\n").removeprefix(BOM):
                    break
                if end:
                    begin, number = end, number + 1
                    continue
                _check_line(path, len(content))
                more = stream.read(max(1 << 12, len(content)))
                if not more:
                    break
                content += more
    except OSError as error:
        raise BadRecord(f"{path}, line {number}: it is damaged or cut off: {error}") from None
    for mark, what in _NO_TEXT.items():
        if line.startswith(mark):
            raise BadRecord(f"{path} {what}")
    if begin == 0 and line.startswith(BOM):
        begin, line = len(BOM), line[len(BOM) :]
    if not line.strip(b"\r\n"):
        raise BadRecord(f"{path} is empty")
    return line.rstrip(b"\r\n"), number, begin, end or len(content)


NO_CELLS = "a quote is not closed in the line, or it has a carriage return within"


@functools.cache
def _patterns(delimiter, columns=1):
    """(pattern of a cell as pyarrow reads it, a quoted part and a plain one, and what ends it; of so many cells)."""
    mark = re.escape(delimiter.encode())
    quoted, plain = rb'"([^"]*(?:""[^"]*)*)"(?!")', rb"[^%b\r]*" % mark
    cell = rb'(?:%b(%b)|(?!")(%b))' % (quoted, plain, plain)
    return re.compile(rb"%b(%b|\Z)" % (cell, mark)), re.compile(rb"%b(?:%b%b){%d}" % (cell, mark, cell, columns - 1))


def _whole(form):
    """The pattern of a line that is a record."""
    return _patterns(form.delimiter, len(form.names))[1]


def _split_line(line, delimiter):
    """The cells of a line, or None."""
    cells, at, pattern = [], 0, _patterns(delimiter)[0]
    while found := pattern.match(line, at):
        quoted, rest, plain, end = found.groups()
        cells.append(plain if quoted is None else quoted.replace(b'""', b'"') + rest)
        if not end:
            return cells
        at = found.end()
    return None


def _table(reading, path, content, first, lines_before):
    """The table of some lines of a file, from byte `first` on, or None if there is no record in them."""
    form, skipped = reading.form(path), 0
    if form.begin > first:
        skipped = content.count(BREAK, 0, form.begin - first)
        content = content[form.begin - first :]
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
        self._path, self._lines_before, self._lines = path, lines_before, None
        self._reading, self._numbers, self._columns, self._pieces = reading, {}, {}, {}
        lines = content.count(BREAK) + (not content.endswith(BREAK))
        try:
            table = self._split(content, form, reading.needs, BLOCK)
        except pyarrow().ArrowInvalid:
            table = None
        # A record of another length, a quote, or an empty line. To pyarrow a carriage return is a line's end, and a
        # quote may be open at the end of the last one.
        last = content[content.rfind(BREAK, 0, -1) + 1 :].rstrip(b"\r\n")
        returns_are_ends = b"\r" not in content or content.count(b"\r") == content.count(b"\r\n")
        is_whole = returns_are_ends and _whole(form).fullmatch(last)
        if table is None or table.num_rows != lines or not is_whole:
            content = self._without_bad_lines(content, form, reading.bad)
            table = self._split(content, form, reading.needs, max(BLOCK, len(content) + 1)) if content else None
            if table is not None and table.num_rows != len(self._lines):
                raise BadRecord(f"{self.place(0)} on: these lines are not one record each")
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
        whole = _whole(form)
        for number, line in enumerate(content.split(BREAK)):
            line = line.rstrip(b"\r")
            if not line:
                continue
            if whole.fullmatch(line):
                kept.append(line)
                self._lines.append(number)
                continue
            found = _split_line(line, form.delimiter)
            what = NO_CELLS if found is None else f"it has {len(found)} columns, not {len(form.names)}"
            bad(f"{self._place_of(number)}: {what}")
        return BREAK.join(kept)

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
        kept._numbers, kept._columns, kept._pieces, kept.num_rows = {}, {}, {}, int((~rows).sum())
        return kept

    def bad_rows(self, name, kind, nonfinite):
        """(rows, function that says what is wrong with one) of what cannot be used in a column, or None."""
        if kind in ("numbers", "label"):
            return bad_numbers(self, name, kind, nonfinite, self._reading.labels)
        if kind == "entries":
            return bad_entries(self, name, *self._reading.entries[name])
        column = self._column(name)
        is_good = column.longest <= native.LONGEST_TEXT and self._is_utf8
        return None if is_good else bad_texts(column)

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
        if name not in self._pieces:
            self._pieces[name] = split_entries(self, name, self._column(name), separator, weighted)
        return self._pieces[name]

    def numbers(self, name):
        """The column as float64, NaN where a cell is missing."""
        return self.spelled(name)[0]

    def cells(self, name):
        """The column as a list of text."""
        column = self._column(name)
        return [
            None if (cell := column[row]) is None else cell.decode("utf-8", "replace") for row in range(len(column))
        ]
