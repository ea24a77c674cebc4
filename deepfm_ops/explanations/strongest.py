"""The pairs of features that add up most over a stream, in bounded memory."""

import numpy as np


class Strongest:
    """Sums of the terms of pairs, for the pairs whose sums are the largest.

    It is space-saving (Metwally, Agrawal and El Abbadi, "Efficient computation of frequent and top-k elements in data
    streams", ICDT 2005) with weights, by whole batches: at least `capacity` pairs are kept; one that comes in may have
    been dropped before, with a sum of at most the largest that was ever dropped. So

        strength <= the sum of absolute terms <= strength + missed

    for each pair, no pair that is not kept has more than the largest sum that was dropped, and that is at most
    (the sum of all absolute terms) / capacity. As long as there are no more different pairs than capacity, nothing is
    dropped and everything is exact.

    Args:
        num_features: features are numbered below it.
        capacity: pairs that are kept, of 40 bytes; between two cuts, twice as many.

    """

    def __init__(self, num_features, capacity=1 << 17):
        if num_features > 3_000_000_000:  # the square root of what int64 holds
            raise ValueError(f"pairs of {num_features:,} features cannot be numbered: leave them out, by top=0")
        self._features, self._capacity = max(1, num_features), capacity
        self._keys, self._sums = np.zeros(0, np.int64), np.zeros((0, 4))  # sum of |term|, of terms, number, missed
        self.dropped = 0.0

    def add(self, first, second, terms):
        """Counts terms of pairs of features; those of zero, as of what is missing, are none."""
        there = np.flatnonzero(terms)
        first, second, terms = first.ravel()[there], second.ravel()[there], terms.ravel()[there].astype(np.float64)
        if not len(terms):
            return
        keys = np.minimum(first, second) * self._features + np.maximum(first, second)
        order = np.argsort(keys)
        keys, terms = keys[order], terms[order]
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        keys, ends = keys[starts], np.append(starts[1:], len(keys))
        found = [np.add.reduceat(x, starts) for x in (np.abs(terms), terms)]
        rows = np.stack([*found, ends - starts, np.full(len(keys), self.dropped)], axis=1)
        at = np.searchsorted(self._keys, keys)
        known = np.zeros(len(keys), bool)
        inside = at < len(self._keys)
        known[inside] = self._keys[at[inside]] == keys[inside]
        self._sums[at[known], :3] += rows[known, :3]
        # Both are sorted: `insert` keeps the order.
        self._sums = np.insert(self._sums, at[~known], rows[~known], axis=0)
        self._keys = np.insert(self._keys, at[~known], keys[~known])
        if len(self._keys) > 2 * self._capacity:
            self._cut()

    def _cut(self):
        most = self._sums[:, 0] + self._sums[:, 3]
        kept = np.argpartition(-most, self._capacity - 1)[: self._capacity]
        is_kept = np.zeros(len(most), bool)
        is_kept[kept] = True
        self.dropped = max(self.dropped, float(most[~is_kept].max()))
        self._keys, self._sums = self._keys[is_kept], self._sums[is_kept]

    def top(self, count):
        """[(first, second, sum of |term|, sum of terms, number of samples, missed)], the largest sums first."""
        order = np.lexsort((self._keys, -self._sums[:, 0]))[:count]
        pairs = zip(self._keys[order].tolist(), self._sums[order].tolist(), strict=True)
        return [(*divmod(key, self._features), *sums) for key, sums in pairs]
