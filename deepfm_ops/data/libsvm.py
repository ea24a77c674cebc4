"""libsvm and libffm files: rows of any number of pairs, as text."""

import operator
from typing import NamedTuple

import numpy as np

from deepfm_ops.data import libsvm_python, paths
from deepfm_ops.forks import cached

try:
    from deepfm_ops._kernels import LibsvmParser, most_pairs, pad_rows
except ImportError:  # installed without the compiled part
    from deepfm_ops.data.libsvm_python import LibsvmParser, most_pairs, pad_rows  # type: ignore[assignment]

BLOCK_BYTES = 8 << 20
LONGEST_LINE = 1 << 28  # bytes; without a bound, a file without lines would be read as one
MOST_FIELDS = 1 << 20


class Samples:
    """Rows of pairs of a feature's index and its value, and their labels.

    As matrices, which DeepFM takes: unpacking gives `indices, values, labels, field_sizes`. And as they are, of any
    length: row r has the pairs from row_splits[r] to row_splits[r + 1] of the flat arrays. The matrices are made when
    asked for; every row there takes the room of the longest.

    Attributes:
        labels: float32 [B]. Where a file's labels are -1 and 1, 0 and 1.
        row_splits: int64 [B + 1].
        flat_indices: int64 [nnz], as they are in the file, from 0 or from 1.
        flat_values: float32 [nnz].
        flat_fields: int32 [nnz]; None of libsvm, which has none.
        skipped: lines that were left out (`on_bad="skip"`).
        indices, values: int64 and float32 [B, P], the columns of a field next to each other. Padding is index 0 with
            value 0, which adds nothing.
        field_sizes: list of int, columns of each field, P in all: the most pairs of the field in a row, and 1 at least.
            Of libsvm, whose pairs have no fields, 1 for each pair of the longest row: the second order is then over all
            pairs. What the k-th pair of a row is differs from row to row, so there is nothing that a deep part could
            learn: DeepFM(..., use_deep=False).
        num_features: the largest index + 1.
        num_fields: how many field_sizes there are: the largest field + 1, or the longest row of libsvm.

    """

    def __init__(self, labels, row_splits, fields, indices, values, skipped=0):
        self.labels, self.row_splits, self.skipped = labels, row_splits, skipped
        self.flat_fields, self.flat_indices, self.flat_values = fields, indices, values

    def __iter__(self):
        return iter((self.indices, self.values, self.labels, self.field_sizes))

    def __len__(self):
        return len(self.labels)

    def __repr__(self):
        return f"<{len(self)} samples of {len(self.flat_indices)} pairs, {self.num_features} features>"

    @property
    def num_features(self):
        return int(self.flat_indices.max(initial=0)) + 1

    @property
    def num_fields(self):
        return len(self.field_sizes) if self.flat_fields is None else int(self.flat_fields.max(initial=0)) + 1

    @cached
    def field_sizes(self):
        if self.flat_fields is None:
            return [1] * max(1, int(np.diff(self.row_splits).max(initial=0)))
        if self.num_fields > MOST_FIELDS:
            raise ValueError(
                f"fields must be below {MOST_FIELDS} to have columns of their own, got {self.num_fields - 1}; number "
                "them from 0 on, and set flat_fields"
            )
        return np.maximum(most_pairs(self.row_splits, self.flat_fields, self.num_fields), 1).tolist()

    @property
    def has_fields(self):
        """Whether pairs have fields: of libffm."""
        return self.flat_fields is not None

    @property
    def num_samples(self):
        return len(self)

    @cached
    def counts(self):
        """int64 [num_features], how often each index occurs with a value other than zero."""
        return np.bincount(self.flat_indices[self.flat_values != 0], minlength=self.num_features)

    @cached
    def _matrices(self):
        return self.padded(self.field_sizes)

    @property
    def indices(self):
        return self._matrices[0]

    @property
    def values(self):
        return self._matrices[1]

    def padded(self, field_sizes):
        r"""The matrices with the columns that a model was made for, such as that of the training samples.

        A model for two files, neither of which holds the widest rows of all fields, is made for
        `[max(sizes) for sizes in itertools.zip_longest(train.field_sizes, test.field_sizes, fillvalue=1)]`, and so are
        the matrices of both.

        Args:
            field_sizes: list of int, as the attribute.

        Returns:
            indices int64 [B, P], values float32 [B, P].

        Raises:
            ValueError: a row with more pairs of a field than that has columns, or with a field that has none.
            MemoryError: matrices too large to allocate.

        Example:
            >>> import pathlib, tempfile
            >>> file = pathlib.Path(tempfile.mkdtemp(), "clicks.ffm")
            >>> _ = file.write_text("1 0:3:1 1:7:.5 1:8:.5\n0 0:4:1\n")
            >>> samples = read_libffm(file)
            >>> samples.field_sizes, samples.indices.tolist()
            ([1, 2], [[3, 7, 8], [4, 0, 0]])
            >>> samples.padded([2, 3])[0].tolist()
            [[3, 0, 7, 8, 0], [4, 0, 0, 0, 0]]

        """
        splits = np.cumsum([0, *map(operator.index, field_sizes)])
        if (np.diff(splits) < 0).any():
            raise ValueError(f"field_sizes must not be negative, got {field_sizes}")
        columns = splits if self.flat_fields is not None else splits[[0, -1]]
        shape = (len(self), int(splits[-1]))
        try:
            indices, values = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        except MemoryError as error:
            raise MemoryError(
                f"matrices of shape {shape} are too large: the longest rows set their width. row_splits, flat_indices "
                "and flat_values hold the same without padding"
            ) from error
        flat = self.row_splits, self.flat_fields, self.flat_indices, self.flat_values.astype(np.float32, copy=False)
        row = pad_rows(*flat, columns, indices, values)
        if row >= 0:
            raise ValueError(f"{self._misfit(row, columns)}; a model for both takes the larger of their field_sizes")
        return indices, values

    def _misfit(self, row, columns):
        begin, end = self.row_splits[row : row + 2].tolist()
        if self.flat_fields is None:
            return f"field_sizes have {columns[-1]} columns, row {row} has {end - begin} pairs"
        fields = self.flat_fields[begin:end]
        sizes = np.diff(columns)
        if fields.max() >= len(sizes):
            return f"field_sizes have {len(sizes)} fields, row {row} has a pair of field {fields.max()}"
        pairs = np.bincount(fields, minlength=len(sizes))
        field = np.flatnonzero(pairs > sizes)[0]
        return f"field_sizes have {sizes[field]} columns of field {field}, row {row} has {pairs[field]} pairs of it"


class Chunk(NamedTuple):
    """Some rows of one file, in order.

    Attributes:
        labels: float32 [B], as they are in the file, -1 too.
        row_splits: int64 [B + 1].
        fields: int32 [nnz]; None of libsvm.
        indices: int64 [nnz].
        values: float32 [nnz].
        path: of the file.
        line: where they begin in it, from 1.
        skipped: lines among them that were left out.

    """

    labels: np.ndarray
    row_splits: np.ndarray
    fields: np.ndarray | None
    indices: np.ndarray
    values: np.ndarray
    path: str
    line: int
    skipped: int


def read_libsvm(path, *, on_bad="error"):
    r"""Reads lines of `label index:value index:value ...`.

    Blanks, tabs or commas separate; what follows a # is a comment; empty lines are no rows. An index may occur several
    times in a row.

    Args:
        path: str or pathlib.Path of a file, plain, .gz or .zst (with pyarrow), or a glob; or a list of these, whose
            rows follow each other.
        on_bad: what is to become of a line that cannot be read: "error", or "skip", and `skipped` says how many.

    Returns:
        `Samples`: `indices, values, labels, field_sizes = read_libsvm(path)`.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: a .zst, without pyarrow.
        ValueError: a line that cannot be read, by file, line and column; a file without rows, or that is cut off.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp(), "clicks.svm")
        >>> _ = file.write_text("+1 3:1 7:0.5\n-1 4:1  # a comment\n")
        >>> indices, values, labels, field_sizes = read_libsvm(file)
        >>> indices.tolist(), values.tolist(), labels.tolist(), field_sizes
        ([[3, 7], [4, 0]], [[1.0, 0.5], [1.0, 0.0]], [1.0, 0.0], [1, 1])

    """
    return _read(path, False, on_bad)


def read_libffm(path, *, on_bad="error"):
    """Reads lines of `label field:index:value field:index:value ...`, as `read_libsvm` does.

    `DeepFM(samples.num_features, samples.num_fields, field_sizes=samples.field_sizes)` takes the matrices. Several
    pairs of a field in a row are the values of a multi-valued field. A feature has one embedding, in whatever fields
    its index occurs.
    """
    return _read(path, True, on_bad)


def iter_libsvm(path, chunk_rows=1 << 16, *, on_bad="error"):
    """Reads what `read_libsvm` does, of any size, in pieces.

    Args:
        path: as for `read_libsvm`.
        chunk_rows: rows of a piece; the last of a file may have less.
        on_bad: as for `read_libsvm`.

    Returns:
        An iterator of `Chunk`.

    Raises:
        ValueError, FileNotFoundError, ImportError: what `read_libsvm` raises, a bad line when its chunk is asked for.

    """
    return _iterate(path, False, chunk_rows, on_bad)


def iter_libffm(path, chunk_rows=1 << 16, *, on_bad="error"):
    """Reads what `read_libffm` does, in pieces: see `iter_libsvm`."""
    return _iterate(path, True, chunk_rows, on_bad)


def _read(path, has_fields, on_bad):
    parser = LibsvmParser(has_fields, _skip(on_bad))
    for file in paths.expand(path):
        for _ in _parse(parser, file, has_fields, np.iinfo(np.int64).max):
            pass
    labels, *rows = parser.take()
    if (labels == -1).any() and ((labels == -1) | (labels == 1)).all():
        labels = np.maximum(labels, 0)
    return Samples(labels, *rows, parser.skipped)


def _iterate(path, has_fields, chunk_rows, on_bad):
    skip, files, chunk_rows = _skip(on_bad), paths.expand(path), operator.index(chunk_rows)
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")

    def chunks():
        for file in files:
            parser = LibsvmParser(has_fields, skip)
            line, skipped = 1, 0
            for _ in _parse(parser, file, has_fields, chunk_rows):
                yield Chunk(*parser.take(), file, line, parser.skipped - skipped)
                line, skipped = parser.lines + 1, parser.skipped

    return chunks()


def _skip(on_bad):
    if on_bad not in ("error", "skip"):
        raise ValueError(f"on_bad must be 'error' or 'skip', got {on_bad!r}")
    return on_bad == "skip"


def _parse(parser, file, has_fields, chunk_rows):
    """Has the parser read a file; yields whenever it holds chunk_rows rows, and at the end."""
    parser.lines, before, skipped, yielded = 0, parser.num_rows, parser.skipped, False
    with paths.opened(file) as opened:
        for block in _blocks(opened, file, parser):
            begin = 0
            while begin < len(block):
                begin = parser.parse(block, begin, chunk_rows)
                if parser.bad:
                    raise ValueError(f"{file}, {_complaint(*parser.bad, has_fields)}")
                if parser.num_rows == chunk_rows:
                    yield
                    yielded = True
    if parser.num_rows > before:
        yield
    elif not yielded:
        skipped = parser.skipped - skipped
        raise ValueError(f"{file} holds no rows" + (f"; {skipped} lines were skipped" if skipped else ""))


def _blocks(file, name, parser):
    """A file's bytes, some whole lines at a time, each with its end."""
    block = bytearray(BLOCK_BYTES)
    while True:
        with memoryview(block) as view:
            size = file.readinto(view[:BLOCK_BYTES])
        if not size:
            return
        block[size:] = file.readline(LONGEST_LINE)
        if not block.endswith(b"\n"):
            if len(block) - size == LONGEST_LINE:
                line = parser.lines + block.count(b"\n") + 1
                raise ValueError(f"{name}, line {line}: longer than {LONGEST_LINE} bytes; is this a file of text?")
            block += b"\n"
        yield block


def _complaint(line, column, is_label, token, has_fields):
    """What is wrong with a token that a parser stopped at."""
    shown, form = _shown(token), "field:index:value" if has_fields else "index:value"
    where = f"line {line}, column {column}: "
    if is_label:
        if b":" in token:
            return f"{where}a label must stand before the pairs, got {shown}; files without labels cannot be read"
        return f"{where}a label must be a finite number, got {shown}"
    if token.startswith(b"qid:"):
        return f"{where}query ids, of ranking, cannot be read, got {shown}"
    *ids, value = token.split(b":")
    names = ("field", "index") if has_fields else ("index",)
    if len(ids) != len(names):
        other = {(False, 2): "; read_libffm reads fields", (True, 1): "; read_libsvm reads pairs without a field"}
        return f"{where}a pair must be {form}, got {shown}{other.get((has_fields, len(ids)), '')}"
    for name, text in zip(names, ids, strict=True):
        if libsvm_python.integer(name, text) is None:
            most = libsvm_python.LARGEST[name]
            return f"{where}the {name} must be an integer in [0, {most}], got {_shown(text)} in {shown}"
    return f"{where}the value must be a finite float32, got {_shown(value)} in {shown}"


def _shown(token):
    text = repr(token[:50].decode("utf-8", "backslashreplace"))
    return text if len(token) <= 50 and len(text) <= 52 else text[:46] + "...'"
