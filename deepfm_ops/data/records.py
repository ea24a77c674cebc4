"""Records that cannot be read: the first is an error that says which and why, or all are left out and counted."""

import logging

import numpy as np

from deepfm_ops.features import cells
from deepfm_ops.features.tables import BadWeights
from deepfm_ops.features.vocabulary import native
from deepfm_ops.forks import Turn

_LOGGER = logging.getLogger("deepfm_ops")


class BadRecord(ValueError):
    """A record that cannot be read; its text says which, and why."""


class Bad:
    """What is done with records that cannot be read: the first is an error, or all are counted.

    Attributes:
        count: how many were left out; the rest of a file that is cut off, or a whole file, is one.
        first: what is wrong with the first of them.

    """

    def __init__(self, on_bad):
        if on_bad not in ("error", "skip"):
            raise ValueError(f"on_bad must be 'error' or 'skip', got {on_bad!r}")
        self.skips, self.count, self.first = on_bad == "skip", 0, None
        self._turn = Turn()  # chunks are read in several threads

    def __call__(self, what, count=1):
        if not self.skips:
            raise BadRecord(what)
        with self._turn.of_this_process():
            self.count += count
            self.first = self.first or what

    def summary(self, good, before=0):
        """How many records were left out beside so many good ones since `count` was `before`; "" if none was."""
        count = self.count - before
        total = f"{count:,} of {count + good:,} records were skipped, as on_bad='skip' says; the first: {self.first}"
        return total if count else ""

    def report(self, good, before=0):
        """Tells the log `summary`."""
        if summary := self.summary(good, before):
            _LOGGER.warning(summary)


def bad_numbers(table, name, kind, nonfinite, labels):
    """(rows, function that says what is wrong with one) of the numbers of a column that cannot be used, or None.

    Args:
        table: with `spelled(name)`: (float64 [n], NaN where a cell is missing or no number, whether one is none).
        name: of the column.
        kind: "numbers" or "label".
        nonfinite: "error" or "missing".
        labels: {column: `heads.Rule`}; all numbers are labels of one that it does not have, and none may be missing.

    """
    numbers, has_others = table.spelled(name)
    bad = np.zeros(len(numbers), bool)
    if has_others:
        given = table.cells(name)
        for row in np.flatnonzero(numbers != numbers).tolist():
            bad[row] = native.Column.of_list([given[row]]).numbers()[1] >= 0
    if nonfinite == "error" or kind == "label":
        bad |= np.abs(numbers) > cells.LARGEST
    rule = cells.UNUSABLE
    if kind == "label":
        rule = "is no label: it must be a number, and cannot be missing"
        if (wanted := labels.get(name)) is None:
            bad |= numbers != numbers
        else:
            bad |= ~(wanted.usable(numbers) | wanted.missing(numbers))
            rule = f"is no label: it is {wanted.said}"
    if not bad.any():
        return None

    def what(row):
        value = table.cells(name)[row]
        is_none = kind == "numbers" and numbers[row] != numbers[row]
        return f"{shown(value)} {'is no number' if is_none else rule}"

    return np.flatnonzero(bad), what


def bad_texts(column, rows=None):
    """As `bad_numbers`, of a column of text that has to be UTF-8, and not too long; `rows` are those of its cells."""
    if column.first_bad() < 0:
        return None
    bad = {}
    for i in range(len(column)):
        if not _is_text(column[i]):
            bad.setdefault(i if rows is None else int(rows[i]), i)

    def what(row):
        return f"{shown(column[bad[row]])} is not UTF-8 text of at most {native.LONGEST_TEXT} bytes"

    return np.array(list(bad)), what


def bad_entries(table, name, separator, weighted, longest):
    """As `bad_numbers`, of the values of a multi-valued column; an entry has `longest` of them at most, or None."""
    try:
        row_splits, values, *_ = table.pieces(name, separator, weighted)
    except BadWeights as error:
        what = error.what
        return np.array(error.rows()), lambda row: what
    lengths = np.diff(row_splits)
    if longest is not None and lengths.max(initial=0) > longest:
        rule = f"the matrices would have as many columns: give max_length (without it {longest} is the most)"
        return np.flatnonzero(lengths > longest), lambda row: f"an entry of {lengths[row]} values, and {rule}"
    return bad_texts(values, np.repeat(np.arange(len(lengths)), lengths))


def _is_text(cell):
    if cell is None:
        return True
    if len(cell) > native.LONGEST_TEXT:
        return False
    try:
        cell.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def shown(value):
    """A value for an error, shortened."""
    text = repr(value[:60] if isinstance(value, str | bytes) else value)
    return text if len(text) <= 60 else f"{text[:56]} ... ({len(value)} long)"
