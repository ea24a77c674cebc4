"""The fields of a feature dictionary: what each learns of its column, and how it encodes one. No TensorFlow here.

`dictionary_tensorflow` is the other side of `encode`.
"""

import dataclasses

import numpy as np

from deepfm_ops.features import cells
from deepfm_ops.features.vocabulary import Values, native

KINDS = ("categorical", "numeric", "multivalued")
TRANSFORMS = ("identity", "log1p", "standardize", "quantiles")
QUANTILES = 32  # buckets of "quantiles"
SAMPLE = 1 << 17  # numbers that quantiles are taken from
LONGEST = 1024  # of an entry where no max_length was given


@dataclasses.dataclass
class Field:
    """One column.

    Attributes:
        name: of the column.
        kind: one of KINDS.
        number: from 1 on, in the order of the columns.
        size: columns of the matrices.
        dtype: what categories came as, "text", "integer", "fraction" or "boolean"; None of a numeric column.
        buckets: number of hash buckets, or None: its values are in the vocabulary.
        weighted: whether the values of an entry carry weights, "drama:0.7|war:0.3".
        max_length: values of an entry that count, or None: as many as the longest one has.
        transform: of a numeric column, one of TRANSFORMS.
        mean, deviation: of "standardize".
        boundaries: of "quantiles": bucket i holds the numbers in [boundaries[i - 1], boundaries[i]).
        start: index of a numeric column, or the first of its quantile or hash buckets; else 0.
        unseen: index of the values that have none of their own, or 0.

    """

    name: object
    kind: str
    number: int
    size: int = 1
    dtype: str | None = None
    buckets: int | None = None
    weighted: bool = False
    max_length: int | None = None
    transform: str = "identity"
    mean: float = 0.0
    deviation: float = 1.0
    boundaries: list | None = None
    start: int = 0
    unseen: int = 0

    @property
    def has_values(self):
        """Whether its values are in the vocabulary."""
        return self.kind != "numeric" and self.buckets is None

    def transformed(self, numbers):
        """float64 numbers, NaN where they are missing, as the model sees them; of "quantiles" their buckets."""
        if self.transform == "log1p":
            return np.copysign(np.log1p(np.abs(numbers)), numbers)
        if self.transform == "standardize":
            return (numbers - self.mean) / self.deviation
        if self.transform == "quantiles":
            found = np.searchsorted(np.array(self.boundaries), numbers, side="right").astype(np.float64)
            return np.where(np.isnan(numbers), np.nan, found)
        return numbers

    def encode(self, table, vocabulary, indices, values, nonfinite, separator, threads):
        """Writes the field's columns of the matrices; returns what to warn of, or None."""
        if self.kind == "numeric":
            self._encode_numbers(table, indices[:, 0], values[:, 0], nonfinite)
        elif self.kind == "categorical":
            return self._encode_categories(table, vocabulary, indices[:, 0], values[:, 0], threads)
        else:
            return self._encode_entries(table, vocabulary, indices, values, separator, threads)
        return None

    def _encode_numbers(self, table, indices, values, nonfinite):
        numbers = cells.checked_numbers(
            self.name, table.numbers(self.name), lambda: table.cells(self.name), nonfinite, table.place
        )
        numbers = self.transformed(numbers)
        known = numbers == numbers
        if self.transform == "quantiles":
            indices[:] = np.where(known, np.nan_to_num(numbers).astype(np.int64) + self.start, 0)
            values[:] = known
        else:
            indices[:] = known * self.start
            values[:] = np.where(known, numbers, 0.0)

    def _encode_categories(self, table, vocabulary, indices, values, threads):
        if self.buckets is not None:
            texts, _ = table.texts(self.name, strict=False)
            found = texts.buckets(self.buckets)
            indices[:] = np.where(found < 0, 0, found + self.start)
            values[:] = found >= 0
            return None
        coded = table.coded(self.name)
        if coded is not None:
            codes, distinct = coded
            found = distinct.ids(vocabulary, self.number, self.unseen, threads)[codes]  # -1 is the last one
            indices[:] = found
            values[:] = found != 0
            return None
        texts, _ = table.texts(self.name, strict=False)
        missing, unknown = vocabulary.find(self.number, texts, indices, values, self.unseen, threads)
        return self._mostly_unknown(
            vocabulary, len(texts) - missing, unknown, lambda: self._strange(table, texts, indices)
        )

    def _encode_entries(self, table, vocabulary, indices, values, separator, threads):
        row_splits, pieces, weights, _ = table.pieces(self.name, separator, self.weighted, strict=False)
        row_splits, pieces, weights = truncated(row_splits, pieces, weights, self.max_length)
        if self.buckets is not None:
            ids, unknown = pieces.buckets(self.buckets) + self.start, 0
        else:
            ids = np.zeros(len(pieces), np.int64)
            _, unknown = vocabulary.find(self.number, pieces, ids, None, self.unseen, threads)
        native.fill_bags(row_splits, ids, weights, indices, values)
        return self._mostly_unknown(vocabulary, len(pieces), unknown, lambda: self._strange(None, pieces, ids))

    def _strange(self, table, texts, ids):
        """Three unknown values, as they were given."""
        found, given = {}, None
        for row in np.flatnonzero(ids == self.unseen).tolist():
            text = texts[row]
            if text is None or len(found) == 3:
                continue
            given = table.cells(self.name) if given is None and table is not None else given
            value = text.decode("utf-8", "replace") if given is None else given[row]
            found[repr(value.item() if isinstance(value, np.generic) else value)] = None
        return ", ".join(found)

    def _mostly_unknown(self, vocabulary, present, unknown, examples):
        """The text of a warning if more than half of three values or more, missing ones apart, is unknown."""
        if present < 3 or 2 * unknown <= present:
            return None
        known = vocabulary.of(self.number)
        known = known[known != self.unseen]
        if not len(known):
            return None
        counts = "count as the column's unseen values" if self.unseen else "count as missing"
        such = "" if vocabulary.text(known[0]) is None else f", such as {vocabulary.text(known[0])!r}"
        return (
            f"column {self.name!r}: {unknown} of {present} values were not seen by fit and {counts}, such as "
            f"{examples()}; fit saw {len(known)}{such}"
        )


def truncated(row_splits, pieces, weights, most):
    """Entries of at most so many values; None: all of them."""
    lengths = np.diff(row_splits)
    if most is None or not len(lengths) or lengths.max() <= most:
        return row_splits, pieces, weights
    place = np.arange(len(pieces)) - np.repeat(row_splits[:-1], lengths)
    kept = np.flatnonzero(place < most)
    row_splits = np.concatenate([[0], np.cumsum(np.minimum(lengths, most))])
    pieces = native.Column.of_list([pieces[i] for i in kept.tolist()])
    return row_splits, pieces, None if weights is None else weights[kept]


class Learner:
    """What one field sees while tables pass."""

    def __init__(self, field, keep_texts, sketch, least, seed=0):
        self.field, self.least = field, least
        self.counter = None
        if field.has_values:
            self.counter = native.Counter(field.number, keep_texts, sketch, least)
        self.kinds, self.longest = set(), 0
        self.buckets = np.zeros(field.buckets or 0, np.int64)
        self.present, self.rows = 0, 0  # numbers with a value other than zero; numbers
        self.mean, self.squares = 0.0, 0.0
        self.sample = np.zeros(0)
        self._random = np.random.default_rng((seed, field.number))

    def see(self, table, vocabulary, counts, nonfinite, separator):
        """Counts a table's column; `counts` [size] are those of the values that the vocabulary knows."""
        name = self.field.name
        if self.field.kind == "numeric":
            cells_of = lambda: table.cells(name)  # noqa: E731
            self._see_numbers(cells.checked_numbers(name, table.numbers(name), cells_of, nonfinite, table.place))
            return
        if self.field.kind == "categorical":
            texts, kinds = table.texts(name)
        else:
            row_splits, texts, weights, kinds = table.pieces(name, separator, self.field.weighted)
            lengths = np.diff(row_splits)
            longest = int(lengths.max(initial=0))
            if self.field.max_length is None and longest > LONGEST:
                raise ValueError(
                    f"column {name!r}, {table.place(int(lengths.argmax()))}: an entry of {longest} values, and the "
                    f"matrices would have as many columns: give max_length (without it {LONGEST} is the most)"
                )
            _, texts, _ = truncated(row_splits, texts, weights, self.field.max_length)
            self.longest = max(self.longest, min(longest, self.field.max_length or longest))
        self.kinds |= kinds
        if self.counter is None:
            found = texts.buckets(self.field.buckets)
            self.buckets += np.bincount(found[found >= 0], minlength=self.field.buckets)
            return
        bad = vocabulary.count(self.counter, texts, counts)
        if bad >= 0:
            shown = texts[bad]
            what = f"{len(shown)} bytes" if len(shown) > native.LONGEST_TEXT else f"{shown[:40]!r}"
            if self.field.kind == "multivalued":
                bad = int(np.searchsorted(row_splits, bad, side="right")) - 1
            raise ValueError(
                f"column {name!r}, {table.place(bad)}: {what} is no category: it must be UTF-8 text of at most "
                f"{native.LONGEST_TEXT} bytes"
            )

    def _see_numbers(self, numbers):
        field = self.field
        if field.transform == "quantiles":
            self._take_sample(numbers[numbers == numbers])
            return
        if field.transform == "standardize":  # Chan, Golub and LeVeque (1979): moments of two parts
            some = numbers[numbers == numbers]
            if len(some):
                mean, rows = some.mean(), self.rows + len(some)
                step = mean - self.mean
                self.squares += ((some - mean) ** 2).sum() + step**2 * self.rows * len(some) / rows
                self.mean += step * len(some) / rows
                self.rows, self.present = rows, rows
            return
        self.present += int(np.count_nonzero(numbers)) - int(np.count_nonzero(numbers != numbers))

    def _take_sample(self, numbers):
        """Keeps a uniform sample of what was seen (Vitter 1985, algorithm R, of whole tables)."""
        room = max(0, SAMPLE - len(self.sample))
        first, rest = numbers[:room], numbers[room:]
        self.sample = np.concatenate([self.sample, first])
        if len(rest):
            seen = self.rows + len(first) + 1 + np.arange(len(rest))
            places = (self._random.random(len(rest)) * seen).astype(np.int64)
            kept = places < SAMPLE
            self.sample[places[kept]] = rest[kept]  # of two for one place the later stays, as one by one
        self.rows += len(numbers)

    def learned(self):
        """The field, with what was learned of its column."""
        field = dataclasses.replace(self.field)
        if field.kind == "multivalued":
            field.size, field.dtype = max(1, field.max_length or self.longest), "text"
        elif field.kind == "categorical":
            field.dtype = dtype_of(self.kinds)
        elif field.transform == "standardize":
            field.mean = float(self.mean)
            field.deviation = float(np.sqrt(self.squares / self.rows)) if self.squares > 0 else 1.0
        elif field.transform == "quantiles":
            inner = np.quantile(self.sample, np.arange(1, QUANTILES) / QUANTILES) if len(self.sample) else []
            field.boundaries = np.unique(inner).tolist()
        return field

    def updated(self):
        """The field after an update: what its categories come as may have changed."""
        if self.field.kind != "categorical":
            return self.field
        return dataclasses.replace(self.field, dtype=dtype_of(self.kinds | {self.field.dtype}))

    def values(self):
        """The values that occurred often enough, and how many occurrences the others had."""
        found = Values(self.field.number, *self.counter.finish(self.least))
        # Counts are too large where a sketch let values through.
        return found, max(0, self.counter.total - int(found.counts.sum()))

    def block(self, field):
        """Counts of the indices of a run: quantile or hash buckets; None of other fields."""
        if field.buckets is not None:
            return self.buckets
        if field.transform != "quantiles":
            return None
        in_sample = np.bincount(
            np.searchsorted(np.array(field.boundaries), self.sample, side="right"), minlength=len(field.boundaries) + 1
        )
        return np.round(in_sample * (self.rows / max(1, len(self.sample)))).astype(np.int64)


def dtype_of(kinds):
    """What the categories of a column are, by their kinds: a fraction where there are integers too."""
    if kinds == {"fraction", "integer"}:
        return "fraction"
    return next(iter(kinds)) if len(kinds) == 1 else "text"
