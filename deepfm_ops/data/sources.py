"""Where records come from: tables, iterables of tables, and files, which pyarrow opens, decompresses and splits.

A source is read in *pieces* that can be read by themselves, each of which yields *chunks* one after the other:
functions that give a table of some thousand records, without those that cannot be read. What a chunk does is most of
the work, and may be done in another thread.
"""

import collections.abc
import os

import numpy as np

from deepfm_ops.data import parquet_files, text_files
from deepfm_ops.data.files import Files, files
from deepfm_ops.data.records import Bad
from deepfm_ops.features.tables import Table, is_plain, is_table


def is_more_than_a_table(source):
    """Whether a source is files, or several tables."""
    if isinstance(source, str | os.PathLike | Files):
        return True
    if is_table(source):
        return False
    if isinstance(source, list | tuple):
        return bool(source) and all(
            isinstance(x, str | os.PathLike) or (is_table(x) and not _is_record(x)) for x in source
        )
    return isinstance(source, collections.abc.Iterable) and not hasattr(source, "__array__")


def _is_record(source):
    """Whether it is a dict that holds plain values, of which a list is no list of tables."""
    return isinstance(source, collections.abc.Mapping) and any(map(is_plain, source.values()))


class Reading:
    """A source, and what is needed of it.

    Args:
        source: a table, an iterable of tables, or files.
        needs: {column: "text", "entries", "numbers" or "label"}.
        on_bad: "error" or "skip".
        nonfinite: what an unusable number is: "error" or "missing".
        dictionaries: whether text columns of Parquet files stay dictionaries, which are looked up once per value.
        entries: {column: (separator, whether values carry weights, the most that an entry may have, or None)} of those
            that are "entries".

    Attributes:
        files: `Files`, or None.
        bad: `Bad`.
        labels: {column: `heads.Rule`} of labels, of which more is known than that they are numbers.

    """

    def __init__(self, source, needs, on_bad="error", nonfinite="error", dictionaries=False, entries=None):
        self.entries, self.labels = entries or {}, {}
        self.needs, self.bad, self.nonfinite, self.dictionaries = needs, Bad(on_bad), nonfinite, dictionaries
        paths = isinstance(source, list | tuple) and source and isinstance(source[0], str | os.PathLike)
        if isinstance(source, str | os.PathLike) or paths:
            source = files(source)
        self.files = source if isinstance(source, Files) else None
        self._source, self._forms = source, {}

    def fingerprint(self):
        """A text that other files do not have; None of tables."""
        return None if self.files is None else self.files.fingerprint()

    def pieces(self):
        """The pieces of the source, in order, each with `chunks()`: functions that give a table, or None."""
        if self.files is not None:
            return list((parquet_files if self.files.is_parquet else text_files).pieces(self))
        if not is_more_than_a_table(self._source):
            return [_Given(self, self._source, None)]
        return (_Given(self, table, number) for number, table in enumerate(self._source))

    def tables(self):
        """The tables of all chunks, one after the other."""
        for piece in self.pieces():
            for chunk in piece.chunks():
                table = chunk()
                if table is not None:
                    yield table

    def validated(self, table):
        """A table of a file without the records that cannot be used; None if that leaves nothing.

        Raises:
            BadRecord: there is one, and it is not to be skipped.

        """
        for name, kind in self.needs.items():
            # What is wrong with a column may be found in several steps.
            while table.num_rows and (found := table.bad_rows(name, kind, self.nonfinite)) is not None:
                rows, what = found
                first = int(rows[0])
                self.bad(f"{table.place(first)}, column {name!r}: {what(first)}", len(rows))
                bad = np.zeros(table.num_rows, bool)
                bad[rows] = True
                table = table.without(bad)
        return table if table.num_rows else None

    def form(self, path):
        """How the columns of a text file are laid out."""
        if path not in self._forms:
            self._forms[path] = text_files.form_of(self.files, path, self.needs)
        return self._forms[path]


class _Given:
    """A table that the caller has."""

    def __init__(self, reading, source, number):
        self._reading, self._source, self._number = reading, source, number

    def chunks(self):
        yield self._table

    def _table(self):
        needs = self._reading.needs
        lists = [name for name, kind in needs.items() if kind == "entries"]
        if self._number is None:
            return Table(self._source, needs, lists, record=False)
        try:
            table = Table(self._source, needs, lists, record=False)
        except (KeyError, TypeError, ValueError) as error:
            raise type(error)(f"table {self._number}: {error.args[0]}") from None
        table.prefix = f"table {self._number}, "
        return table
