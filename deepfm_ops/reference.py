"""The interaction in plain TensorFlow: the fallback where there is no native library, and its oracle."""

from typing import NamedTuple

import tensorflow as tf
from tensorflow.python.ops import resource_variable_ops

from deepfm_ops import arguments


def fm_interaction(table, indices, values=None, *, row_splits=None, output="scalar", name=None) -> tf.Tensor:
    """The second-order term of a factorization machine, in plain TensorFlow.

    Same signature, results and errors as `deepfm_ops.fm_interaction`, which documents them.
    """
    table, pairs = arguments.parse(table, indices, values, row_splits, output)
    with tf.name_scope(name or "fm_interaction"):
        return interaction(table, pairs, output)[0]


class Penalty(NamedTuple):
    """What is added to the gradient of the rows of a batch: factor[u] * row[u], for each unique row u.

        factor[u] = 2 * l2 + occurrences[u] / n * prior / B,  n = counts[u]

    Occurrences are pairs with a value other than zero; a count of zero is one. The second summand is the gradient of a
    normal prior of precision `prior` under a loss that is the mean over the batch: over a pass that meets a feature as
    often as it was counted, all of the prior. With a softness r > 0 it is r / (r + n) of it: little for frequent rows.
    """

    l2: float = 0.0
    l2_linear: float = 0.0  # of the first-order weights
    counts: tf.Tensor | None = None  # int32 [V]
    priors: tf.Tensor | None = None  # float32 [3], with counts: precisions for the table and the weights, softness

    def __bool__(self):
        return self.counts is not None or bool(self.l2 or self.l2_linear)

    def factors(self, pairs, unique, position, dtype):
        """[U, 1] or a number each, of the table's rows and of the weights'; dtype: that of sums."""
        if self.counts is None:
            return 2 * self.l2, 2 * self.l2_linear
        present = tf.ones(tf.shape(position), dtype) if pairs.values is None else tf.cast(pairs.values != 0, dtype)
        flat = tf.reshape(position, [-1])
        occurrences = tf.math.unsorted_segment_sum(tf.reshape(present, [-1]), flat, tf.size(unique))
        n = tf.maximum(tf.cast(tf.gather(self.counts, unique), dtype), 1)
        *priors, softness = tf.unstack(tf.cast(self.priors, dtype))
        share = occurrences / n * tf.where(softness > 0, softness / (softness + n), 1)
        samples = tf.shape(pairs.indices)[0] if pairs.row_splits is None else tf.size(pairs.row_splits) - 1
        per_sample = share[:, tf.newaxis] / tf.cast(samples, dtype)
        return 2 * self.l2 + per_sample * priors[0], 2 * self.l2_linear + per_sample * priors[1]


NO_PENALTY = Penalty()


def interaction(table, pairs, output, field_splits=(), weights=None, penalty=NO_PENALTY, forward_only=False, **kind):
    """What the native op computes: (interaction, embeddings, linear, penalty).

    Args:
        table: tf.Variable or Tensor [V, K].
        pairs: `arguments.Pairs`.
        output: "scalar", "vector", or "sum": the sums of the embeddings, [B, K].
        field_splits: ints [F + 1] over the columns of dense indices: the columns of a field are summed.
            Empty: every pair is a field.
        weights: first-order weights, tf.Variable or Tensor [V, 1], or None.
        penalty: `Penalty`.
        forward_only: read a row where it occurs. Faster, but gradients would repeat rows, and there is no penalty.
        **kind: `order` and `field_weights`, see `interact`.

    Returns:
        interaction: [B, 1] for "scalar", else [B, K]; float64 for a float64 table, else float32.
        embeddings: [B, F, K], or [nnz, K] with row_splits, same dtype.
        linear: the first order, [B, 1], same dtype; None without weights.
        penalty: scalar, to be added to the loss: its gradient is the penalty's, its value is zero; None without one.

    """
    pairs = _checked(pairs, _num_rows(table))
    if forward_only:
        weight_rows = None if weights is None else _rows(weights, pairs.indices)
        return *formula(_rows(table, pairs.indices), pairs, output, field_splits, weight_rows, **kind), None
    # Gathering each row once makes the gradients of the tables unique and ascending.
    flat = tf.reshape(pairs.indices, [-1])
    unique = tf.sort(tf.unique(flat).y)
    position = tf.reshape(tf.searchsorted(unique, flat), tf.shape(pairs.indices))
    rows = _rows(table, unique)
    weight_rows = None if weights is None else _rows(weights, unique)
    silent = None
    if penalty:
        factor, factor_linear = penalty.factors(pairs, unique, position, rows.dtype)
        silent = _silent(rows, factor)
        silent += 0 if weights is None else _silent(weight_rows, factor_linear)
    weight_rows = None if weights is None else tf.gather(weight_rows, position)
    return *formula(tf.gather(rows, position), pairs, output, field_splits, weight_rows, **kind), silent


def formula(rows, pairs, output, field_splits=(), weight_rows=None, order=2, field_weights=None):
    """`interaction`, from the row of each pair, `rows` [B, P, K] or [nnz, K], and its weight, [.., 1].

    See `interact`, of the rows times their values.
    """
    embeddings = rows if pairs.values is None else rows * pairs.values[..., tf.newaxis]
    if len(field_splits) and list(field_splits) != list(range(len(field_splits))):
        bounds = zip(field_splits[:-1], field_splits[1:], strict=True)
        embeddings = tf.stack([tf.reduce_sum(embeddings[:, a:b], axis=1) for a, b in bounds], axis=1)
    add = _over_fields
    if pairs.row_splits is not None:
        samples = tf.size(pairs.row_splits) - 1
        sample_of_pair = tf.repeat(tf.range(samples), pairs.row_splits[1:] - pairs.row_splits[:-1])
        add = lambda x: tf.math.unsorted_segment_sum(x, sample_of_pair, samples)  # noqa: E731
    linear = None
    if weight_rows is not None:
        linear = add(weight_rows if pairs.values is None else weight_rows * pairs.values[..., tf.newaxis])
    return interact(embeddings, output, order, field_weights, add), embeddings, linear


def _over_fields(x):
    return tf.reduce_sum(x, axis=1)


def interact(embeddings, output, order=2, field_weights=None, add=_over_fields):
    """The interaction of embeddings [B, F, K], [B, K] or, for "scalar", [B, 1]; or of [nnz, K] that `add` adds up.

    Rendle, "Factorization Machines", 2010: the sum over pairs of fields of their products is half of
    (square of the sum - sum of the squares). With an `order` of 3 the sum over triples is added, by Newton's identity:
    (p1^3 - 3 p1 p2 + 2 p3) / 6 with the sums p1, p2 and p3 of the embeddings, their squares and cubes; Blondel et al.,
    "Higher-Order Factorization Machines", 2016, with one table for all orders. With `field_weights` [F * (F - 1) / 2]
    every pair of fields f > h is weighted by element f * (f - 1) / 2 + h; Pan et al., "Field-weighted Factorization
    Machines", 2018.
    """
    sums = add(embeddings)
    if output == "sum":
        return sums
    if field_weights is not None:
        vector = add(embeddings * tf.matmul(_lower_triangle(field_weights, tf.shape(embeddings)[1]), embeddings))
    else:
        squares = add(tf.square(embeddings))
        vector = 0.5 * (tf.square(sums) - squares)
        if order == 3:
            vector += (sums**3 - 3 * sums * squares + 2 * add(embeddings**3)) / 6
    return vector if output == "vector" else tf.reduce_sum(vector, axis=1, keepdims=True)


def _lower_triangle(elements, size):
    """The matrix [size, size] with these elements below its diagonal, row by row."""
    places = tf.where(tf.range(size)[:, tf.newaxis] > tf.range(size))
    return tf.scatter_nd(places, elements, tf.cast([size, size], tf.int64))


def _num_rows(table):
    """V as int64, without reading a variable: that would copy the table."""
    if table.shape.rank == 2 and table.shape[0] is not None:
        return tf.constant(table.shape[0], tf.int64)
    if isinstance(table, tf.Variable):
        return resource_variable_ops.variable_shape(table.handle, tf.int64)[0]
    return tf.shape(table, tf.int64)[0]


def _rows(table, indices):
    rows = tf.gather(table, indices)
    return tf.cast(rows, arguments.accumulation_dtype(rows.dtype))


def silent_penalty(table, unique, factor):
    """Zero, with the gradient factor [U, 1] * row for the rows [U] of a table."""
    return _silent(_rows(table, unique), factor)


def _silent(rows, factor):
    """Zero, with the gradient factor * rows."""
    silent = tf.custom_gradient(lambda x: (tf.zeros([], x.dtype), lambda g: g * tf.cast(factor, x.dtype) * x))
    return silent(rows)


def _checked(pairs, num_rows):
    """The pairs, once every index is known to be in [0, num_rows) and the row_splits to be sound."""
    indices, values, row_splits = pairs
    if row_splits is None:
        want = "indices must be rank 2 [B, F], or rank 1 with row_splits; got shape {}"
        indices = _with_rank(indices, 2, want)
    else:
        indices = _with_rank(indices, 1, "indices must be rank 1 [nnz] with row_splits, got shape {}")
        row_splits = _with_rank(row_splits, 1, "row_splits must be rank 1 [B + 1], got shape {}")
    checks = []
    if values is not None and not (values.shape.is_fully_defined() and indices.shape.is_fully_defined()):
        text = "values must have the shape of indices, {}, got {}"
        shapes = lambda: (tf.shape(indices), tf.shape(values))  # noqa: E731
        with tf.control_dependencies(arguments.require(tf.equal(tf.rank(values), tf.rank(indices)), text, shapes)):
            shape = tf.shape(values)
        same = tf.reduce_all(tf.equal(tf.reshape(shape, tf.shape(tf.shape(indices))), tf.shape(indices)))
        checks += arguments.require(same, text, shapes)
    if row_splits is not None:
        checks += _row_splits_checks(row_splits, tf.size(indices, tf.int64))
    with tf.control_dependencies(checks):  # what follows uses all three, so none may be read before
        wide = tf.cast(indices, tf.int64)
        values = None if values is None else tf.identity(values)
        row_splits = None if row_splits is None else tf.identity(row_splits)
        bad = tf.logical_or(wide < 0, wide >= num_rows)

    def first_bad():
        first = tf.argmax(tf.cast(tf.reshape(bad, [-1]), tf.int32))
        index = tf.reshape(wide, [-1])[first]
        if row_splits is not None:
            return first, index, num_rows
        columns = tf.shape(indices, tf.int64)[1]
        return first // columns, first % columns, index, num_rows

    where = "{}" if row_splits is not None else "{},{}"
    text = f"indices[{where}] = {{}} is not in [0, {{}})"
    with tf.control_dependencies(arguments.require(tf.logical_not(tf.reduce_any(bad)), text, first_bad)):
        return arguments.Pairs(tf.identity(indices), values, row_splits)


def _with_rank(x, rank, text):
    """The tensor, once its rank is known to be `rank`."""
    if x.shape.rank is None:
        with tf.control_dependencies(arguments.require(tf.equal(tf.rank(x), rank), text, lambda: (tf.shape(x),))):
            x = tf.identity(x)
        x.set_shape([None] * rank)
    return x


def _row_splits_checks(row_splits, nnz):
    filled = arguments.require(
        tf.size(row_splits) > 0, "row_splits must be rank 1 [B + 1], got shape {}", lambda: (tf.shape(row_splits),)
    )
    with tf.control_dependencies(filled):
        row_splits = tf.identity(row_splits)
    last = tf.size(row_splits) - 1
    steps = row_splits[1:] - row_splits[:-1]

    def first_decrease():
        i = tf.argmax(tf.cast(steps < 0, tf.int32))
        return i, row_splits[i], i + 1, row_splits[i + 1]

    starts = arguments.require(
        row_splits[0] == 0, "row_splits must start at 0, got row_splits[0] = {}", lambda: (row_splits[0],)
    )
    rises = arguments.require(
        tf.reduce_all(steps >= 0),
        "row_splits must not decrease, got row_splits[{}] = {} and row_splits[{}] = {}",
        first_decrease,
    )
    ends = arguments.require(
        row_splits[-1] == nnz,
        "row_splits must end at nnz = {}, got row_splits[{}] = {}",
        lambda: (nnz, last, row_splits[-1]),
    )
    return [*starts, *rises, *ends]
