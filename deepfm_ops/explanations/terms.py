"""The terms of a sum, on NumPy arrays. Where rows and the deep part come from, and how things are called, a side knows.

With e[b,p,:] = values[b,p] * table[indices[b,p], :] of index column p, and e[b,f,:] the sum of a field's columns:

    logit[b] = bias + sum over p of values[b,p] * w[indices[b,p]]
             + sum over pairs of fields f < g of r[f,g] < e[b,f,:], e[b,g,:] >
             + sum over triples of fields f < g < h of < e[b,f,:], e[b,g,:], e[b,h,:] > + deep[b]

r is 1 without field weights, and triples are of an order of 3. Of a model with H numbers a sample it is one of them, j:
with bias[j], w[., j], column j of what ends the deep part, and < > sums elements' products times P[., j] of the
projection P [K, H].

The second order of a pair of fields is in turn the sum of r[f,g] < e[b,p,:], e[b,q,:] > over p of f and q of g: terms
of pairs of features. Two values of one field make none. Of a field that is pooled by its maximum, e[b,p,:] holds those
elements of p that are the maximum, the first of equal ones, and 0 elsewhere, so that the sums hold there too.
"""

import copy
from typing import NamedTuple

import numpy as np

from deepfm_ops import forks, heads


class Bag(NamedTuple):
    """The index columns [start, stop) that make one field, and what is added to their indices to number features."""

    field: str
    start: int
    stop: int
    is_max: bool = False
    shift: int = 0


class Layout:
    """The fields of one table.

    Attributes:
        bags: a `Bag` of each field, in the order of the columns.
        fields: their names.
        is_plain: whether a column is a field, everywhere.
        shift: int64 [P].

    """

    def __init__(self, bags):
        self.bags, self.fields = bags, [bag.field for bag in bags]
        self.starts = [bag.start for bag in bags]
        self.is_plain = len(bags) == (bags[-1].stop if bags else 0)
        self.shift = np.concatenate([np.full(bag.stop - bag.start, bag.shift, np.int64) for bag in bags] or [[]])
        self._pooled = [bag for bag in bags if bag.is_max]

    @property
    def column_fields(self):
        """The name of each column's field, [P]."""
        return [bag.field for bag in self.bags for _ in range(bag.start, bag.stop)]

    def parts(self, e, mask):
        """The rows [B, P, K] so that the field's embedding is the sum of its columns, by maximum too."""
        for bag in self._pooled:
            here = e[:, bag.start : bag.stop]
            there = mask[:, bag.start : bag.stop, np.newaxis] > 0
            first = np.where(there, here, -np.inf).argmax(axis=1)[:, np.newaxis]
            wins = np.arange(bag.stop - bag.start)[:, np.newaxis] == first
            e[:, bag.start : bag.stop] = np.where(there & wins, here, 0)
        return e

    def summed(self, e):
        """[B, P, K] to [B, F, K]."""
        return e if self.is_plain else np.add.reduceat(e, self.starts, axis=1)


class Group:
    """Fields that interact, each with all others.

    Args:
        members: (lookup, field) of each.
        layouts: of the lookups.
        is_whole: whether they are all fields of one lookup, in order.
        field_weights: [m (m - 1) / 2], that of fields f > h at f (f - 1) / 2 + h; None: all ones.

    """

    def __init__(self, members, layouts, is_whole, field_weights=None):
        self.members, self.is_whole, self.lookup = members, is_whole, members[0][0]
        self.bags = [layouts[table].bags[field] for table, field in members]
        self.is_plain = all(bag.stop - bag.start == 1 for bag in self.bags)
        owners = np.repeat(np.arange(len(members)), [bag.stop - bag.start for bag in self.bags])
        self.places, self.column_places = _places(np.arange(len(members))), _places(owners)
        self.weights = self.column_weights = None  # of the places
        if field_weights is not None:
            of = lambda h, f: field_weights[f * (f - 1) // 2 + h]  # noqa: E731
            self.weights = of(*self.places[:2])
            self.column_weights = of(owners[self.column_places[0]], owners[self.column_places[1]])

    def fields(self, embeddings):
        """[B, m, K], out of the embeddings [B, F, K] of the lookups."""
        if self.is_whole:
            return embeddings[self.lookup]
        return np.stack([embeddings[table][:, field] for table, field in self.members], axis=1)

    def columns(self, arrays):
        """The index columns of the members, [B, Pm, ...], out of arrays [B, P, ...] of the lookups."""
        if self.is_whole:
            return arrays[self.lookup]
        pairs = zip(self.members, self.bags, strict=True)
        return np.concatenate([arrays[table][:, bag.start : bag.stop] for (table, _), bag in pairs], axis=1)


def _places(owners):
    """(p, q, p * n + q) of the pairs p < q of n things that have not one owner."""
    first, second = np.triu_indices(len(owners), 1)
    apart = owners[first] != owners[second]
    first, second = first[apart], second[apart]
    return first, second, first * len(owners) + second


def _products(e, places, projection, weights):
    """[B, pairs] of e [B, n, K]; with a projection [K] and weights [pairs], unless they are None."""
    left = e if projection is None else e * projection
    with forks.matrix_products:
        products = np.matmul(left, e.transpose(0, 2, 1))
    found = products.reshape(len(e), e.shape[1] ** 2).take(places[2], axis=1)
    return found if weights is None else found * weights


def _triples(e, projection):
    """[B], all triples of e [B, n, K]. By the sums over one and two fields, so that nothing large cancels."""
    ones = np.cumsum(e, axis=1)
    twos = np.cumsum(ones[:, :-1] * e[:, 1:], axis=1)
    vector = (twos[:, :-1] * e[:, 2:]).sum(axis=1)
    return (vector if projection is None else vector * projection).sum(axis=1)


class Terms(NamedTuple):
    """The terms of a batch: first_order [B, T], pairs [B, M], triples [B], deep [B]."""

    first_order: np.ndarray
    pairs: np.ndarray
    triples: np.ndarray
    deep: np.ndarray


class Side:
    """What is asked for terms: a Keras model or a scorer.

    Attributes:
        tasks: what the model predicts, as `heads.plain` gives it.
        biases: [H].
        number: the `heads.Number` that is explained; None until `of_head`, where there are several.
        task: its "binary", "regression" or "multiclass".
        bias: its, float.
        order: of the interactions.
        first_orders, lookups: [(part, Layout)].
        groups: [Group].
        dense_fields: the name of each number of the first order's dense columns.

    A side has
        require(features): raises ValueError for features that are not those of its matrices.
        prepared(inputs): what `pairs_of(prepared, rows)` makes ([(indices, values, mask)] of each encoder, inputs) of,
            with the number of samples as len(), and `labels(row)`.
        rows(part, indices, values): (e [B, P, K], first order [B, P] or None), both times the values. Of a part of the
            first order the first is [B, P, H].
        has_first_order(part): whether `rows` of a lookup give the second.
        dense_terms(inputs): [B, D] of the dense columns of the first order.
        deep(embeddings, inputs): [B], or None.
        probabilities(pairs, inputs): [B], of the class that is explained.

    """

    task, bias, first_orders, lookups, groups, dense_fields = "binary", 0.0, [], [], [], []
    number: heads.Number | None = None

    def of_head(self, key):
        """The side of one number, see `heads.number`."""
        if key is None and self.number is not None:
            return self
        side = copy.copy(self)
        side._choose(heads.number(self.tasks, key))
        return side

    def _choose(self, number):
        self.number, self.task, self.bias = number, number.head.kind, float(self.biases[number.place])
        self._projections = [kernel[:, number.place] for kernel in self._kernels] or [None] * len(self.groups)

    def _arrange(self, tasks, biases, second_order, order, field_weights, projections):
        """Fills in what follows from the layouts. The arguments are as in a `Plan`, with arrays for sources."""
        self._kernels, self.tasks, self.biases, self.order = projections, tasks, biases, order
        layouts = [layout for _, layout in self.lookups]
        starts = np.cumsum([0, *(len(layout.fields) for layout in layouts)]).tolist()
        self.fields = [field for layout in layouts for field in layout.fields]
        self.groups = []
        for entry, weights in zip(second_order, field_weights or [None] * len(second_order), strict=True):
            whole = isinstance(entry, int)
            members = [(entry, field) for field in range(len(layouts[entry].fields))] if whole else entry
            self.groups.append(Group([(table, field) for table, field in members], layouts, whole, weights))
        members = [np.array([starts[table] + field for table, field in group.members]) for group in self.groups]
        self.pair_fields = np.concatenate(
            [np.zeros((0, 2), np.int64)]
            + [np.stack([m[g.places[0]], m[g.places[1]]], axis=1) for m, g in zip(members, self.groups, strict=True)]
        )
        with_linear = [layout for part, layout in self.lookups if self.has_first_order(part)]
        columns = [layout.column_fields for layout in [*(layout for _, layout in self.first_orders), *with_linear]]
        self.first_order_fields = [field for fields in columns for field in fields] + list(self.dense_fields)
        numbers = heads.width(tasks)
        sizes = [len(group.column_places[2]) for group in self.groups]
        self.width = max([numbers * max(1, len(self.first_order_fields)), *sizes])
        if numbers == 1:
            self._choose(heads.number(tasks, None))

    def terms(self, pairs, inputs, strongest=None):
        """The `Terms` of a batch; `strongest`, if given, is told those of pairs of features."""
        first, numbers, columns, embeddings = [], [], [], []
        for part, layout in self.first_orders:
            indices, values, mask = pairs[part.encoder or 0]
            first.append(layout.parts(self.rows(part, indices, values)[0], mask)[..., self.number.place])
        for part, layout in self.lookups:
            indices, values, mask = pairs[part.encoder or 0]
            e, linear = self.rows(part, indices, values)
            if linear is not None:
                first.append(linear)
            columns.append(layout.parts(e, mask))
            embeddings.append(layout.summed(columns[-1]))
            if strongest is not None:
                numbers.append(indices + layout.shift)
        if self.dense_fields:
            first.append(self.dense_terms(inputs))
        batch, deep = len(pairs[0][0]) if pairs else len(next(iter(inputs.values()))), self.deep(embeddings, inputs)
        products, none = [], np.zeros(batch, "f")
        triples = none
        for group, projection in zip(self.groups, self._projections, strict=True):
            fields = group.fields(embeddings)
            products.append(_products(fields, group.places, projection, group.weights))
            if self.order == 3:
                triples = triples + _triples(fields, projection)
            if strongest is not None:
                found = products[-1]
                if not group.is_plain:
                    found = _products(group.columns(columns), group.column_places, projection, group.column_weights)
                here = group.columns(numbers)
                strongest.add(here[:, group.column_places[0]], here[:, group.column_places[1]], found)
        return Terms(
            _side_by_side(first, batch), _side_by_side(products, batch), triples, none if deep is None else deep
        )

    def logits(self, terms):
        """float64 [B]."""
        first_order, pairs, triples, deep = terms
        found = self.bias + first_order.sum(axis=1, dtype=np.float64) + pairs.sum(axis=1, dtype=np.float64) + deep
        return found + triples if self.order == 3 else found


def _side_by_side(parts, batch):
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts, axis=1) if parts else np.zeros((batch, 0), np.float32)
