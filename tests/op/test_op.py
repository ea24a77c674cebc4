"""The op and the reference: values, gradients, forms of input, corner cases, errors."""

import numpy as np
import pytest
import tensorflow as tf
from testing import (
    DTYPES,
    FUNCTIONS,
    REFERENCE_MODE,
    dense_samples,
    oracle,
    ragged_samples,
    run_with_tensorflow,
    runnable_instruction_sets,
    tolerance,
)

import deepfm_ops
from deepfm_ops import FMInteraction, _library, arguments, ops, reference

# Small integers: every sum is exact, in every dtype and order.
TABLE = np.array([[1, 2], [3, -1], [0, 4], [-2, 1]], np.float32)


def test_native_op_is_in_use():
    assert deepfm_ops.native_info()["native"] is not REFERENCE_MODE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
def test_hand_computed(fm, dtype, index_dtype):
    table = tf.constant(TABLE, DTYPES[dtype])
    indices = np.array([[0, 1, 2], [3, 3, 0]], index_dtype)
    # rows (1,2) (3,-1) (0,4): (1*3+1*0+3*0, 2*-1+2*4+-1*4) = (3, 2); rows (-2,1) (-2,1) (1,2): (4-2-2, 1+2+2)
    np.testing.assert_array_equal(fm(table, indices, output="vector"), [[3, 2], [0, 5]])
    np.testing.assert_array_equal(fm(table, indices), [[5], [5]])
    # values 2, -1, 1: rows (2,4) (-3,1) (0,4): (-6, 4+16+4); values 0, 1, 3: rows (0,0) (-2,1) (3,6)
    values = [[2, -1, 1], [0, 1, 3]]
    np.testing.assert_array_equal(fm(table, indices, values, output="vector"), [[-6, 24], [-6, 6]])


def test_hand_computed_gradient(fm):
    table = tf.Variable(TABLE)
    values = tf.constant([[2.0, -1.0, 1.0], [0.0, 1.0, 3.0]])
    with tf.GradientTape() as tape:
        tape.watch(values)
        y = fm(table, np.array([[0, 1, 2], [3, 3, 0]]), values)
    d_table, d_values = tape.gradient(y, [table, values], output_gradients=tf.constant([[1.0], [10.0]]))
    # sums (-1,9) and (1,7); d e = g * (s - e); the row's gradient is the sum of x * d e over its pairs.
    np.testing.assert_array_equal(d_table.indices, [0, 1, 2, 3])
    np.testing.assert_array_equal(
        d_table.values,
        [[2 * -3 + 3 * 10 * -2, 2 * 5 + 3 * 10 * 1], [-1 * 2, -1 * 8], [-1, 5], [10 * 3, 10 * 6]],
    )
    np.testing.assert_array_equal(d_values, [[-3 + 2 * 5, 3 * 2 - 8, 4 * 5], [10 * (-2 + 7), 10 * (-6 + 6), 10 * 0]])


FORMS = ["dense", "row_splits", "ragged", "sparse"]


def make_inputs(form, rng, num_rows, dtype, fields=5, samples=6):
    """(arguments of fm_interaction after the table, samples for the oracle)."""
    if form == "dense":
        indices, values = rng.integers(0, num_rows, (samples, fields)), rng.normal(size=(samples, fields))
        values = values.astype(dtype)
        return {"indices": indices, "values": values}, dense_samples(indices, values)
    row_splits = np.concatenate([[0], np.cumsum(rng.integers(0, fields, samples - 1)), [0]])
    row_splits[-1] = row_splits[-2]  # an empty last sample
    nnz = row_splits[-1]
    indices, values = rng.integers(0, num_rows, nnz), rng.normal(size=nnz).astype(dtype)
    expected = ragged_samples(indices, values, row_splits)
    if form == "row_splits":
        return {"indices": indices, "values": values, "row_splits": row_splits}, expected
    ragged = [tf.RaggedTensor.from_row_splits(a, row_splits) for a in (indices, values)]
    if form == "sparse":
        positions = tf.stack([ragged[0].value_rowids(), tf.ragged.range(ragged[0].row_lengths()).flat_values], axis=1)
        ragged = [tf.SparseTensor(positions, a, (samples, fields)) for a in (indices, values)]
    return {"indices": ragged[0], "values": ragged[1]}, expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("output", ["scalar", "vector"])
@pytest.mark.parametrize("form", FORMS)
def test_against_the_double_sum(fm, form, output, dtype, rng):
    acc = "float64" if dtype == "float64" else "float32"
    for dim in (1, 3, 8, 16, 17, 64, 130):
        table = tf.constant(rng.normal(size=(20, dim)), DTYPES[dtype])
        arguments, samples = make_inputs(form, rng, 20, acc)
        y = fm(table, **arguments, output=output)
        assert y.dtype == acc
        expected = oracle(table, samples, output)
        assert y.shape == expected.shape
        np.testing.assert_allclose(y, expected, atol=tolerance(dtype, samples, table), rtol=0)


@pytest.mark.parametrize("isa", runnable_instruction_sets())
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype, rng):
    before = _library.instruction_set()
    try:
        assert _library.instruction_set(isa) == isa
        for dim in [*range(1, 36), 47, 63, 64, 65, 127, 128, 129, 130, 200]:
            table = tf.Variable(tf.cast(rng.normal(size=(9, dim)), DTYPES[dtype]))
            for form in ("dense", "row_splits"):
                acc = "float64" if dtype == "float64" else "float32"
                arguments, samples = make_inputs(form, rng, 9, acc, fields=4, samples=3)
                arguments["values"] = tf.constant(arguments["values"])
                results = []
                for function in FUNCTIONS.values():
                    with tf.GradientTape() as tape:
                        tape.watch(arguments["values"])
                        y = function(table, **arguments, output="vector")
                        loss = tf.reduce_sum(tf.sin(y))
                    d_table, d_values = tape.gradient(loss, [table, arguments["values"]])
                    results.append((y, d_table.indices, tf.cast(d_table.values, acc), d_values))
                bound = tolerance(dtype, samples, table)
                np.testing.assert_allclose(results[0][0], oracle(table, samples, "vector"), atol=bound, rtol=0)
                np.testing.assert_array_equal(results[0][1], results[1][1])
                narrow = {"bfloat16": 8e-3, "float16": 1e-3}.get(dtype, 0)  # the rows are rounded to the table's type
                np.testing.assert_allclose(results[0][2], results[1][2], atol=100 * bound, rtol=narrow)
                np.testing.assert_allclose(results[0][3], results[1][3], atol=100 * bound, rtol=0)
    finally:
        _library.instruction_set(before)


def test_narrow_tables_convert_like_tensorflow(rng):
    """Loads and stores of bfloat16 and float16: rounding, subnormal halves, infinities and NaN."""
    special = [0.0, -0.0, 1.0, 6e-8, 5.9e-8, 3e-5, 65504, 65520, 1e9, -1e9, np.inf, -np.inf, np.nan, 1.00390625]
    wide = np.concatenate([np.float32(special), rng.normal(size=49).astype("f")])[np.newaxis]
    for isa in runnable_instruction_sets():
        before = _library.instruction_set()
        try:
            _library.instruction_set(isa)
            for dtype in (tf.bfloat16, tf.float16):
                table = tf.Variable(tf.zeros((1, wide.shape[1]), dtype))
                pairs = arguments.parse(table, np.array([[0]]), None, None, "vector")[1]
                with tf.GradientTape() as tape:
                    y, *_ = ops.interaction(table, pairs, "sum")
                d_table = tape.gradient(y, table, output_gradients=tf.constant(wide)).values
                np.testing.assert_array_equal(tf.cast(d_table, tf.float32), tf.cast(tf.cast(wide, dtype), tf.float32))
                table.assign(tf.cast(wide, dtype))
                y, *_ = ops.interaction(table, pairs, "sum")
                np.testing.assert_array_equal(y, tf.cast(table, tf.float32))
        finally:
            _library.instruction_set(before)


@pytest.mark.parametrize("splits", [(0, 1, 4, 4, 6), (0, 6), (0, 2, 3, 6)])
@pytest.mark.parametrize("output", ["scalar", "vector", "sum"])
def test_fields_of_several_columns(splits, output, rng):
    table = tf.Variable(rng.normal(size=(8, 5)))
    indices, values = rng.integers(0, 8, (4, 6)), tf.constant(rng.normal(size=(4, 6)))
    pairs = arguments.parse(table, indices, values, None, "vector")[1]
    samples = [
        [[(i[p], x[p]) for p in range(a, b)] for a, b in zip(splits[:-1], splits[1:], strict=True)]
        for i, x in zip(indices, values.numpy(), strict=True)
    ]
    results = []
    for backend in ("auto", "reference"):
        with tf.GradientTape() as tape:
            tape.watch(values)
            pairs = pairs._replace(values=values)
            options = {"field_splits": splits, "return_embeddings": True, "backend": backend}
            y, e, *_ = ops.interaction(table, pairs, output, **options)
            loss = tf.reduce_sum(tf.sin(y)) + tf.reduce_sum(tf.cos(e))
        d_table, d_values = tape.gradient(loss, [table, values])
        results.append((y, e, d_table.values, d_values))
        if output != "sum":
            np.testing.assert_allclose(y, oracle(table, samples, output), rtol=1e-12, atol=1e-12)
    for native, plain in zip(*results, strict=True):
        np.testing.assert_allclose(native, plain, rtol=1e-11, atol=1e-12)


PAIRS = {
    "dense": lambda i, x: (arguments.Pairs(i, x, None), ()),
    "ones": lambda i, x: (arguments.Pairs(i, None, None), ()),
    "fields": lambda i, x: (arguments.Pairs(i, x, None), (0, 1, 4, 4, 6)),
    "ragged": lambda i, x: (
        arguments.Pairs(tf.reshape(i, [-1]), tf.reshape(x, [-1]), tf.constant([0, 3, 3, 24], tf.int64)),
        (),
    ),
}


@pytest.mark.parametrize("form", PAIRS)
@pytest.mark.parametrize("kind", ["tensor", "variable"])
@pytest.mark.parametrize(("output", "softness"), [("scalar", 0.0), ("vector", 0.0), ("scalar", 4.0)])
def test_first_order_and_penalties_in_one_op(form, kind, output, softness, rng):
    """Against the definition, by autodiff of a dense lookup; the gradient of the gradient too."""
    start, start_w = rng.normal(size=(8, 5)), rng.normal(size=(8, 1))
    indices, x = rng.integers(0, 8, (4, 6)), rng.normal(size=(4, 6))
    x[0, :3] = 0.0  # no occurrences
    counts = np.array([3, 0, 7, 1, 2, 5, 1, 4])  # a zero counts as one
    used = np.isin(np.arange(8), indices)[:, None]
    occurrences = np.array([np.sum((indices == i) & ((x != 0) | (form == "ones"))) for i in range(8)])[:, None]
    n = np.maximum(counts, 1)[:, None]
    share = occurrences / n * (softness / (softness + n) if softness else 1)
    samples = 3 if form == "ragged" else 4
    strengths = [used * 2 * l2 + share * prior / samples for l2, prior in ((0.25, 0.75), (0.125, 0.5))]
    indices, x = tf.constant(indices), tf.constant(x)

    def losses(backend):
        make = tf.Variable if kind == "variable" else tf.constant
        table, w = make(start), make(start_w)
        with tf.GradientTape(persistent=True) as outer:
            outer.watch([x] if kind == "variable" else [x, table, w])
            with tf.GradientTape() as inner:
                inner.watch([x] if kind == "variable" else [x, table, w])
                pairs, splits = PAIRS[form](indices, x)
                options = {"field_splits": splits, "return_embeddings": True, "backend": backend}
                priors = tf.constant([0.75, 0.5, softness])
                penalty = reference.Penalty(0.25, 0.125, tf.constant(counts, tf.int32), priors)
                options |= {"weights": w, "penalty": penalty}
                if backend == "definition":
                    rows = tf.gather(tf.convert_to_tensor(table), pairs.indices)
                    weight_rows = tf.gather(tf.convert_to_tensor(w), pairs.indices)
                    y, e, linear = reference.formula(rows, pairs, output, splits, weight_rows)
                else:
                    y, e, linear, penalty = ops.interaction(table, pairs, output, **options)
                loss = tf.reduce_sum(tf.sin(y)) + tf.reduce_sum(tf.cos(e)) + tf.reduce_sum(tf.sin(2 * linear))
                if backend == "definition":  # what the penalty's gradient is the gradient of
                    penalty = sum(
                        0.5 * tf.reduce_sum(factor * tf.convert_to_tensor(t) ** 2)
                        for t, factor in zip((table, w), strengths, strict=True)
                    )
                loss += 3 * penalty
            first = inner.gradient(loss, [table, w, x], unconnected_gradients="zero")
            first = [tf.convert_to_tensor(g) for g in first]
            second = sum(tf.reduce_sum(tf.sin(g)) for g in first)
        return [
            y,
            e,
            linear,
            *first,
            *map(tf.convert_to_tensor, outer.gradient(second, [table, w, x], unconnected_gradients="zero")),
        ]

    expected = losses("definition")
    for backend in ("auto", "reference"):
        for got, want in zip(losses(backend), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("output", ["scalar", "vector"])
def test_numeric_gradient(fm, form, output, rng):
    """Central differences in float64, repeated indices included."""
    arguments, _ = make_inputs(form, rng, 5, "float64", fields=4, samples=4)
    indices, values = arguments.pop("indices"), arguments.pop("values")
    flat = values if form in ("dense", "row_splits") else values.flat_values if form == "ragged" else values.values

    def with_values(x):
        return values.with_flat_values(x) if form == "ragged" else tf.SparseTensor(indices.indices, x, (4, 4))

    def function(table, x):
        x = x if form in ("dense", "row_splits") else with_values(x)
        return tf.sin(fm(table, indices, x, output=output, **arguments))

    table = tf.constant(rng.normal(size=(5, 3)))
    theoretical, numeric = tf.test.compute_gradient(function, [table, tf.constant(flat)], delta=1e-5)
    for a, b in zip(theoretical, numeric, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-8)


@pytest.mark.parametrize("form", ["dense", "row_splits"])
@pytest.mark.parametrize("kind", ["tensor", "variable"])
def test_gradient_of_the_gradient(form, kind, rng):
    arguments, _ = make_inputs(form, rng, 5, "float64", fields=4, samples=4)
    values = tf.constant(arguments.pop("values"))
    start = rng.normal(size=(5, 3))
    results = []
    for function in FUNCTIONS.values():
        table = tf.Variable(start) if kind == "variable" else tf.constant(start)
        with tf.GradientTape() as outer:
            outer.watch([values] if kind == "variable" else [values, table])
            with tf.GradientTape() as inner:
                inner.watch([values] if kind == "variable" else [values, table])
                loss = tf.reduce_sum(tf.sin(function(table, values=values, **arguments)))
            d_table, d_values = inner.gradient(loss, [table, values])
            second = tf.reduce_sum(tf.convert_to_tensor(d_table) ** 3) + tf.reduce_sum(d_values**2)
        results.append([tf.convert_to_tensor(g) for g in outer.gradient(second, [table, values])])

    def penalty(x):  # the same number, by central differences through the first gradient
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(tf.sin(deepfm_ops.fm_interaction(tf.constant(start), values=x, **arguments)))
        return tf.reduce_sum(tape.gradient(loss, x) ** 2)

    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
    with tf.GradientTape() as tape:
        tape.watch(values)
        y = penalty(values)
    _, numeric = tf.test.compute_gradient(penalty, [values], delta=1e-5)
    np.testing.assert_allclose(tf.reshape(tape.gradient(y, values), [1, -1]), numeric[0], atol=1e-6)


def test_gradient_is_unique_and_ascending(fm, rng):
    table = tf.Variable(rng.normal(size=(1000, 4)).astype("f"))
    for size in ((3, 5), (700, 9)):  # below and above the size from which the indices are radix-sorted
        indices = rng.integers(0, 1000, size) // 7 * 7
        with tf.GradientTape() as tape:
            y = fm(table, indices)
        gradient = tape.gradient(y, table)
        assert isinstance(gradient, tf.IndexedSlices)
        np.testing.assert_array_equal(gradient.indices, np.unique(indices))
        np.testing.assert_array_equal(gradient.dense_shape, [1000, 4])


@pytest.mark.parametrize("num_rows", [1, 2, 255, 256, 257, 2047, 2049, 70000, 5000000])
def test_grouping_at_every_number_of_bits(num_rows, rng):
    """The radix sort's digits: the gradient of a table of one column counts the pairs of a row."""
    table = tf.Variable(tf.zeros((num_rows, 1)))
    indices = np.concatenate([rng.integers(0, num_rows, 40000), [0, num_rows - 1]]).astype(np.int32)
    pairs = arguments.Pairs(tf.constant(indices), None, tf.constant([0, len(indices)], tf.int64))
    with tf.GradientTape() as tape:
        y, *_ = ops.interaction(table, pairs, "sum")
    gradient = tape.gradient(y, table)
    rows, counts = np.unique(indices, return_counts=True)
    np.testing.assert_array_equal(gradient.indices, rows)
    np.testing.assert_array_equal(gradient.values[:, 0], counts)


CORNERS = {
    "empty_batch": np.zeros((0, 3), np.int64),
    "no_fields": np.zeros((4, 0), np.int64),
    "one_field": np.array([[1], [2], [0]]),
    "all_duplicates": np.full((5, 6), 2),
    "one_sample": np.array([[0, 1, 2]]),
}


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("dim", [1, 3, 8, 16, 17, 64])
def test_corner_cases(fm, corner, dim, rng):
    indices = CORNERS[corner]
    table, values = tf.Variable(rng.normal(size=(3, dim))), tf.constant(rng.normal(size=indices.shape))
    for output in ("scalar", "vector"):
        with tf.GradientTape() as tape:
            tape.watch(values)
            y = fm(table, indices, values, output=output)
        np.testing.assert_allclose(y, oracle(table, dense_samples(indices, values.numpy()), output), atol=1e-12)
        d_table, d_values = tape.gradient(y, [table, values])
        np.testing.assert_array_equal(d_table.indices, np.unique(indices))
        assert d_values.shape == values.shape


def test_one_row_and_empty_ragged_samples(fm):
    table = tf.constant([[2.0, 3.0]])
    np.testing.assert_array_equal(fm(table, [[0, 0, 0]]), [[3 * 4 + 3 * 9]])
    y = fm(table, tf.ragged.constant([[], [0, 0], [], [0]], dtype=tf.int64))
    np.testing.assert_array_equal(y, [[0], [13], [0], [0]])
    y = fm(table, np.zeros(0, np.int64), row_splits=[0])
    assert y.shape == (0, 1)
    np.testing.assert_array_equal(fm(np.zeros((3, 0), "f"), [[0, 2]]), [[0]])
    with pytest.raises(I, match=r"indices\[0,1\] = 3 is not in"):
        fm(np.zeros((3, 0), "f"), [[0, 3]])


def test_non_contiguous_and_misaligned_arrays(fm, rng):
    table = rng.normal(size=(30, 10))[::2, 1::3]
    indices = rng.integers(0, 15, (8, 12))[::2, ::3]
    raw = np.zeros(indices.size * 8 + 1, np.uint8)
    misaligned = raw[1:].view(np.int64).reshape(indices.shape)
    misaligned[:] = indices
    expected = oracle(table, dense_samples(indices))
    np.testing.assert_allclose(fm(table, indices), expected, rtol=1e-12)
    np.testing.assert_allclose(fm(table, misaligned), expected, rtol=1e-12)


def test_nan_stays_in_its_sample(fm, rng):
    table = tf.constant(rng.normal(size=(10, 4)).astype("f"))
    indices, values = rng.integers(0, 10, (5, 3)), np.ones((5, 3), "f")
    clean = fm(table, indices, values).numpy()
    values[2, 1] = np.nan
    y = fm(table, indices, values).numpy()
    assert np.isnan(y[2])
    np.testing.assert_array_equal(np.delete(y, 2), np.delete(clean, 2))


def test_in_a_function_with_unknown_shapes(fm, rng):
    table = tf.Variable(rng.normal(size=(10, 4)))
    signature = [tf.TensorSpec([None, None], tf.int64), tf.TensorSpec([None, None], tf.float64)]

    @tf.function(input_signature=signature)
    def step(indices, values):
        with tf.GradientTape() as tape:
            tape.watch(values)
            y = fm(table, indices, values)
        gradient, d_values = tape.gradient(y, [table, values])
        return y, gradient.indices, gradient.values, d_values

    for shape in ((3, 4), (2, 6)):
        indices, values = rng.integers(0, 10, shape), rng.normal(size=shape)
        y, rows, _, d_values = step(indices, values)
        np.testing.assert_allclose(y, oracle(table, dense_samples(indices, values)), rtol=1e-9)
        np.testing.assert_array_equal(rows, np.unique(indices))
        assert d_values.shape == shape
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"indices\[1,0\] = 10 is not in \[0, 10\)"):
        step(np.array([[1, 2], [10, 3]]), np.ones((2, 2)))


def test_keras_variable_and_untrainable_variable(fm, rng):
    import keras

    start = rng.normal(size=(10, 4)).astype("f")
    indices = rng.integers(0, 10, (3, 2))
    expected = fm(start, indices)
    table = keras.Variable(start)
    with tf.GradientTape() as tape:
        y = fm(table, indices)
    np.testing.assert_array_equal(y, expected)
    assert isinstance(tape.gradient(y, table.value), tf.IndexedSlices)
    fixed = tf.Variable(start, trainable=False)
    with tf.GradientTape() as tape:
        y = fm(fixed, indices)
    np.testing.assert_array_equal(y, expected)
    assert tape.gradient(y, fixed) is None


# ---------------------------------------------------------------------------------------------
# Errors

I = tf.errors.InvalidArgumentError  # noqa: E741


@pytest.mark.parametrize("bad", [1000, -1, 2**40, -(2**63)])
def test_index_out_of_range(fm, bad, rng):
    table = tf.Variable(rng.normal(size=(1000, 4)).astype("f"))
    indices = rng.integers(0, 1000, (40, 9))
    indices[3, 7] = bad
    indices[20, 0] = -5  # the first one is reported
    with pytest.raises(I, match=rf"indices\[3,7\] = {bad} is not in \[0, 1000\)"):
        fm(table, indices)
    with pytest.raises(I, match=rf"indices\[34\] = {bad} is not in \[0, 1000\)"):
        fm(table, indices.ravel(), row_splits=[0, 100, 360])
    if abs(bad) < 2**31:
        with pytest.raises(I, match=rf"indices\[3,7\] = {bad} is not in"):
            fm(table, indices.astype(np.int32))


@pytest.mark.parametrize(
    ("row_splits", "message"),
    [
        ([1, 4], r"row_splits must start at 0, got row_splits\[0\] = 1"),
        ([0, 3, 2, 4], r"row_splits must not decrease, got row_splits\[1\] = 3 and row_splits\[2\] = 2"),
        ([0, 3], r"row_splits must end at nnz = 4, got row_splits\[1\] = 3"),
        ([0, 5], r"row_splits must end at nnz = 4, got row_splits\[1\] = 5"),
        ([0, 2**40], r"row_splits must end at nnz = 4"),
        ([0, -1, 4], r"row_splits must not decrease"),
    ],
)
def test_bad_row_splits(fm, row_splits, message):
    with pytest.raises(I, match=message):
        fm(TABLE, [0, 1, 2, 3], row_splits=row_splits)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"indices": [0, 1]}, ValueError, r"indices must be rank 2 \[B, F\], or rank 1 with row_splits"),
        ({"indices": [[0, 1]], "row_splits": [0, 2]}, ValueError, r"indices must be rank 1 \[nnz\] with row_splits"),
        ({"indices": [0, 1], "row_splits": [[0, 2]]}, ValueError, r"row_splits must be rank 1"),
        ({"indices": np.zeros(0, int), "row_splits": np.zeros(0, int)}, ValueError, r"row_splits must be rank 1"),
        ({"indices": [[0.0, 1.0]]}, TypeError, "indices must be int32 or int64, got float32"),
        ({"indices": [[0, 1]], "row_splits": [0.0, 2.0]}, TypeError, "row_splits must be int32 or int64"),
        ({"indices": [[0, 1]], "values": [[1.0]]}, ValueError, r"values must have the shape of indices, \(1, 2\)"),
        ({"indices": [[0, 1]], "values": [["a", "b"]]}, TypeError, "values must be numbers"),
        ({"indices": [[0, 1]], "values": tf.constant([[1, 2]])}, TypeError, "values must be float32 for this table"),
        ({"indices": [[0, 1]], "output": "sum"}, ValueError, "output must be one of scalar, vector, got 'sum'"),
        ({"table": TABLE.astype(int), "indices": [[0]]}, TypeError, "table must be float32, .* got int64"),
        ({"table": TABLE[0], "indices": [[0]]}, ValueError, r"table must be rank 2 \[V, K\], got shape \(2,\)"),
        ({"indices": tf.ragged.constant([[0]]), "row_splits": [0, 1]}, ValueError, "row_splits must be None"),
        ({"indices": [[0]], "values": tf.ragged.constant([[1.0]])}, TypeError, "so indices must be one too"),
        ({"indices": tf.ragged.constant([[[0]]])}, ValueError, "indices must be ragged of rank 2"),
        (
            {"indices": tf.ragged.constant([[0, 1], [2]]), "values": tf.ragged.constant([[1.0], [1.0, 2.0]])},
            I,
            "values must have the positions of indices",
        ),
    ],
)
def test_bad_arguments(fm, arguments, error, message):
    with pytest.raises(error, match=message):
        fm(**{"table": TABLE, **arguments})


def test_raw_op_rejects_what_python_would_have_caught():
    """The kernels validate for themselves: a graph can be made without our Python."""
    if REFERENCE_MODE:
        return
    native = _library.native_ops("native")
    good = {
        "table": tf.constant(TABLE),
        "indices": tf.constant([[0, 1]]),
        "values": [],
        "row_splits": [],
        "weights": [],
        "counts": [],
        "priors": [],
        "field_weights": [],
    }
    good |= {"Tacc": tf.float32, "output": "scalar", "field_splits": [], "return_embeddings": False}
    assert native.deepfm_ops_fm_interaction(**good).interaction.shape == (1, 1)
    one = tf.ones((1, 2))
    for change, message in [
        ({"field_splits": [0, 3]}, "field_splits must end at the columns of indices, 2"),
        ({"field_splits": [1, 2]}, "field_splits must start at 0"),
        ({"values": [one, one]}, "values must be one tensor"),
        ({"weights": [one, one]}, "weights must be one tensor"),
        ({"weights": [one]}, "weights must have shape"),
        ({"weights": [tf.ones((4, 1))], "table": tf.ones((4, 0))}, "at least one column"),
        ({"values": [tf.ones((1, 2), tf.float64)]}, "values must be float"),
        ({"Tacc": tf.float64}, "Tacc must be float"),
        ({"table": tf.constant(TABLE[0])}, "table must be rank 2"),
        ({"values": [tf.ones((2, 1))]}, "values must have the shape of indices"),
        ({"row_splits": [tf.constant([0, 2], tf.int64)]}, "indices must be rank 1"),
        ({"indices": tf.constant([0, 1]), "row_splits": [tf.zeros([0], tf.int64)]}, "row_splits must"),
    ]:
        with pytest.raises((I, ValueError), match=message):
            native.deepfm_ops_fm_interaction(**{**good, **change})
    handle = tf.Variable(TABLE).handle
    uninitialized = tf.raw_ops.VarHandleOp(dtype=tf.float32, shape=[4, 2], shared_name="nothing here")
    for table, dtype, error in [(handle, tf.float64, I), (uninitialized, tf.float32, tf.errors.OpError)]:
        with pytest.raises(error):
            acc = tf.float64 if dtype == tf.float64 else tf.float32
            native.deepfm_ops_resource_fm_interaction(**{**good, "table": table, "T": dtype, "Tacc": acc})


def on_a_gpu():
    """A variable that says so, where there is none."""
    variable = tf.Variable(TABLE)
    where = property(lambda self: "/job:localhost/replica:0/task:0/device:GPU:0")
    variable.__class__ = type("GpuVariable", (type(variable),), {"device": where})
    return variable


def without_a_handle():
    with tf.distribute.MirroredStrategy(["/cpu:0"]).scope():
        return tf.Variable(TABLE)


@pytest.mark.parametrize("make", [on_a_gpu, without_a_handle])
def test_a_table_that_the_native_op_cannot_use(make, monkeypatch):
    """The backend "auto" leaves it to TensorFlow; "native" is never something else in silence."""
    table, pairs = make(), arguments.Pairs(tf.constant([[0, 1]]), None, None)
    if make is without_a_handle:  # but where a replica runs
        strategy = table.distribute_strategy
        assert REFERENCE_MODE or strategy.run(lambda: ops.native_for(table) is not None)
        monkeypatch.setattr(tf.distribute, "get_replica_context", lambda: None)
    assert ops.native_for(table) is None
    np.testing.assert_array_equal(ops.interaction(table, pairs, "scalar")[0], [[1]])
    if REFERENCE_MODE:
        return
    reason = {
        on_a_gpu: r"it is on .*GPU:0, and the native library was built with(out)? CUDA",
        without_a_handle: "a MirroredVariable has no resource handle",
    }[make]
    with pytest.raises(ValueError, match=f"backend must be 'auto' or 'reference' for this table, .*: {reason}"):
        ops.interaction(table, pairs, "scalar", backend="native")
    monkeypatch.setenv("DEEPFM_OPS_BACKEND", "native")
    with pytest.raises(ValueError, match=reason):
        ops.interaction(table, pairs, "scalar")


def test_backend_argument():
    pairs = arguments.Pairs(tf.constant([[0, 1]]), None, None)
    with pytest.raises(ValueError, match="backend must be one of auto, native, reference, got 'gpu'"):
        ops.interaction(tf.constant(TABLE), pairs, "scalar", backend="gpu")
    native, plain = (
        ops.interaction(tf.constant(TABLE), pairs, "scalar", backend=backend)[0] for backend in ("native", "reference")
    )
    np.testing.assert_array_equal(native, plain)


def test_results_that_cannot_be_allocated(fm):
    with pytest.raises((tf.errors.ResourceExhaustedError, I)):
        fm(tf.zeros((1, 10**6)), tf.zeros((10**6, 1), tf.int32), output="vector")  # 4e12 bytes
    with pytest.raises((tf.errors.ResourceExhaustedError, I)):  # more elements than an int64 counts
        fm(tf.zeros((0, 2**61)), np.zeros((4, 39), np.int64), output="vector")


# ---------------------------------------------------------------------------------------------
# Threads, memory

_BITS = """
import hashlib, numpy as np, tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads({threads})
import deepfm_ops
rng = np.random.default_rng(0)
table = tf.Variable(rng.normal(size=(5000, 17)).astype("f"))
values = tf.constant(rng.normal(size=(3000, 13)).astype("f"))
indices = np.minimum(rng.zipf(1.2, (3000, 13)), 5000) - 1
with tf.GradientTape() as tape:
    tape.watch(values)
    y = tf.reduce_sum(tf.sin(deepfm_ops.fm_interaction(table, indices, values, output="vector")), axis=1)
d_table, d_values = tape.gradient(y, [table, values])
parts = [y, d_table.indices, d_table.values, d_values]
print(hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest())
"""


def test_same_bits_for_any_number_of_threads():
    assert len({run_with_tensorflow(_BITS.format(threads=threads)) for threads in (1, 2, 3, 7)}) == 1


def test_variable_is_read_in_place(fm):
    """After a sparse update a variable's value can only be had as a copy; ours must not make one."""
    if REFERENCE_MODE and fm is deepfm_ops.fm_interaction:
        fm = reference.fm_interaction
    code = """
import resource, numpy as np, tensorflow as tf
import deepfm_ops
from deepfm_ops import reference
table = tf.Variable(tf.zeros((2_000_000, 32)))  # 256 MB
table.scatter_add(tf.IndexedSlices(tf.ones((1, 32)), [0]))
fm = {function}
indices = np.zeros((16, 4), np.int64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(3):
    with tf.GradientTape() as tape:
        y = fm(table, indices)
    tape.gradient(y, table)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    name = "reference.fm_interaction" if fm is reference.fm_interaction else "deepfm_ops.fm_interaction"
    # The update itself may have doubled the peak, so this bound is on what comes after it.
    assert int(run_with_tensorflow(code.format(function=name))) < 100_000  # KiB


def of_another_machine():
    """A variable that says so."""
    variable = tf.Variable(TABLE)
    where = property(lambda self: "/job:ps/replica:0/task:1/device:CPU:0")
    variable.__class__ = type("DistantVariable", (type(variable),), {"device": where})
    return variable


def in_parts():
    return tf.__internal__.distribute.ShardedVariable([tf.Variable(TABLE[:1]), tf.Variable(TABLE[1:])])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (of_another_machine, "table is on /job:ps/replica:0/task:1/device:CPU:0, and this is /job:localhost/task:0"),
        (in_parts, "table is a ShardedVariable of 2 parts"),
    ],
)
def test_a_table_that_is_not_on_this_machine(make, message, fm):
    """It would be read whole, in silence."""
    with pytest.raises(ValueError, match=f"{message}: .*deepfm_ops.cluster.ShardedDeepFM"):
        fm(make(), [[0, 1]])
    layer = FMInteraction(len(TABLE), 2, use_linear=True)
    layer.build()
    layer.embeddings._value = make()
    with pytest.raises(ValueError, match=f"{message}: .*deepfm_ops.cluster.ShardedDeepFM"):
        tf.function(layer)(tf.constant([[0, 1]]))
    layer.embeddings._value, layer.w._value = tf.Variable(TABLE), make()
    with pytest.raises(ValueError, match=message.replace("table", "weights")):
        layer(tf.constant([[0, 1]]))
