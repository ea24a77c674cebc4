"""What `explain` gives: arrays, texts, pictures."""

from typing import NamedTuple

import numpy as np

from deepfm_ops.explanations import drawing
from deepfm_ops.explanations.terms import Terms

SHOWN = 15  # terms of a text
SAMPLES = 3  # samples of a text


class Explanation:
    """The terms of some samples.

        logit[b] = bias + sum of first_order[b] + sum of pairs[b] + triples[b] + deep[b]

    `len` is the number of samples, n; `explanation[b]`, `explanation[a:b]` are those of some of them.

    Attributes:
        head: the number that is explained, as `explain` takes it; None of the only one, where it has no name.
        task: what it is, "binary", "regression" or "multiclass".
        bias: float.
        first_order: [n, T], a term for each index column of the model's first order, and each number of its dense
            columns.
        first_order_fields: the name of each one's field, [T]; a multi-valued field has several columns.
        fields: names of the fields that have embeddings, [F].
        pairs: [n, M], the second order of each pair of fields that interact.
        pair_fields: int [M, 2], each pair's positions in `fields`.
        triples: [n], what all triples of fields add together; zeros of a model of order 2.
        deep: [n]; zeros of a model without a deep part.
        logit: float64 [n], the sum.
        score: [n], what the model predicts: the sum for "regression", its sigmoid for "binary", of a class of
            "multiclass" its probability.

    """

    def __init__(self, side, terms, batches, probabilities=None):
        self._side, self._terms, self._batches, self._probabilities = side, terms, batches, probabilities
        self.task, self.bias = side.task, side.bias
        self.first_order, self.pairs, self.triples, self.deep = terms
        self.fields, self.pair_fields = side.fields, side.pair_fields
        self.first_order_fields = side.first_order_fields
        self.logit = side.logits(terms)

    @property
    def head(self):
        return self._side.number.key

    @property
    def score(self):
        if self._probabilities is not None:
            return self._probabilities
        if self.task != "binary":
            return self.logit
        return 1 / (1 + np.exp(-np.clip(self.logit, -700, 700)))

    def __len__(self):
        return len(self.logit)

    def __getitem__(self, samples):
        if not isinstance(samples, slice):
            samples = self._row(samples)
            samples = slice(samples, samples + 1)
        rows = range(len(self))[samples]
        terms = Terms(*(part[samples] for part in self._terms))
        probabilities = None if self._probabilities is None else self._probabilities[samples]
        return Explanation(self._side, terms, _Some(self._batches, rows), probabilities)

    def matrix(self, sample=0):
        """The second order of one sample as a symmetric matrix [F, F], with zeros where fields do not interact."""
        return matrix(len(self.fields), self.pair_fields, self.pairs[self._row(sample)])

    def labels(self, sample=0):
        """What a sample holds, in the features' names: of each term of the first order, [T], and each field, [F]."""
        return self._batches.labels(self._row(sample))

    def _row(self, sample):
        """A position that may count from the end as one from the start."""
        try:
            return range(len(self))[sample]
        except IndexError:
            raise IndexError(f"sample {sample} is not one of the {len(self)} that were explained") from None

    def table(self, sample=0):
        """The terms of one sample, largest first, as columns for `pandas.DataFrame`: "part", "term" and "value".

        Parts are "bias", "first order", "pair", "triples" and "deep"; terms of exactly zero are left out.
        """
        first, fields = self.labels(sample)
        rows = [("bias", "bias", self.bias), ("deep", "deep part", float(self.deep[sample]))]
        rows.append(("triples", "triples of fields", float(self.triples[sample])))
        rows += [("first order", name, x) for name, x in zip(first, self.first_order[sample].tolist(), strict=True)]
        pairs = zip(self.pair_fields.tolist(), self.pairs[sample].tolist(), strict=True)
        rows += [("pair", f"{fields[a]} x {fields[b]}", x) for (a, b), x in pairs if x]
        rows = largest_first(rows)
        return {name: [row[i] for row in rows] for i, name in enumerate(("part", "term", "value"))}

    def __str__(self):
        parts = [self._text(sample) for sample in range(min(SAMPLES, len(self)))]
        if len(self) > SAMPLES:
            parts.append(f"and {len(self) - SAMPLES:,} more samples")
        return "\n".join(parts) if parts else "no samples"

    __repr__ = __str__

    def _text(self, sample):
        table = self.table(sample)
        terms, values = table["term"], table["value"]
        shown = zip(map(drawing.on_one_line, terms[:SHOWN]), values[:SHOWN], strict=True)
        lines = [f"  {value:+9.4f}  {term}" for term, value in shown]
        if len(terms) > SHOWN:
            lines.append(f"  {sum(values[SHOWN:]):+9.4f}  {len(terms) - SHOWN} smaller terms")
        what = "prediction" if self.task == "regression" else "probability"
        title = f"logit {self.logit[sample]:+.4f}, {what} {self.score[sample]:.4f}"
        return "\n".join([titled(self._side.number.label, title), *lines])

    def plot(self, path, sample=0):
        """Draws one sample: a heat map of its fields, and bars of its largest terms.

        Args:
            path: of the picture, .png or what else matplotlib writes.
            sample: its position.

        Raises:
            ImportError: matplotlib is not there.

        """
        table, (_, fields) = self.table(sample), self.labels(sample)
        bars = list(zip(table["term"], table["value"], strict=True))
        title = titled(self._side.number.label, f"logit {self.logit[sample]:+.3f}")
        drawing.draw(path, title, fields, self.matrix(sample), [("largest terms", bars)])


class Batches:
    """The samples of batches, by their position in all of them."""

    def __init__(self, batches):
        self._batches = batches

    def labels(self, sample):
        for batch in self._batches:
            if sample < len(batch):
                return batch.labels(sample)
            sample -= len(batch)
        raise IndexError(sample)


class _Some:
    """Some samples of others."""

    def __init__(self, batches, rows):
        self._batches, self._rows = batches, rows

    def labels(self, sample):
        return self._batches.labels(self._rows[sample])


class FeaturePair(NamedTuple):
    """A pair of features over a data set.

    Attributes:
        first, second: names.
        strength: sum of its absolute terms, by the number of all samples.
        mean: sum of its terms, by the number of all samples.
        occurrences: terms that were counted.
        missed: at most how much more the strength is; 0: it is exact. See `strongest.Strongest`.

    """

    first: str
    second: str
    strength: float
    mean: float
    occurrences: int
    missed: float


class Summary:
    """The strength of terms over a data set.

    Attributes:
        num_samples: int, n.
        head, task, bias, fields, pair_fields: as of an `Explanation`.
        pairs: [M], the mean of the second order of each pair of fields.
        pairs_strength: [M], the mean of its absolute value.
        linear_fields: names of the fields of the first order, [L].
        first_order, first_order_strength: [L], likewise, of the sum of a field's first-order terms.
        triples, triples_strength, deep, deep_strength: float, likewise.
        logit: float, the mean.
        feature_pairs: list of `FeaturePair`, the strongest first.
        missed: float, at most what the strength of a pair of features is that is not among those that were counted; 0
            where all were.

    """

    def __init__(self, side, total, top=0):
        self._label, n = side.number.label, total.samples
        self.num_samples, self.head, self.task, self.bias = n, side.number.key, side.task, side.bias
        self.fields, self.pair_fields = side.fields, side.pair_fields
        self.linear_fields = total.linear_fields
        means = [(sums / n, absolute / n) for sums, absolute in total.sums]
        (self.first_order, self.first_order_strength), (self.pairs, self.pairs_strength), triples, deep = means
        self.triples, self.triples_strength = map(float, triples)
        self.deep, self.deep_strength = map(float, deep)
        self.logit = float(self.bias + self.first_order.sum() + self.pairs.sum() + self.triples + self.deep)
        self.feature_pairs, self.missed = [], 0.0
        if total.strongest is not None:
            self.missed = total.strongest.dropped / n
            for *pair, absolute, signed, number, missed in total.strongest.top(top):
                known = map(side.names.feature, sorted(pair, key=side.names.place))
                self.feature_pairs.append(FeaturePair(*known, absolute / n, signed / n, int(number), missed / n))

    def matrix(self, strength=True):
        """The pairs of fields as a symmetric matrix [F, F]: their strengths, or their means."""
        return matrix(len(self.fields), self.pair_fields, self.pairs_strength if strength else self.pairs)

    def table(self):
        """Fields, pairs of fields, triples and the deep part, strongest first, as columns for `pandas.DataFrame`.

        The columns are "part" ("first order", "pair", "triples" or "deep"), "term", "strength" and "mean".
        """
        rows = [("deep", "deep part", self.deep_strength, self.deep)]
        rows.append(("triples", "triples of fields", self.triples_strength, self.triples))
        firsts = zip(self.linear_fields, self.first_order_strength.tolist(), self.first_order.tolist(), strict=True)
        rows += [("first order", *row) for row in firsts]
        names = [f"{self.fields[a]} x {self.fields[b]}" for a, b in self.pair_fields.tolist()]
        rows += [("pair", *row) for row in zip(names, self.pairs_strength.tolist(), self.pairs.tolist(), strict=True)]
        rows = largest_first(rows)
        return {name: [row[i] for row in rows] for i, name in enumerate(("part", "term", "strength", "mean"))}

    def __str__(self):
        title = f"{self.num_samples:,} samples, mean logit {self.logit:+.4f}, bias {self.bias:+.4f}"
        lines = [titled(self._label, title)]
        lines.append("  strength      mean  term")
        table = self.table()
        shown = list(zip(table["strength"], table["mean"], table["term"], strict=True))
        lines += [f"  {strength:8.4f} {mean:+9.4f}  {term}" for strength, mean, term in shown[:SHOWN]]
        if len(shown) > SHOWN:
            lines.append(f"  and {len(shown) - SHOWN} weaker terms")
        if self.feature_pairs:
            lines.append("  strength      mean  pair of features")
        pairs = [(p.strength, p.mean, drawing.on_one_line(f"{p.first} x {p.second}")) for p in self.feature_pairs]
        lines += [f"  {strength:8.4f} {mean:+9.4f}  {name}" for strength, mean, name in pairs]
        return "\n".join(lines)

    __repr__ = __str__

    def plot(self, path):
        """Draws a heat map of the fields, and bars of terms and of pairs of features; see `Explanation.plot`.

        The length of a bar is a strength; its colour says whether the mean is above or below zero.
        """
        table = self.table()
        bars = list(zip(table["term"], np.copysign(table["strength"], table["mean"]).tolist(), strict=True))
        pairs = [(f"{p.first} x {p.second}", float(np.copysign(p.strength, p.mean))) for p in self.feature_pairs]
        groups = [("strongest terms", bars), *([("strongest pairs of features", pairs)] if pairs else [])]
        title = titled(self._label, f"mean absolute second order of {self.num_samples:,} samples")
        drawing.draw(path, title, self.fields, self.matrix(), groups, is_strength=True)


class Totals:
    """The sums that a `Summary` is made of."""

    def __init__(self, side, strongest):
        self.linear_fields = list(dict.fromkeys(side.first_order_fields))
        place = {field: number for number, field in enumerate(self.linear_fields)}
        self._owner = np.array([place[field] for field in side.first_order_fields], np.int64)
        self.samples, self.strongest = 0, strongest
        sizes = [(len(self.linear_fields),), (len(side.pair_fields),), (), ()]
        self.sums = [(np.zeros(size), np.zeros(size)) for size in sizes]

    def add(self, terms):
        first_order, pairs, triples, deep = (part.astype(np.float64, copy=False) for part in terms)
        by_field = np.zeros((len(deep), len(self.linear_fields)))
        np.add.at(by_field, (slice(None), self._owner), first_order)
        self.samples += len(deep)
        parts = zip(self.sums, (by_field, pairs, triples, deep), strict=True)
        self.sums = [(s + x.sum(axis=0), a + np.abs(x).sum(axis=0)) for (s, a), x in parts]


def largest_first(rows):
    """Rows (., ., value ...) whose value is not zero, the largest absolute ones first, and NaN before them."""
    return sorted((row for row in rows if row[2]), key=lambda row: -abs(row[2]) if row[2] == row[2] else -np.inf)


def titled(label, text):
    """A text of one number, under its name if it has one."""
    return f"{label}: {text}" if label else text


def matrix(size, pair_fields, pairs):
    """Pairs as a symmetric matrix; those of fields that interact twice are added."""
    found = np.zeros((size, size), pairs.dtype)
    np.add.at(found, (pair_fields[:, 0], pair_fields[:, 1]), pairs)
    return found + found.T
