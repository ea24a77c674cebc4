"""Records that cannot be read: the first is an error that says which and why, or all are left out and counted."""

import numpy as np

from deepfm_ops.features import cells
from deepfm_ops.features.vocabulary import native


class BadRecord(ValueError):
    """A record that cannot be read; its text says which, and why."""


class Bad:
    """What is done with records that cannot be read: the first is an error, or all are counted."""

    def __init__(self, on_bad):
        if on_bad not in ("error", "skip"):
            raise ValueError(f"on_bad must be 'error' or 'skip', got {on_bad!r}")
        self.skips, self.count = on_bad == "skip", 0

    def __call__(self, place, what):
        if not self.skips:
            raise BadRecord(f"{place}: {what}")
        self.count += 1


def bad_numbers(table, name, kind, nonfinite):
    """(rows, function that says what is wrong with one) of the numbers of a column that cannot be used, or None.

    Args:
        table: with `spelled(name)`: (float64 [n], NaN where a cell is missing or no number, whether one is none).
        name: of the column.
        kind: "numbers" or "label", which may not be missing.
        nonfinite: "error" or "missing".

    """
    numbers, has_others = table.spelled(name)
    bad = np.zeros(len(numbers), bool)
    if has_others:
        given = table.cells(name)
        for row in np.flatnonzero(numbers != numbers).tolist():
            bad[row] = native.Column.of_list([given[row]]).numbers()[1] >= 0
    if nonfinite == "error" or kind == "label":
        bad |= np.abs(numbers) > cells.LARGEST
    if kind == "label":
        bad |= numbers != numbers
    if not bad.any():
        return None
    rule = cells.UNUSABLE if kind == "numbers" else "is no label: it must be a number, and cannot be missing"

    def what(row):
        value = table.cells(name)[row]
        is_none = kind == "numbers" and numbers[row] != numbers[row]
        return f"{shown(value)} {'is no number' if is_none else rule}"

    return np.flatnonzero(bad), what


def shown(value):
    """A value for an error, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]} ... ({len(value)} long)"
