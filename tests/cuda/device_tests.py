# ruff: noqa: E402  the device goes before TensorFlow's first op
"""What test_tensorflow.py runs in a process of its own, whose GPU is made of host memory that the host must not touch.

TensorFlow has few kernels for that GPU: what is not the op's own runs on the CPU, and nothing else may be asked to run
on the GPU.
"""

import contextlib
import functools

import emulated

emulated.load()

import keras
import numpy as np
import pytest
import tensorflow as tf

import deepfm_ops
from deepfm_ops import DeepFM, FMInteraction, _library, arguments, ops, optimizers, reference

I = tf.errors.InvalidArgumentError  # noqa: E741
GPU = "/job:localhost/replica:0/task:0/device:GPU:0"
V = 40
DTYPES = {"float32": tf.float32, "bfloat16": tf.bfloat16, "float16": tf.float16}
SUMS = 2e-5  # of sums in float32, relative to the largest
OPTIMIZERS = {
    "SGD": lambda **k: optimizers.SGD(0.1, **k),
    "Adagrad": lambda **k: optimizers.Adagrad(0.1, **k),
    "RowWiseAdagrad": lambda **k: optimizers.RowWiseAdagrad(0.1, **k),
    "LazyAdam": lambda **k: optimizers.LazyAdam(0.1, **k),
    "Ftrl": lambda **k: optimizers.Ftrl(0.1, l1_regularization_strength=0.01, l2_regularization_strength=0.1, **k),
}


@pytest.fixture
def rng():
    return np.random.default_rng(2010)


def on(device, value, dtype=tf.float32):
    with tf.device(device):
        return tf.Variable(tf.cast(value, dtype))


def expected(table, indices, values=None, output="scalar"):
    """(the interaction, its gradient [V, K]) by the reference, in float64."""
    with tf.device("/CPU:0"):
        table = tf.Variable(tf.cast(tf.constant(np.asarray(table, np.float64)), tf.float64))
        with tf.GradientTape() as tape:
            y = reference.fm_interaction(table, indices, values, output=output)
        gradient = tape.gradient(y, table)
    return y, rows_of(gradient)


def rows_of(gradient):
    """[V, ...] of slices."""
    values = gradient.values.numpy()
    rows = np.zeros((V, *values.shape[1:]))
    np.add.at(rows, gradient.indices.numpy(), values)
    return rows


def close(got, want, tolerance=SUMS):
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1, np.abs(want).max(initial=0)))


def unique_rows_of(gradient):
    """`rows_of` slices whose indices are unique and ascending."""
    assert (np.diff(gradient.indices.numpy()) > 0).all()
    return rows_of(gradient)


def drawn(case, rng):
    """(inputs as arrays, keywords) of `ops.interaction`."""
    b, f = (9, 7)
    indices = rng.integers(0, V, (b, f)) // 3 * 3
    pairs, options = {"indices": indices, "values": rng.normal(size=(b, f))}, {}
    if case == "ragged":
        splits = np.array([0, 0, 5, 17, 17, 40, 63])
        pairs = {name: x.ravel() for name, x in pairs.items()} | {"row_splits": splits}
    if case == "multivalued":
        options["field_splits"] = (0, 1, 4, 4, 7)
    if case == "ones":
        del pairs["values"]
    if case == "empty":
        pairs = {name: x[:0] for name, x in pairs.items()}
    return pairs, options


def interaction(tables, pairs, output, options, device, dtype):
    """Results and gradients, on a device or, with float64 tables, by the reference."""
    with tf.device("/CPU:0"):
        pairs = {name: tf.constant(x) for name, x in pairs.items()}
        values = pairs.get("values")
        acc = arguments.accumulation_dtype(dtype)
        values = None if values is None else tf.cast(values, acc)
        given = arguments.Pairs(pairs["indices"], values, pairs.get("row_splits"))
    run = ops.interaction if device == GPU else reference.interaction
    keywords = {"field_splits": options.get("field_splits", ()), "weights": tables[1] if len(tables) > 1 else None}
    if device == GPU:
        keywords |= {"return_embeddings": True, "backend": "native"}
    with contextlib.nullcontext() if device == GPU else tf.device(device):
        with tf.GradientTape() as tape:
            if values is not None:
                tape.watch(values)
            results = [r for r in run(tables[0], given, output, **keywords) if r is not None]
        with tf.device("/CPU:0"):
            seeds = [tf.sin(tf.cast(tf.reshape(tf.range(np.prod(r.shape)), r.shape), r.dtype)) for r in results]
        return results, tape.gradient(results, [*tables, *([] if values is None else [values])], seeds)


@pytest.mark.parametrize("function", [False, True], ids=["eager", "function"])
@pytest.mark.parametrize("case", ["dense", "ragged", "multivalued", "ones", "empty"])
@pytest.mark.parametrize("output", ["sum", "scalar", "vector"])
def test_forward_and_gradient(output, case, function, rng):
    k = {"sum": 16, "scalar": 10, "vector": 1}[output]
    table, weights = rng.normal(size=(V, k)), rng.normal(size=(V, 1))
    pairs, options = drawn(case, rng)
    ours = [on("/GPU:0", x) for x in (table, weights)]
    theirs = [on("/CPU:0", x, tf.float64) for x in (table, weights)]

    def run():
        return interaction(ours, pairs, output, options, GPU, tf.float32)

    results, gradients = (tf.function(run, jit_compile=False) if function else run)()
    wanted, wanted_gradients = interaction(theirs, pairs, output, options, "/CPU:0", tf.float64)
    assert len(results) == len(wanted) == 3
    for got, want in zip(results, wanted, strict=True):
        close(got, want)
    assert len(gradients) == len(wanted_gradients) == 2 + ("values" in pairs)
    for got, want in zip(gradients, wanted_gradients, strict=True):
        slices = isinstance(got, tf.IndexedSlices)
        close(*((unique_rows_of(got), rows_of(want)) if slices else (got, want)), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("indices_dtype", ["int32", "int64"])
def test_dtypes_and_where_results_are(dtype, indices_dtype, rng):
    table = on("/GPU:0", rng.normal(size=(V, 16)), DTYPES[dtype])
    indices = rng.integers(0, V, (9, 3)).astype(indices_dtype)
    with tf.GradientTape() as tape:
        y = deepfm_ops.fm_interaction(table, indices)
    gradient = tape.gradient(y, table)
    want, wanted = expected(table.numpy(), indices)
    close(y, want)
    got = tf.IndexedSlices(on("/CPU:0", gradient.values), gradient.indices)
    close(unique_rows_of(got), wanted, {"float32": 1e-5, "bfloat16": 8e-3, "float16": 1e-3}[dtype])
    assert {y.device, gradient.values.device, gradient.indices.device} == {GPU}


def test_a_tensor_as_table(rng):
    table = rng.normal(size=(V, 5)).astype("f")
    indices = rng.integers(0, V, (9, 3))
    with tf.device("/GPU:0"):
        tensor = tf.identity(tf.constant(table))
    with tf.GradientTape() as tape:
        tape.watch(tensor)
        y = deepfm_ops.fm_interaction(tensor, indices)
    assert y.device == tape.gradient(y, tensor).values.device == GPU
    close(y, expected(table, indices)[0])


def test_what_is_not_covered_falls_back(rng):
    table = on("/GPU:0", rng.normal(size=(V, 4)), tf.float64)
    assert ops.native_for(table) is None
    with pytest.raises(ValueError, match="it is on .*GPU:0, and there is no kernel for float64 on a GPU"):
        ops.native_for(table, "native")
    assert ops.native_for(on("/GPU:0", rng.normal(size=(V, 4)))) is not None
    info = deepfm_ops.native_info()
    assert info["cuda_architectures"] == ["emulated"] and info["cuda_reason"] is info["cuda_runtime"] is None


# ---------------------------------------------------------------------------------------------
# Errors: those of the CPU


@pytest.mark.parametrize("function", [False, True], ids=["eager", "function"])
def test_errors_are_those_of_the_cpu(function, rng):
    table = rng.normal(size=(V, 4))
    tables = [on(device, table) for device in ("/GPU:0", "/CPU:0")]
    good, row = np.array([[1, 2], [3, 4]]), np.array([1, 2, 3, 4])
    bad = [
        ({"indices": np.array([[1, 2], [V, 4], [-1, 0]])}, r"indices\[1,0\] = 40 is not in \[0, 40\)"),
        ({"indices": np.array([[1, -7]], np.int32)}, r"indices\[0,1\] = -7 is not in \[0, 40\)"),
        ({"indices": np.array([1, 2, 41, 2]), "row_splits": [0, 4]}, r"indices\[2\] = 41 is not in \[0, 40\)"),
        ({"indices": row, "row_splits": [1, 4]}, r"row_splits must start at 0, got row_splits\[0\] = 1"),
        (
            {"indices": row, "row_splits": [0, 3, 2, 4]},
            r"row_splits must not decrease, got row_splits\[1\] = 3 and row_splits\[2\] = 2",
        ),
        ({"indices": row, "row_splits": [0, 3]}, r"row_splits must end at nnz = 4, got row_splits\[1\] = 3"),
        ({"indices": row, "row_splits": [0, 5]}, r"row_splits must end at nnz = 4, got row_splits\[1\] = 5"),
        (
            {"indices": row, "row_splits": [0, -9, 2**62, 4]},
            r"row_splits must not decrease, got row_splits\[0\] = 0 and",
        ),
    ]

    def run(variable, inputs):
        call = functools.partial(deepfm_ops.fm_interaction, variable, **inputs)
        return (tf.function(call, jit_compile=False) if function else call)()

    for inputs, text in bad:
        for variable in tables:
            with pytest.raises(I, match=text):
                run(variable, inputs)
    for variable in tables:  # and nothing is left of it
        close(deepfm_ops.fm_interaction(variable, good), expected(table, good)[0])


def test_errors_of_the_gradient(rng):
    """Called without a forward, as nobody does: it checks for itself."""
    native = _library.native_ops("native")
    table = on("/GPU:0", rng.normal(size=(V, 4)))

    def gradient(indices, row_splits=()):
        with tf.device("/CPU:0"):
            b = len(row_splits[0]) - 1 if row_splits else len(indices)
            return native.deepfm_ops_resource_fm_interaction_grad(
                table=table.handle,
                indices=tf.constant(indices, tf.int64),
                values=[],
                row_splits=[tf.constant(x, tf.int64) for x in row_splits],
                weights=[],
                counts=[],
                priors=[],
                field_weights=[],
                sums=tf.zeros((b, 4)),
                embeddings=[],
                d_interaction=tf.ones((b, 1)),
                d_embeddings=[],
                d_linear=[],
                d_penalty=tf.constant(0.0),
                output="scalar",
                field_splits=[],
                need_values=False,
                T=tf.float32,
            )

    assert gradient([[3, 3]])[0].device == GPU
    with pytest.raises(I, match=r"indices\[1,1\] = 99 is not in \[0, 40\)"):
        gradient([[1, 2], [3, 99]])
    with pytest.raises(I, match=r"row_splits must end at nnz = 2, got row_splits\[1\] = 1"):
        gradient([1, 2], [[0, 1]])


def test_tables_of_two_devices(rng):
    pairs = arguments.Pairs(tf.constant([[0, 1]], tf.int64), None, None)
    devices = [("/GPU:0", "/CPU:0"), ("/CPU:0", "/GPU:0")]
    for first, second in devices:
        table, weights = on(first, rng.normal(size=(V, 4))), on(second, rng.normal(size=(V, 1)))
        with pytest.raises((I, ValueError), match="device"):
            ops.interaction(table, pairs, "scalar", weights=weights)


# ---------------------------------------------------------------------------------------------
# Optimizers


def made(name, **options):
    with tf.device("/CPU:0"):  # for its counters TensorFlow has no kernels there
        return OPTIMIZERS[name](**options)


def tables_on(device, *arrays):
    with tf.device(device):
        return [keras.Variable(array, dtype="float32") for array in arrays]


def state_of(optimizer, tables):
    """The tables and what the optimizer has for each, as TensorFlow's variables."""
    found = [*tables, *(slot for table in tables for slot in optimizer._slots(table))]
    found += [optimizer._lag_of(table) for table in tables if optimizer.use_ema]
    return [variable.value for variable in found]


@pytest.mark.parametrize("ema", [False, True], ids=["", "ema"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates(name, ema, rng):
    start, results = rng.normal(size=(V, 5)), []
    steps = [(rng.integers(0, V, 30) // 4 * 4, rng.normal(size=(30, 5))) for _ in range(3)]
    for device in ("/GPU:0", "/CPU:0"):
        tables, optimizer = tables_on(device, start), made(name, use_ema=ema, weight_decay=0.01)
        optimizer.build(tables)
        assert {v.device[-5:] for v in state_of(optimizer, tables)} == {device[-5:]}
        for indices, gradient in steps:
            optimizer.apply([tf.IndexedSlices(*map(tf.constant, (gradient.astype("f"), indices, (V, 5))))], tables)
        with pytest.raises(I, match=r"indices\[1\] = 77 is not in \[0, 40\)"):  # then nothing is written
            optimizer.apply([tf.IndexedSlices(tf.ones((3, 5)), tf.constant([0, 77, 3]), (V, 5))], tables)
        results.append([v.numpy() for v in state_of(optimizer, tables)])
    for got, want in zip(*results, strict=True):
        close(got, want, 1e-5)
    assert np.abs(results[0][0] - start).max() > 0.01


class Net:
    """An interaction with a first order, a prior that counts and embeddings that a loss uses, and its optimizer."""

    def __init__(self, device, name, field_sizes=None):
        rng = np.random.default_rng(7)
        self.optimizer = made(name)
        self.tables = tables_on(device, rng.normal(size=(V, 6)), rng.normal(size=(V, 1)))
        self.optimizer.build(self.tables)
        with tf.device("/CPU:0"):
            counts = tf.constant(np.arange(1, V + 1), tf.int32)
            self.penalty = reference.Penalty(0.03, 0.02, counts, tf.constant([0.5, 0.25, 10.0]))
        self.splits = () if field_sizes is None else field_sizes

    def step(self, indices, values, targets):
        tables = [table.value for table in self.tables]

        def run(indices, values, targets):
            with tf.GradientTape() as tape:
                y, embeddings, linear, silent = ops.interaction(
                    tables[0],
                    arguments.Pairs(indices, values, None),
                    "scalar",
                    field_splits=self.splits,
                    return_embeddings=True,
                    weights=tables[1],
                    penalty=self.penalty,
                    backend="native",
                )
                loss = tf.reduce_mean((y + linear - targets) ** 2) + tf.reduce_mean(embeddings**2) + silent
            self.optimizer.apply(tape.gradient(loss, tables), self.tables)
            return loss

        if not hasattr(self, "_run"):
            self._run = tf.function(run, jit_compile=False)
        return self._run(indices, values, targets)


@pytest.mark.parametrize("splits", [None, (0, 1, 4, 6)], ids=["", "multivalued"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_steps(name, splits, rng):
    """The gradient and the update in one op; an index error in the middle leaves everything as it was."""
    steps = [(rng.integers(0, V, (8, 6)), rng.normal(size=(8, 6)), rng.normal(size=(8, 1))) for _ in range(4)]
    ours, theirs = (Net(device, name, splits) for device in ("/GPU:0", "/CPU:0"))
    for number, (indices, values, targets) in enumerate(steps):
        with tf.device("/CPU:0"):
            step = tf.constant(indices), tf.constant(values, tf.float32), tf.constant(targets, tf.float32)
            wrong = tf.constant(np.where(np.arange(6) == number, V, indices)), *step[1:]
        close(ours.step(*step), theirs.step(*step), 1e-5)
        before = [v.numpy() for v in state_of(ours.optimizer, ours.tables)]
        with pytest.raises(I, match=rf"indices\[0,{number}\] = 40 is not in \[0, 40\)"):
            ours.step(*wrong)
        for variable, want in zip(state_of(ours.optimizer, ours.tables), before, strict=True):
            np.testing.assert_array_equal(variable.numpy(), want)
        ours.optimizer.iterations.assign(number + 1)  # a step that failed may have counted itself
    graph = ours._run.get_concrete_function(*step).graph
    assert "DeepfmOpsResourceFmUpdate" in {op.type for op in graph.get_operations()}
    for got, want in zip(*(state_of(net.optimizer, net.tables) for net in (ours, theirs)), strict=True):
        close(got, want, 2e-5)


def test_a_table_that_someone_else_reads_is_copied_before_it_is_written(rng):
    start = rng.normal(size=(V, 4)).astype("f")
    (table,), optimizer = tables_on("/GPU:0", start), made("SGD")
    optimizer.build([table])
    kept = table.value.read_value()  # shares the variable's memory
    optimizer.apply([tf.IndexedSlices(tf.ones((1, 4)), tf.constant([3]), (V, 4))], [table])
    np.testing.assert_array_equal(kept.numpy(), start)
    start[3] -= 0.1
    close(table, start, 1e-6)


# ---------------------------------------------------------------------------------------------
# Layers and models


def test_a_layer_is_used_where_its_table_is(rng):
    layer = FMInteraction(V, 8)
    indices, values = rng.integers(0, V, (6, 3)), rng.normal(size=(6, 3)).astype("f")
    with tf.device("/CPU:0"):
        inputs = tf.constant(indices), tf.constant(values)
    y = layer(inputs)
    assert layer.embeddings.value.device == GPU and y.device == GPU
    close(y, expected(layer.embeddings.numpy(), indices, values)[0])


def test_keras_does_not_compile_these_models_with_xla():
    model = DeepFM(num_features=V, num_fields=3, hidden_units=(4,), seed=1)
    model.compile(optimizers.LazyAdam(1e-3), "binary_crossentropy")
    assert not model.jit_compile


def test_other_interactions_are_for_the_cpu(rng):
    """Natively refused on the device, so that the reference computes them there."""
    table, indices = on("/GPU:0", rng.normal(size=(V, 4))), rng.integers(0, V, (5, 3))
    pairs = arguments.parse(table, indices, None, None, "scalar")[1]
    assert ops.native_for(table) is not None and ops.native_for(table, is_plain=False) is None
    with pytest.raises(ValueError, match="there is no kernel for an order of 3 or field weights on a GPU"):
        ops.interaction(table, pairs, "scalar", order=3, backend="native")
