"""Hypothesis over shapes, dtypes, forms and bad inputs: the op agrees with the reference, or both refuse."""

import hypothesis
import numpy as np
import tensorflow as tf
from hypothesis import strategies as st
from testing import DTYPES

import deepfm_ops
from deepfm_ops import reference

EXPECTED = (ValueError, TypeError, tf.errors.InvalidArgumentError, tf.errors.ResourceExhaustedError)
settings = hypothesis.settings(max_examples=400, deadline=None, derandomize=True, database=None)


@st.composite
def arguments(draw):
    """(table, the other arguments), mostly legal."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = DTYPES[draw(st.sampled_from(list(DTYPES)))]
    num_rows, dim = draw(st.integers(0, 12)), draw(st.integers(0, 40))
    table = tf.cast(rng.normal(size=(num_rows, dim)), dtype)
    acc = np.float64 if dtype == tf.float64 else np.float32
    form = draw(st.sampled_from(["dense", "row_splits", "ragged", "sparse"]))
    samples, fields = draw(st.integers(0, 6)), draw(st.integers(0, 6))
    index_dtype = draw(st.sampled_from([np.int32, np.int64]))
    lengths = np.full(samples, fields) if form == "dense" else rng.integers(0, fields + 1, samples)
    nnz = int(lengths.sum())
    indices = rng.integers(0, max(1, num_rows), nnz).astype(index_dtype)
    if nnz and draw(st.integers(0, 9)) == 0:
        indices[rng.integers(nnz)] = draw(
            st.sampled_from([-1, num_rows, np.iinfo(index_dtype).max, np.iinfo(index_dtype).min])
        )
    values = rng.normal(size=nnz).astype(acc) if draw(st.booleans()) else None
    splits = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    if form == "row_splits" and draw(st.integers(0, 9)) == 0:
        splits[rng.integers(len(splits))] = draw(st.sampled_from([-1, 1, nnz + 1, 2**62]))
    output = draw(st.sampled_from(["scalar", "vector"]))
    shape = (samples, fields)
    if form == "dense":
        made = {"indices": indices.reshape(shape), "values": None if values is None else values.reshape(shape)}
    elif form == "row_splits":
        made = {"indices": indices, "values": values, "row_splits": splits}
    else:
        make = lambda a: tf.RaggedTensor.from_row_splits(a, splits)  # noqa: E731
        if form == "sparse":
            positions = np.array([(b, j) for b, n in enumerate(lengths) for j in range(n)], np.int64).reshape(-1, 2)
            make = lambda a: tf.SparseTensor(positions, a, shape)  # noqa: E731
        made = {"indices": make(indices), "values": None if values is None else make(values)}
    return table, {**made, "output": output}


def outcome(function, table, arguments, variable):
    """The results, or the kind and the text of the error."""
    try:
        table = tf.Variable(table) if variable else table
        with tf.GradientTape() as tape:
            tape.watch(table)
            y = function(table, **arguments)
            loss = tf.reduce_sum(y)
        gradient = tape.gradient(loss, table)
        return y, gradient.indices, tf.cast(gradient.values, y.dtype)
    except EXPECTED as error:
        text = str(getattr(error, "message", error))
        return text[text.find("indices[") :].split(" [Op:")[0] if "indices[" in text else type(error).__name__


@settings
@hypothesis.given(arguments(), st.booleans())
def test_op_and_reference_agree(made, variable):
    table, rest = made
    ours = outcome(deepfm_ops.fm_interaction, table, rest, variable)
    plain = outcome(reference.fm_interaction, table, rest, variable)
    if isinstance(plain, str) or isinstance(ours, str):
        assert ours == plain
        return
    eps = {tf.bfloat16: 1e-2, tf.float16: 2e-3, tf.float32: 2e-5}.get(table.dtype, 1e-12)
    np.testing.assert_allclose(ours[0], plain[0], rtol=1e-4 if eps > 1e-12 else eps, atol=1e-4 if eps > 1e-12 else eps)
    np.testing.assert_array_equal(ours[1], plain[1])
    np.testing.assert_allclose(ours[2], plain[2], rtol=eps, atol=10 * eps)


ANYTHING = st.one_of(
    st.none(),
    st.integers(-3, 3),
    st.text(max_size=2),
    st.lists(st.integers(-2, 5), max_size=4),
    st.lists(st.lists(st.integers(-2, 5), min_size=2, max_size=2), max_size=3),
    st.lists(st.lists(st.floats(width=32), min_size=2, max_size=2), max_size=3),
    st.sampled_from(
        [np.zeros((2, 0)), np.ones((2, 2), ">f4"), np.ones((2, 2), complex), np.array(["a"]), tf.ones((2, 2, 2))]
    ),
)


@settings
@hypothesis.given(ANYTHING, ANYTHING, ANYTHING, ANYTHING, st.booleans())
def test_nonsense_is_refused_or_computed_never_a_crash(table, indices, values, row_splits, good_table):
    table = tf.ones((6, 3)) if good_table else table
    for function in (deepfm_ops.fm_interaction, reference.fm_interaction):
        try:
            assert function(table, indices, values, row_splits=row_splits).shape.rank == 2
        except (*EXPECTED, tf.errors.OpError):
            pass
