"""Static shapes, unknown dimensions included, and what a graph refuses when it is made."""

import pytest
import tensorflow as tf
from testing import REFERENCE_MODE

from deepfm_ops import _library, arguments, ops

B, F, K = None, None, None  # names for unknown dimensions

FORWARD = [
    # table, indices, values, row_splits, output, field_splits -> interaction, embeddings
    ([9, 4], [3, 5], [3, 5], None, "scalar", (), [3, 1], [3, 5, 4]),
    ([9, 4], [3, 5], None, None, "vector", (), [3, 4], [3, 5, 4]),
    ([9, 4], [B, 5], [3, F], None, "scalar", (), [3, 1], [3, 5, 4]),
    ([9, K], [B, F], None, None, "vector", (), [B, K], [B, F, K]),
    ([9, 4], [B, F], [B, F], None, "scalar", (), [B, 1], [B, F, 4]),
    (None, [B, F], None, None, "scalar", (), [B, 1], [B, F, K]),
    (None, None, None, None, "scalar", (), [B, 1], [B, F, K]),
    ([9, 4], [B, 6], None, None, "sum", (0, 1, 6), [B, 4], [B, 2, 4]),
    ([9, 4], [7], [7], [4], "scalar", (), [3, 1], [7, 4]),
    ([9, 4], [None], None, [None], "vector", (), [None, 4], [None, 4]),
    ([9, 4], None, [7], [4], "scalar", (), [3, 1], [7, 4]),
]


def symbolic(shape, dtype):
    return tf.TensorSpec(shape, dtype)


def same(shape, expected):
    return shape.rank == len(expected) and all(a == b for a, b in zip(shape.as_list(), expected, strict=True))


@pytest.mark.parametrize("resource", [False, True])
@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_forward(case, resource):
    table, indices, values, row_splits, output, field_splits, interaction, embeddings = case
    if REFERENCE_MODE:  # plain TensorFlow's own shape functions: a native promise
        return
    native = _library.native_ops("native")
    seen = {}

    def call(table, indices, values, row_splits):
        arguments = {
            "indices": indices,
            "values": [] if values is None else [values],
            "row_splits": [] if row_splits is None else [row_splits],
            "weights": [],
            "counts": [],
            "priors": [],
            "field_weights": [],
            "Tacc": tf.float32,
            "output": output,
            "field_splits": list(field_splits),
        }
        if resource:
            seen["forward"] = native.deepfm_ops_resource_fm_interaction(
                table=table, T=tf.float32, return_embeddings=True, **arguments
            )
        else:
            seen["forward"] = native.deepfm_ops_fm_interaction(table=table, return_embeddings=True, **arguments)
        arguments.pop("Tacc")
        f = seen["forward"]
        arguments |= {"sums": f.sums, "embeddings": [f.embeddings], "d_interaction": f.interaction}
        arguments |= {
            "d_embeddings": [f.embeddings],
            "need_values": values is not None,
            "d_linear": [],
            "d_penalty": f.penalty,
        }
        if resource:
            seen["gradient"] = native.deepfm_ops_resource_fm_interaction_grad(table=table, T=tf.float32, **arguments)
        else:
            seen["gradient"] = native.deepfm_ops_fm_interaction_grad(table=table, **arguments)

    if resource:
        if table is None or None in table:
            return  # a handle of unknown shape is what (None, ...) tests below
        variable = tf.Variable(tf.zeros(table))
        function = lambda i, x, s: call(variable.handle, i, x, s)  # noqa: E731
        specs = []
    else:
        function, specs = call, [symbolic(table, tf.float32)]
    specs += [
        symbolic(indices, tf.int64),
        None if values is None else symbolic(values, tf.float32),
        None if row_splits is None else symbolic(row_splits, tf.int64),
    ]
    tf.function(function).get_concrete_function(*specs)
    f, g = seen["forward"], seen["gradient"]
    assert same(f.interaction.shape, interaction)
    assert same(f.sums.shape, [interaction[0], embeddings[-1]])
    assert same(f.embeddings.shape, embeddings)
    assert same(g.unique.shape, [None])
    assert same(g.rows.shape, [None, embeddings[-1]])
    known = values if indices is None or (values and None in indices and None not in values) else indices
    if values is not None and None not in (known or [None]):
        assert same(g.d_values.shape, known)


def test_embeddings_are_empty_unless_asked_for():
    if REFERENCE_MODE:
        return
    pairs = arguments.Pairs(tf.constant([[0, 1]]), None, None)
    native = _library.native_ops("native")
    result = native.deepfm_ops_fm_interaction(
        table=tf.ones((2, 3)),
        indices=pairs.indices,
        values=[],
        row_splits=[],
        weights=[],
        counts=[],
        priors=[],
        field_weights=[],
        Tacc=tf.float32,
        output="scalar",
        return_embeddings=False,
    )
    assert result.embeddings.shape == (0,)


def test_a_handle_of_unknown_shape(fm):
    table = tf.Variable(tf.ones((5, 3)), shape=[None, None])

    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.int32)])
    def call(indices):
        return fm(table, indices, output="vector")

    assert call(tf.constant([[0, 1], [2, 4]])).shape == (2, 3)
    table.assign(tf.ones((9, 2)))
    assert call(tf.constant([[0, 8]])).shape == (1, 2)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"indices\[0,1\] = 9 is not in \[0, 9\)"):
        call(tf.constant([[0, 9]]))


@pytest.mark.parametrize(
    ("table", "indices", "values", "row_splits", "message"),
    [
        ([9], [3, 5], None, None, r"table must be rank 2 \[V, K\]"),
        ([9, 4], [3], None, None, r"indices must be rank 2 \[B, F\], or rank 1 with row_splits"),
        ([9, 4], [3, 5], [5, 3], None, r"values must have the shape of indices, \(3, 5\), got \(5, 3\)"),
        ([9, 4], [None, 5], [3, 4], None, r"values must have the shape of indices"),
        ([9, 4], [3, 5], None, [4], r"indices must be rank 1 \[nnz\] with row_splits"),
        ([9, 4], [3], None, [4, 1], r"row_splits must be rank 1 \[B \+ 1\]"),
        ([9, 4], [3], None, [0], r"row_splits must"),
    ],
)
def test_a_graph_that_cannot_be(fm, table, indices, values, row_splits, message):
    def call(table, indices, values, row_splits):
        return fm(table, indices, values, row_splits=row_splits)

    specs = [
        symbolic(table, tf.float32),
        symbolic(indices, tf.int64),
        None if values is None else symbolic(values, tf.float32),
        None if row_splits is None else symbolic(row_splits, tf.int64),
    ]
    with pytest.raises(ValueError, match=message):
        tf.function(call).get_concrete_function(*specs)


def test_shapes_that_only_a_run_shows_to_differ(fm):
    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.int64), tf.TensorSpec([None, None], tf.float32)])
    def call(indices, values):
        return fm(tf.ones((4, 2)), indices, values)

    with pytest.raises(tf.errors.InvalidArgumentError, match="values must have the shape of indices"):
        call(tf.zeros((2, 3), tf.int64), tf.ones((3, 2)))


UNKNOWN = tf.TensorSpec(None, tf.int64), tf.TensorSpec(None, tf.float32)


@pytest.mark.parametrize(
    ("indices", "values", "row_splits", "message"),
    [
        ([[[1, 2]]], [[[1, 1]]], None, r"indices must be rank 2 \[B, F\], or rank 1 with row_splits"),
        ([1, 2], [1, 1], None, r"indices must be rank 2 \[B, F\], or rank 1 with row_splits"),
        ([[1, 2]], 1, None, "values must have the shape of indices"),
        ([[1, 2]], [[1], [1]], None, "values must have the shape of indices"),
        ([1, 2], [1, 1], [], r"row_splits must be rank 1 \[B \+ 1\]"),
        ([1, 2], [1, 1], 2, r"row_splits must be rank 1 \[B \+ 1\]"),
        ([1, 2], [1, 1], [[0, 2]], r"row_splits must be rank 1 \[B \+ 1\]"),
        ([[1, 2]], [[1, 1]], [0, 2], r"indices must be rank 1 \[nnz\] with row_splits"),
        ([1, 2, 3], [[1], [1], [1]], [0, 3], "values must have the shape of indices"),
    ],
)
def test_ranks_that_only_a_run_shows_to_be_wrong(fm, indices, values, row_splits, message):
    specs = [*UNKNOWN] if row_splits is None else [*UNKNOWN, UNKNOWN[0]]

    @tf.function(input_signature=specs)
    def call(indices, values, row_splits=None):
        return fm(tf.ones((4, 2)), indices, values, row_splits=row_splits)

    inputs = [tf.constant(indices, tf.int64), tf.constant(values, tf.float32)]
    inputs += [] if row_splits is None else [tf.constant(row_splits, tf.int64)]
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        call(*inputs)


def test_the_table_variable_must_be_what_the_op_was_made_for():
    if REFERENCE_MODE:
        return
    assert ops is not None
    native = _library.native_ops("native")
    handle = tf.Variable(tf.ones((4, 2), tf.float64)).handle
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match="table holds double"):
        tf.function(
            lambda: native.deepfm_ops_resource_fm_interaction(
                table=handle,
                indices=tf.constant([[0]]),
                values=[],
                row_splits=[],
                weights=[],
                counts=[],
                priors=[],
                field_weights=[],
                T=tf.float32,
                Tacc=tf.float32,
                output="scalar",
                return_embeddings=False,
            )
        ).get_concrete_function()
