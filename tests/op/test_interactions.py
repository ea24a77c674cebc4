"""Interactions of order three and with field weights: the kernels, the op and the reference, against the definition."""

import numpy as np
import pytest
import tensorflow as tf
from testing import (
    DTYPES,
    REFERENCE_MODE,
    dense_samples,
    oracle,
    ragged_samples,
    run_with_tensorflow,
    runnable_instruction_sets,
    tolerance,
)

from deepfm_ops import _library, arguments, ops, reference

TABLE = np.array([[1, 2], [3, -1], [0, 4], [-2, 1]], np.float32)
KINDS = ("order 3", "field weights")
BACKENDS = ("auto", "reference")


def kind_of(kind, fields, rng, dtype):
    """The options of ops.interaction."""
    if kind == "order 3":
        return {"order": 3}
    return {"field_weights": tf.constant(rng.normal(size=fields * (fields - 1) // 2), dtype)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hand_computed(backend, dtype):
    table, acc = tf.constant(TABLE, DTYPES[dtype]), tf.float64 if dtype == "float64" else tf.float32
    pairs = arguments.Pairs(tf.constant([[0, 1, 2], [3, 3, 0]]), None, None)
    # rows (1,2) (3,-1) (0,4): pairs (3, -2+8-4), triples (0, -8); rows (-2,1) (-2,1) (1,2): (4-2-2, 1+2+2), (4, 2)
    y, *_ = ops.interaction(table, pairs, "vector", order=3, backend=backend)
    np.testing.assert_array_equal(y, [[3 + 0, 2 - 8], [0 + 4, 5 + 2]])
    # of fields (1,0), (2,0), (2,1): (3,-2) (0,8) (0,-4); (4,1) (-2,2) (-2,2)
    weights = tf.constant([2.0, -1.0, 3.0], acc)
    y, *_ = ops.interaction(table, pairs, "vector", field_weights=weights, backend=backend)
    np.testing.assert_array_equal(y, [[2 * 3, 2 * -2 - 8 + 3 * -4], [2 * 4 + 2 + 3 * -2, 2 * 1 - 2 + 3 * 2]])
    y, *_ = ops.interaction(table, pairs, "scalar", field_weights=tf.ones(3, acc), backend=backend)
    np.testing.assert_array_equal(y, [[5], [5]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_hand_computed_gradient(backend):
    table, weights = tf.Variable(TABLE), tf.Variable([2.0, -1.0, 3.0])
    pairs = arguments.Pairs(tf.constant([[0, 1, 2]]), None, None)
    with tf.GradientTape() as tape:
        y, *_ = ops.interaction(table, pairs, "scalar", field_weights=weights + 0, backend=backend)
    d_table, d_weights = tape.gradient(y, [table, weights])
    np.testing.assert_array_equal(d_weights, [3 - 2, 0 + 8, 0 - 4])
    np.testing.assert_array_equal(d_table.values, [[2 * 3, -2 - 4], [2, 4 + 12], [-1 + 9, -2 - 3]])
    with tf.GradientTape() as tape:
        y, *_ = ops.interaction(table, pairs, "scalar", order=3, backend=backend)
    # the sum of the two others, and their product
    np.testing.assert_array_equal(tape.gradient(y, table).values, [[3 + 0, 3 - 4], [1 + 0, 6 + 8], [4 + 3, 1 - 2]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["dense", "fields", "ragged"])
def test_against_the_sums_over_pairs_and_triples(form, kind, dtype, backend, rng):
    if form == "ragged" and kind == "field weights":
        return
    acc, splits = np.float64 if dtype == "float64" else np.float32, ()
    for dim, fields in ((1, 3), (3, 9), (16, 20), (17, 1), (64, 2), (130, 5)):
        table = tf.constant(rng.normal(size=(20, dim)), DTYPES[dtype])
        indices, x = rng.integers(0, 20, (4, fields)), rng.normal(size=(4, fields)).astype(acc)
        samples, row_splits = dense_samples(indices, x), None
        if form == "ragged":
            row_splits = np.array([0, 0, fields, fields, 4 * fields])
            indices, x = indices.ravel(), x.ravel()
            samples = ragged_samples(indices, x, row_splits)
            row_splits = tf.constant(row_splits, tf.int64)
        elif form == "fields":  # the first is empty, the last has three columns
            splits = (0, *range(fields), fields + 2)
            indices, x = (np.concatenate([a, a[:, :1], a[:, :1]], axis=1) for a in (indices, x))
            bounds = list(zip(splits[:-1], splits[1:], strict=True))
            samples = [
                [[(i[p], v[p]) for p in range(a, b)] for a, b in bounds] for i, v in zip(indices, x, strict=True)
            ]
        pairs = arguments.Pairs(tf.constant(indices), tf.constant(x), row_splits)
        options = kind_of(kind, len(samples[0]), rng, acc)
        weights = None if kind == "order 3" else options["field_weights"].numpy()
        expected = oracle(table, samples, "vector", options.get("order", 2), weights)
        bound = tolerance(dtype, samples, table)
        magnitude = max(len(fields) for fields in samples) * np.abs(x).max(initial=1) * np.abs(table).max()
        bound *= 1 + magnitude if kind == "order 3" else 4
        for output in ("scalar", "vector"):
            for return_embeddings in (False, True):
                options |= {"return_embeddings": return_embeddings, "backend": backend}
                y, *_ = ops.interaction(table, pairs, output, field_splits=splits, **options)
                want = expected if output == "vector" else expected.sum(1, keepdims=True)
                np.testing.assert_allclose(y, want, atol=bound, rtol=0)


@pytest.mark.parametrize("isa", runnable_instruction_sets())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_on_every_instruction_set(isa, kind, dtype, rng):
    """As those of the reference, which TensorFlow differentiates: of the rows, the values, the field weights."""
    before, acc = _library.instruction_set(), tf.float64 if dtype == "float64" else tf.float32
    rtol = {"float64": 1e-9, "float32": 2e-4, "bfloat16": 2e-2, "float16": 4e-3}[dtype]
    try:
        _library.instruction_set(isa)
        for dim in [1, 4, 7, 8, 16, 17, 33, 65, 130]:
            table = tf.Variable(tf.cast(rng.normal(size=(9, dim)), DTYPES[dtype]))
            fields = int(rng.integers(1, 19))
            indices = tf.constant(rng.integers(0, 9, (5, fields)))
            pairs = arguments.Pairs(indices, tf.constant(rng.normal(size=(5, fields)), acc), None)
            options, splits = kind_of(kind, fields, rng, acc), ()
            if fields > 3 and dim % 2:
                splits = (0, 1, 3, 3, fields)
                options = kind_of(kind, 4, rng, acc)
            d_e = tf.constant(rng.normal(size=(5, len(splits) - 1 if splits else fields, dim)), acc)
            output, results = "vector" if dim % 3 else "scalar", []
            d_y = tf.constant(rng.normal(size=(5, dim if dim % 3 else 1)), acc)
            wanted = [table, pairs.values, *([options["field_weights"]] if "field_weights" in options else [])]
            for backend in BACKENDS:
                with tf.GradientTape() as tape:
                    tape.watch(wanted[1:])
                    y, e, *_ = ops.interaction(
                        table, pairs, output, field_splits=splits, return_embeddings=True, backend=backend, **options
                    )
                    loss = tf.reduce_sum(y * d_y) + (tf.reduce_sum(e * d_e) if dim % 5 else 0)
                results.append([y, *tape.gradient(loss, wanted)])
            (y, native, *more), (want_y, plain, *want_more) = results
            np.testing.assert_array_equal(native.indices, plain.indices)
            more = [y, tf.cast(native.values, acc), *more]
            for got, want in zip(more, [want_y, tf.cast(plain.values, acc), *want_more], strict=True):
                largest = np.abs(want).max(initial=1)
                np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * largest)
    finally:
        _library.instruction_set(before)


FORMS = {
    "dense": lambda i, x: (arguments.Pairs(i, x, None), ()),
    "ones": lambda i, x: (arguments.Pairs(i, None, None), ()),
    "fields": lambda i, x: (arguments.Pairs(i, x, None), (0, 1, 4, 4, 6)),
    "ragged": lambda i, x: (
        arguments.Pairs(tf.reshape(i, [-1]), tf.reshape(x, [-1]), tf.constant([0, 3, 3, 24], tf.int64)),
        (),
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_variable", [False, True])
def test_gradients_of_gradients(form, kind, is_variable, rng):
    """With a first order and penalties; the native op against the reference."""
    if form == "ragged" and kind == "field weights":
        return
    start, start_w, x = rng.normal(size=(8, 5)), rng.normal(size=(8, 1)), tf.constant(rng.normal(size=(4, 6)))
    pairs, splits = FORMS[form](tf.constant(rng.integers(0, 8, (4, 6))), x)
    options, results = kind_of(kind, len(splits) - 1 if splits else 6, rng, tf.float64), []
    for backend in BACKENDS:
        make = tf.Variable if is_variable else tf.constant
        moved = [make(start), make(start_w), x, *([options["field_weights"]] if "field_weights" in options else [])]
        with tf.GradientTape() as outer:
            outer.watch(moved)
            with tf.GradientTape() as inner:
                inner.watch(moved)
                pairs, _ = FORMS[form](pairs.indices if form != "ragged" else tf.reshape(pairs.indices, (4, 6)), x)
                y, e, linear, penalty = ops.interaction(
                    moved[0],
                    pairs,
                    "vector",
                    field_splits=splits,
                    weights=moved[1],
                    return_embeddings=True,
                    penalty=reference.Penalty(0.25, 0.125),
                    backend=backend,
                    **options,
                )
                loss = tf.reduce_sum(tf.sin(y)) + tf.reduce_sum(tf.cos(e)) + tf.reduce_sum(linear**2) + penalty
            first = inner.gradient(loss, moved, unconnected_gradients="zero")
            first = [tf.convert_to_tensor(g) for g in first]
            second = sum(tf.reduce_sum(tf.sin(g)) for g in first)
        second = outer.gradient(second, moved, unconnected_gradients="zero")
        results.append([*first, *map(tf.convert_to_tensor, second)])
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_numeric_gradient(kind, backend, rng):
    indices = tf.constant(rng.integers(0, 5, (3, 4)))

    def function(table, x, weights):
        options = {"order": 3} if kind == "order 3" else {"field_weights": weights}
        return ops.interaction(table, arguments.Pairs(indices, x, None), "vector", backend=backend, **options)[0]

    inputs = [tf.constant(rng.normal(size=shape)) for shape in ((5, 3), (3, 4), (6,))]
    theoretical, numeric = tf.test.compute_gradient(function, inputs, delta=1e-5)
    for got, want in zip(theoretical, numeric, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_with_unknown_shapes(kind, rng):
    table = tf.Variable(rng.normal(size=(10, 4)))

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.int64), tf.TensorSpec([None], tf.float64)])
    def step(indices, weights):
        options = {"order": 3} if kind == "order 3" else {"field_weights": weights}
        with tf.GradientTape() as tape:
            tape.watch(weights)
            y, *_ = ops.interaction(table, arguments.Pairs(indices, None, None), "scalar", **options)
        return y, *tape.gradient(y, [table, weights], unconnected_gradients="zero")

    for samples, fields in ((3, 4), (0, 4), (2, 6), (2, 0), (2, 1)):
        indices, weights = rng.integers(0, 10, (samples, fields)), rng.normal(size=fields * (fields - 1) // 2)
        y, rows, d_weights = step(indices, weights)
        options = {"order": 3} if kind == "order 3" else {"field_weights": weights}
        np.testing.assert_allclose(y, oracle(table, dense_samples(indices), **options), rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(rows.indices, np.unique(indices))
        assert d_weights.shape == weights.shape


def test_shapes_of_gradients():
    if REFERENCE_MODE:
        return
    seen = []

    @tf.function(input_signature=[tf.TensorSpec([None, 5], tf.int64), tf.TensorSpec([10])])
    def step(indices, weights):
        pairs = arguments.Pairs(indices, None, None)
        y, *_ = ops.interaction(tf.ones((9, 4)), pairs, "scalar", field_weights=weights)
        seen.append((y.shape.as_list(), tf.gradients(y, weights)[0].shape.as_list()))
        return y

    step.get_concrete_function()
    assert seen == [([None, 1], [10])]


def test_what_the_native_op_refuses():
    if REFERENCE_MODE:
        return
    table, dense = tf.constant(TABLE), arguments.Pairs(tf.constant([[0, 1, 2]]), None, None)
    ragged = arguments.Pairs(tf.constant([0, 1, 2]), None, tf.constant([0, 1, 3], tf.int64))
    for pairs, options, message in [
        (dense, {"order": 4}, "order must be 2 or 3, got 4"),
        (dense, {"order": 1}, "order must be 2 or 3, got 1"),
        (dense, {"order": 3, "field_weights": tf.ones(3)}, "field_weights need an order of 2, got 3"),
        (dense, {"field_weights": tf.ones(2)}, r"field_weights must have shape \(3,\), got \(2,\)"),
        (dense, {"field_weights": tf.ones((3, 1))}, r"field_weights must have shape \(3,\), got \(3, 1\)"),
        (ragged, {"field_weights": tf.ones(3)}, "field_weights need samples of equally many fields"),
    ]:
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            ops.interaction(table, pairs, "scalar", backend="native", **options)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"indices\[0,2\] = 4 is not in \[0, 4\)"):
        ops.interaction(table, arguments.Pairs(tf.constant([[0, 1, 4]]), None, None), "scalar", order=3)


_BITS = """
import hashlib, numpy as np, tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads({threads})
from deepfm_ops import arguments, ops
rng = np.random.default_rng(0)
table, weights = tf.Variable(rng.normal(size=(5000, 17)).astype("f")), tf.constant(rng.normal(size=78).astype("f"))
indices = tf.constant(np.minimum(rng.zipf(1.2, (3000, 13)), 5000) - 1)
parts = []
for options in ({{"order": 3}}, {{"field_weights": weights}}):
    with tf.GradientTape() as tape:
        tape.watch(weights)
        y = ops.interaction(table, arguments.Pairs(indices, None, None), "vector", **options)[0]
        loss = tf.reduce_sum(tf.sin(y), axis=1)
    d_table, d_weights = tape.gradient(loss, [table, weights], unconnected_gradients="zero")
    parts += [y, d_table.values, d_weights]
print(hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest())
"""


def test_same_bits_for_any_number_of_threads():
    assert len({run_with_tensorflow(_BITS.format(threads=threads)) for threads in (1, 2, 5)}) == 1


def test_what_the_kernels_refuse(rng):
    kernels = pytest.importorskip("deepfm_ops.kernels", reason="a pure-Python install has no kernels")
    table, indices = rng.normal(size=(9, 4)).astype("f"), rng.integers(0, 9, (5, 3))
    weights = np.ones(3, "f")
    _, sums, _, _ = kernels.fm_forward(table, indices, order=3)
    ones = np.ones((5, 1), "f")
    for options, error, message in [
        ({"order": 4}, ValueError, "order must be 2 or 3, got 4"),
        ({"order": 3, "field_weights": weights}, ValueError, "field_weights need an order of 2, got 3"),
        ({"field_weights": weights[:2].copy()}, ValueError, r"field_weights must have shape \(3,\), got \(2,\)"),
        ({"field_weights": weights.astype(float)}, TypeError, "field_weights must be float32"),
        ({"field_weights": np.ones(6, "f")[::2]}, ValueError, "field_weights must be C-contiguous"),
    ]:
        with pytest.raises(error, match=message):
            kernels.fm_forward(table, indices, **options)
        with pytest.raises(error, match=message):
            kernels.fm_gradient(table, indices, None, sums, ones, **options)
    for options in ({"order": 3}, {"field_weights": weights}):
        with pytest.raises(ValueError, match="embeddings are needed with an order of 3 and with field_weights"):
            kernels.fm_gradient(table, indices, None, sums, ones, **options)
