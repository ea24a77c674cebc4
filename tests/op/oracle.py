"""What `csrc/kernels/fm.h` and `sparse_update.h` define, by the definition, in float64 NumPy.

With every result comes the size of what was summed for it: a bound on its rounding is a small multiple of the sums'
epsilon times that.
"""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Pairs [n], each with its sample and, over all samples, its field; fields have a sample each."""

    indices: np.ndarray
    values: np.ndarray
    sample_of_pair: np.ndarray
    field_of_pair: np.ndarray
    sample_of_field: np.ndarray
    num_samples: int


def batch(indices, values=None, row_splits=None, field_splits=None):
    """The batch of fm_forward's arguments."""
    flat = np.ravel(indices).astype(np.int64)
    values = np.ones(flat.size) if values is None else np.ravel(values).astype(np.float64)
    if row_splits is not None:
        num_samples = len(row_splits) - 1
        sample = np.repeat(np.arange(num_samples), np.diff(row_splits))
        return Batch(flat, values, sample, np.arange(flat.size), sample, num_samples)
    num_samples, pairs = np.shape(indices)
    splits = np.arange(pairs + 1) if field_splits is None else np.asarray(field_splits)
    fields = len(splits) - 1
    field = np.repeat(np.arange(fields), np.diff(splits))  # of the pairs of one sample
    sample = np.repeat(np.arange(num_samples), pairs)
    field_of_pair = (np.arange(num_samples)[:, None] * fields + field).ravel()
    return Batch(flat, values, sample, field_of_pair, np.repeat(np.arange(num_samples), fields), num_samples)


def added(places, summands, size):
    """Sums of the summands of equal places, and of their sizes."""
    sums, sizes = np.zeros((2, size, *summands.shape[1:]))
    np.add.at(sums, places, summands)
    np.add.at(sizes, places, np.abs(summands))
    return sums, sizes


def before(batch, field):
    """The fields of its sample that stand before a field."""
    return (batch.sample_of_field[:field] == batch.sample_of_field[field]).nonzero()[0]


def forward(table, batch, output, weights=None, order=2, field_weights=None):
    """{name: (result, size)} of the interaction, the sums, the embeddings, and the linear part of the weights."""
    table, x = np.asarray(table, np.float64), batch.values[:, None]
    embeddings = added(batch.field_of_pair, x * table[batch.indices], len(batch.sample_of_field))
    sums = added(batch.sample_of_field, embeddings[0], batch.num_samples)
    size = added(batch.sample_of_field, embeddings[1], batch.num_samples)[0]
    vector, e = np.zeros_like(size), embeddings[0]
    pairs = np.zeros_like(e)  # sums over the pairs of fields that stand before a field
    for field, sample in enumerate(batch.sample_of_field):  # all pairs and triples of fields: with those before
        earlier = before(batch, field)
        n = len(earlier)
        r = np.ones((n, 1)) if field_weights is None else field_weights[n * (n - 1) // 2 :][:n, None]
        vector[sample] += e[field] * (r * e[earlier]).sum(0)
        if order == 3:
            pairs[field] = sum((e[i] * e[before(batch, i)].sum(0) for i in earlier), np.zeros(e.shape[1]))
            vector[sample] += e[field] * pairs[field]
    largest = size**2 * (1 if field_weights is None else np.abs(field_weights).max(initial=1))
    largest = largest + size**3 if order == 3 else largest
    interaction = {
        "sum": (sums[0], size),
        "vector": (vector, largest),
        "scalar": (vector.sum(1, keepdims=True), largest.sum(1, keepdims=True)),
    }[output]
    found = {"interaction": interaction, "sums": (sums[0], size), "embeddings": embeddings}
    if weights is not None:
        found["linear"] = added(
            batch.sample_of_pair, x * np.asarray(weights, np.float64)[batch.indices], batch.num_samples
        )
    return found


def gradient(
    table, batch, output, sums, embeddings, d_interaction, d_embeddings=None, weights=None, d_linear=None, pull=(0, 0),
    order=2, field_weights=None,
):  # fmt: skip
    """{name: (result, size)} of the unique rows and their gradient, of the weights' and of the values'.

    Sums [B, K] and embeddings [fields, K] are taken as they were computed. `pull` times a row, and times a weight, is
    added to their gradients: two numbers, or two arrays [U, 1].
    """
    table, x = np.asarray(table, np.float64), batch.values[:, None]
    unique, group = np.unique(batch.indices, return_inverse=True)
    g = np.asarray(d_interaction, np.float64)[batch.sample_of_pair]
    if output == "sum":
        d, size = g, np.abs(g)
    else:
        s = np.asarray(sums, np.float64)[batch.sample_of_pair]
        e = np.asarray(embeddings, np.float64)[batch.field_of_pair]
        d, size = g * (s - e), np.abs(g) * (np.abs(s) + np.abs(e))
        if order == 3 or field_weights is not None:
            by_fields, sizes = _by_fields(batch, np.asarray(embeddings, np.float64), field_weights)
            d, size = g * by_fields[batch.field_of_pair], np.abs(g) * sizes[batch.field_of_pair]
    if d_embeddings is not None:
        de = np.asarray(d_embeddings, np.float64)[batch.field_of_pair]
        d, size = d + de, size + np.abs(de)
    rows = added(group, x * d, len(unique))[0] + pull[0] * table[unique]
    row_sizes = added(group, x * size, len(unique))[1] + np.abs(pull[0] * table[unique])
    of_pairs = table[batch.indices]
    values, value_sizes = (of_pairs * d).sum(1), (np.abs(of_pairs) * size).sum(1)
    found = {"unique": (unique, 0), "rows": (rows, row_sizes)}
    if weights is not None:
        weights, dl = np.asarray(weights, np.float64), np.asarray(d_linear, np.float64)[batch.sample_of_pair]
        weight_rows, weight_sizes = added(group, x * dl, len(unique))
        pulled = pull[1] * weights[unique]
        found["weights"] = weight_rows + pulled, weight_sizes + np.abs(pulled)
        linear = (weights[batch.indices] * dl)[:, 0]
        values, value_sizes = values + linear, value_sizes + np.abs(linear)
    found["values"] = values, value_sizes
    return found


def _by_fields(batch, e, field_weights):
    """(derivatives of the interaction by each field's embedding, their sizes), of an order of 3 or with weights."""
    found, sizes = np.zeros_like(e), np.zeros_like(e)
    for sample in range(batch.num_samples):
        fields = (batch.sample_of_field == sample).nonzero()[0]
        for f, field in enumerate(fields):
            others = [(h, other) for h, other in enumerate(fields) if h != f]
            size = np.abs(e[fields]).sum(0)
            if field_weights is None:
                done = np.zeros(e.shape[1])
                for _, other in others:
                    found[field] += e[other] + e[other] * done
                    done += e[other]
                sizes[field] = size + 2 * size**2
            else:
                r = [field_weights[max(f, h) * (max(f, h) - 1) // 2 + min(f, h)] for h, _ in others]
                found[field] = sum((w * e[o] for w, (_, o) in zip(r, others, strict=True)), np.zeros(e.shape[1]))
                sizes[field] = size * np.abs(r).max(initial=1)
    return found, sizes


def first_bad(indices, num_rows):
    """The position of the first index outside [0, num_rows), as messages have it; None: there is none."""
    bad = np.argwhere((np.asarray(indices) < 0) | (np.asarray(indices) >= num_rows))
    return ",".join(map(str, bad[0])) if len(bad) else None


def updated(rule, hyper, rows, slots, gradient):
    """(the rows, their slots) after an update, each with its size, by the formulas of sparse_update.h.

    Args:
        rule: the op's name of it.
        hyper: the rule's numbers, the decay first.
        rows: [U, K] of the table.
        slots: as many as the rule has, of these rows.
        gradient: [U, K], of equal indices the sum.

    """
    decay, rate, *rest = map(float, hyper)
    p, g = rows - rows * decay, gradient
    size = np.abs(rows) * (1 + abs(decay))
    if rule == "sgd":
        return (p - g * rate, size + np.abs(g * rate)), []
    if rule == "adagrad":
        s = slots[0] + g**2
        move = g * rate / np.sqrt(s + rest[0])
        return (p - move, size + np.abs(move)), [(s, s)]
    if rule == "row_wise_adagrad":
        s = slots[0] + (g**2).mean(1)
        move = (rate / (np.sqrt(s) + rest[0]))[:, None] * g
        return (p - move, size + np.abs(move)), [(s, s)]
    if rule == "lazy_adam":
        not_beta_1, not_beta_2, epsilon = rest
        m = slots[0] + (g - slots[0]) * not_beta_1
        v = slots[1] + (g**2 - slots[1]) * not_beta_2
        m_size = np.abs(slots[0]) + np.abs(g) * not_beta_1
        scale = rate / (np.sqrt(v) + epsilon)
        return (p - m * scale, size + m_size * scale), [(m, m_size), (v, slots[1] + g**2 * not_beta_2)]
    power, l1, l2, shrinkage = rest  # ftrl
    n = slots[0] + g**2
    before, after = slots[0] ** -power, n**-power
    z = slots[1] + g + 2 * shrinkage * p - (after - before) / rate * p
    z_size = np.abs(slots[1]) + np.abs(g) + 2 * shrinkage * np.abs(p) + (after + before) / rate * np.abs(p)
    scale = after / rate + 2 * l2
    return ((np.clip(z, -l1, l1) - z) / scale, (z_size + l1) / scale), [(n, n), (z, z_size)]
