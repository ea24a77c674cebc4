"""Keras's optimizers are exact on our gradient, and not on that of keras.layers.Embedding; ours are on both."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from testing import REFERENCE_MODE, run_with_tensorflow

from deepfm_ops import DeepFM, FMInteraction, ops, optimizers

OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "Adagrad": lambda: keras.optimizers.Adagrad(0.1),
    "Adam": lambda: keras.optimizers.Adam(0.01),
    "Ftrl": lambda: keras.optimizers.Ftrl(0.1),
}


class EmbeddingFM(keras.layers.Layer):
    """The same model on Keras's own embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = keras.layers.Embedding(30, 4)
        self.embedding.build()
        self.embeddings = self.embedding.embeddings

    def call(self, inputs):
        e = self.embedding(inputs[0]) * inputs[1][..., tf.newaxis]
        s = tf.reduce_sum(e, axis=1)
        return 0.5 * tf.reduce_sum(s * s - tf.reduce_sum(e * e, axis=1), axis=1, keepdims=True)


def ten_steps(layer, optimizer, start, densify, rng):
    layer.build(None)
    layer.embeddings.assign(start)
    variable = layer.embeddings
    for _ in range(10):
        indices = rng.integers(0, 30, (40, 6)) // 5 * 5  # six rows, each about forty times
        values, target = rng.normal(size=(40, 6)).astype("f"), rng.normal(size=(40, 1)).astype("f")
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((layer((indices, tf.constant(values))) - target) ** 2)
        gradient = tape.gradient(loss, variable.value)
        assert isinstance(gradient, tf.IndexedSlices)
        optimizer.apply([tf.convert_to_tensor(gradient) if densify else gradient], [variable])
    return variable.numpy()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_ten_steps_equal_the_dense_steps(name, backend, rng):
    start = rng.normal(size=(30, 4)).astype("f")
    make_layer = lambda: FMInteraction(30, 4, backend=backend)  # noqa: E731
    sparse, dense = (
        ten_steps(make_layer(), OPTIMIZERS[name](), start, densify, np.random.default_rng(1))
        for densify in (False, True)
    )
    np.testing.assert_allclose(sparse, dense, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["Adagrad", "Adam", "Ftrl"])
def test_keras_embedding_does_not(name, rng):
    """Repeated indices: a row learns from one of its occurrences only. (SGD adds, and is right.)"""
    start = rng.normal(size=(30, 4)).astype("f")
    sparse, dense = (
        ten_steps(EmbeddingFM(), OPTIMIZERS[name](), start, densify, np.random.default_rng(1))
        for densify in (False, True)
    )
    assert np.abs(sparse - dense).max() > 1e-2


# Ours, and what its update of a dense gradient must equal.
OURS = {
    "SGD": (lambda **k: optimizers.SGD(0.1, **k), lambda **k: keras.optimizers.SGD(0.1, **k)),
    "momentum": (
        lambda **k: optimizers.SGD(0.01, momentum=0.9, **k),
        lambda **k: keras.optimizers.SGD(0.01, momentum=0.9, **k),
    ),
    "Adagrad": (lambda **k: optimizers.Adagrad(0.1, **k), lambda **k: keras.optimizers.Adagrad(0.1, **k)),
    "RowWiseAdagrad": (lambda **k: optimizers.RowWiseAdagrad(0.1, **k),) * 2,
    "LazyAdam": (lambda **k: optimizers.LazyAdam(0.1, **k), lambda **k: keras.optimizers.Adam(0.1, **k)),
    "Ftrl": (lambda **k: optimizers.Ftrl(0.1, **k), lambda **k: keras.optimizers.Ftrl(0.1, **k)),
    "Ftrl, regularized": tuple(
        lambda o=o, **k: o.Ftrl(
            0.1,
            l1_regularization_strength=0.01,
            l2_regularization_strength=0.1,
            l2_shrinkage_regularization_strength=0.01,
            beta=0.1,
            learning_rate_power=-0.6,
            **k,
        )
        for o in (optimizers, keras.optimizers)
    ),
}


@pytest.fixture(params=["plain"] if REFERENCE_MODE else ["native", "plain"])
def update(request, monkeypatch):
    """The rows' update by the native op and in plain TensorFlow."""
    if request.param == "plain":
        monkeypatch.setattr(ops, "native_for", lambda table, backend="auto": None)
    return request.param


def batches(steps, rows=6, shape=(5,), dtype="float32", seed=1):
    """Indices with heavy duplicates, every row among them, and their gradients."""
    r = np.random.default_rng(seed)
    for _ in range(steps):
        indices = np.concatenate([r.permutation(rows), r.integers(0, rows, 30)])
        yield indices, r.normal(size=(len(indices), *shape)).astype(dtype)


def train(optimizer, start, densify, steps=100, dtype="float32"):
    variable = keras.Variable(start, dtype=dtype)
    for indices, gradient in batches(steps, len(start), start.shape[1:], dtype):
        slices = tf.IndexedSlices(gradient, indices, start.shape)
        optimizer.apply([tf.convert_to_tensor(slices) if densify else slices], [variable])
    return variable.numpy()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("dim", [(5,), (16,), (1,), (33,), (), (3, 4)])
@pytest.mark.parametrize("name", OURS)
def test_a_hundred_steps_equal_the_dense_steps(name, dim, dtype, update, rng):
    if dim not in ((5,), (1,)) and (update == "plain" or dtype == "float64"):
        return  # the native op's paths
    start = rng.normal(size=(6, *dim)).astype(dtype)
    ours, dense = (train(make(), start, densify, 100, dtype) for make, densify in zip(OURS[name], (0, 1), strict=True))
    assert np.abs(dense - start).max() > 0.1
    np.testing.assert_allclose(ours, dense, rtol=1e-6 if dtype == "float32" else 1e-13, atol=1e-6 * np.abs(dense).max())


@pytest.mark.parametrize("name", OURS)
def test_dense_gradients_are_updated_as_keras_does(name, rng):
    start = rng.normal(size=(6, 5)).astype("f")
    ours, theirs = (train(make(), start, True, 10) for make in OURS[name])
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"clipnorm": 0.5},
        {"clipvalue": 0.1},
        {"global_clipnorm": 0.5},
        {"weight_decay": 0.1},
        {"loss_scale_factor": 8.0},
        {"gradient_accumulation_steps": 4},
        {"clipnorm": 0.5, "weight_decay": 0.1, "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["SGD", "momentum", "Adagrad", "RowWiseAdagrad", "LazyAdam", "Ftrl"])
@pytest.mark.parametrize("graph", [False, True])
def test_keras_options(name, options, graph, rng):
    start = rng.normal(size=(6, 5)).astype("f")

    def result(optimizer, densify):
        variable = keras.Variable(start)
        optimizer.build([variable])

        def step(indices, gradient):
            slices = tf.IndexedSlices(gradient, indices, start.shape)
            optimizer.apply([tf.convert_to_tensor(slices) if densify else slices], [variable])

        step = tf.function(step) if graph else step
        for indices, gradient in batches(12):
            step(tf.constant(indices), tf.constant(gradient))
        return variable.numpy()

    results = [result(make(**options), densify) for make, densify in zip(OURS[name], (False, True), strict=True)]
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RowWiseAdagrad", "LazyAdam", "Ftrl"])
def test_absent_rows_and_their_slots_stay(name, update, rng):
    start = rng.normal(size=(50, 5)).astype("f")
    optimizer, variable = OURS[name][0](weight_decay=0.1), keras.Variable(start)
    optimizer.build([variable])
    before = [v.numpy() for v in optimizer.variables]
    indices = np.array([7, 3, 7, 40, 3, 3], np.int32)
    optimizer.apply([tf.IndexedSlices(rng.normal(size=(6, 5)).astype("f"), indices, (50, 5))], [variable])
    for old, new in [(start, variable.numpy()), *zip(before, (v.numpy() for v in optimizer.variables), strict=True)]:
        if np.ndim(old) and len(old) == 50:
            changed = np.any((old != new).reshape(50, -1), axis=1)
            np.testing.assert_array_equal(np.flatnonzero(changed), [3, 7, 40])


# weight.tolist() after torch.optim.SparseAdam (PyTorch 2.13.0) on the steps of the test below.
TORCH = [
    [0.1397200, -0.0310804, 0.4471079],
    [0.3822159, -0.5444233, 0.5247264],
    [1.1081296, 0.9348984, -0.7714499],
    [-1.0050427, -0.6953293, 0.1296130],
    [-2.4407127, -0.2219660, -1.4916102],
    [-0.9029808, -0.4827129, -0.1538629],
    [0.4459013, 0.9339390, -0.3081500],
]


def test_lazy_adam_is_sparse_adam(update):
    rng = np.random.default_rng(0)
    variable = keras.Variable(rng.normal(size=(7, 3)).astype("f"))
    optimizer = optimizers.LazyAdam(0.05, beta_1=0.8, beta_2=0.95, epsilon=1e-6)
    for _ in range(12):
        indices = rng.integers(0, 7, rng.integers(1, 9))
        gradient = rng.normal(size=(len(indices), 3)).astype("f")
        optimizer.apply([tf.IndexedSlices(gradient, indices, (7, 3))], [variable])
    np.testing.assert_allclose(variable, TORCH, atol=1e-6)


def test_ftrl_leaves_rows_it_has_not_seen(rng):
    """Where sparse and dense differ: the dense step sets every row to what its zero state says."""
    start = rng.normal(size=(4, 2)).astype("f")
    slices = tf.IndexedSlices(np.ones((1, 2), "f"), np.array([2]), (4, 2))
    results = []
    for densify in (False, True):
        variable = keras.Variable(start)
        optimizers.Ftrl(0.1).apply([tf.convert_to_tensor(slices) if densify else slices], [variable])
        results.append(variable.numpy())
    np.testing.assert_array_equal(results[0][[0, 1, 3]], start[[0, 1, 3]])
    np.testing.assert_array_equal(results[1][[0, 1, 3]], 0)
    np.testing.assert_allclose(results[0][2], results[1][2], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "LazyAdam"])
def test_narrow_tables(name, dtype, rng):
    start = rng.normal(size=(6, 5))
    wide = train(OURS[name][0](), start.astype("f"), False, 5)
    variable, optimizer = keras.Variable(start, dtype=dtype), OURS[name][0]()
    for indices, gradient in batches(5):
        slices = tf.IndexedSlices(tf.cast(gradient, dtype), indices, start.shape)
        optimizer.apply([slices], [variable])
    np.testing.assert_allclose(tf.cast(variable.value, tf.float32), wide, atol=0.08)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_sums_are_kept_wide(dtype, update):
    """A thousand gradients of one row; rows without a gradient under a small epsilon."""
    slices = tf.IndexedSlices(tf.ones((1000, 1), dtype), tf.zeros(1000, tf.int64), (2, 1))
    for options in ({}, {"clipvalue": 1e6}):
        variable = keras.Variable(np.zeros((2, 1)), dtype=dtype)
        optimizers.SGD(1.0, **options).apply([slices], [variable])
        np.testing.assert_array_equal(tf.cast(variable.value, tf.float32), [[-1000], [0]])
    variable = keras.Variable(np.ones((2, 1)), dtype=dtype)
    optimizers.RowWiseAdagrad(0.5).apply([tf.constant([[1.0], [0.0]], dtype)], [variable])
    np.testing.assert_array_equal(tf.cast(variable.value, tf.float32), [[0.5], [1]])


def test_values_of_unknown_rank(update):
    variable, optimizer = keras.Variable(np.ones((4, 2), "f")), optimizers.RowWiseAdagrad(0.5)
    optimizer.build([variable])

    @tf.function(input_signature=[tf.TensorSpec(None), tf.TensorSpec(None, tf.int64)])
    def step(values, indices):
        optimizer.apply([tf.IndexedSlices(values, indices, (4, 2))], [variable])

    step(tf.ones((1, 2)), tf.constant([2], tf.int64))
    np.testing.assert_allclose(variable, [[1, 1], [1, 1], [0.5, 0.5], [1, 1]], rtol=1e-6)


def test_empty_and_bad_gradients(update, rng):
    start = rng.normal(size=(6, 2)).astype("f")
    variable, optimizer = keras.Variable(start), optimizers.Adagrad(0.1)
    optimizer.apply([tf.IndexedSlices(tf.zeros((0, 2)), tf.zeros((0,), tf.int64), (6, 2))], [variable])
    np.testing.assert_array_equal(variable, start)
    for bad in (6, -1):
        with pytest.raises(tf.errors.InvalidArgumentError):
            optimizer.apply([tf.IndexedSlices(tf.ones((2, 2)), tf.constant([0, bad]), (6, 2))], [variable])
        np.testing.assert_array_equal(variable, start)
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError)):
        optimizer.apply([tf.IndexedSlices(tf.ones((2, 3)), tf.constant([0, 1]), (6, 2))], [variable])
    with pytest.raises(ValueError, match="amsgrad"):
        optimizers.LazyAdam(amsgrad=True)
    with pytest.raises(ValueError, match="epsilon must be above 0"):
        optimizers.RowWiseAdagrad(epsilon=0.0)


def test_native_op_validates():
    if REFERENCE_MODE:
        return
    from deepfm_ops import _library

    native = _library.native_ops("native")
    table, slot = tf.Variable(tf.ones((4, 2))), tf.Variable(tf.ones((4, 2)))
    good = {"table": table.handle, "slots": [slot.handle], "indices": tf.constant([1, 1]), "rule": "adagrad"}
    good |= {"lags": [], "counts": [], "gradient": tf.ones((2, 2)), "hyper": tf.constant([0.0, 0.1, 1e-7])}
    uninitialized = tf.raw_ops.VarHandleOp(dtype=tf.float32, shape=[4, 2], shared_name="not there")
    for change, message in [
        ({"indices": tf.constant([1, 4])}, r"indices\[1\] = 4 is not in \[0, 4\)"),
        ({"indices": tf.constant([[1, 1]])}, "indices must be rank 1"),
        ({"gradient": tf.ones((2, 3))}, "gradient must have shape"),
        ({"gradient": tf.ones((2, 2), tf.float64), "hyper": tf.zeros(3, tf.float64)}, "table holds float"),
        ({"hyper": tf.zeros(2)}, "hyper must have shape"),
        ({"slots": []}, "adagrad has 1 slots, got 0"),
        ({"hyper": tf.zeros(3, tf.float64)}, "Tacc must be float for a table of float, got double"),
        ({"slots": [table.handle]}, "must be different variables"),
        ({"slots": [tf.Variable(tf.ones((4, 3))).handle]}, "a slot must have 8 elements"),
        ({"table": uninitialized}, "not there|not exist"),
        ({"lags": [slot.handle], "hyper": tf.zeros(4)}, "must be different variables"),
        ({"counts": [tf.ones([3], tf.int32)], "hyper": tf.zeros(5)}, "counts must have shape"),
        ({"lags": [tf.Variable(tf.ones((4, 2))).handle]}, "hyper must have shape"),
    ]:
        with pytest.raises(
            (tf.errors.InvalidArgumentError, tf.errors.NotFoundError, tf.errors.FailedPreconditionError), match=message
        ):
            native.deepfm_ops_sparse_update(**{**good, **change})
    np.testing.assert_array_equal(table, np.ones((4, 2)))


def test_a_reader_keeps_what_it_read():
    """The update writes in place: a value that was read before must not change under its reader."""
    variable = keras.Variable(np.ones((4, 2), "f"))
    held = tf.identity(variable.value)
    read = variable.value.read_value()
    slices = tf.IndexedSlices(tf.ones((1, 2)), tf.constant([1]), (4, 2))
    optimizers.SGD(0.5).apply([slices], [variable])
    np.testing.assert_array_equal(held, np.ones((4, 2)))
    np.testing.assert_array_equal(read, np.ones((4, 2)))
    np.testing.assert_array_equal(variable[:, 0], [1, 0.5, 1, 1])


def make_model(optimizer, seed=3, **options):
    model = DeepFM(200, 4, embedding_dim=4, hidden_units=(8,), seed=seed, **options)
    model.compile(optimizer, "binary_crossentropy")
    return model


def make_batch(step):
    r = np.random.default_rng(step)
    indices = r.integers(0, 200, (64, 4)) // 7 * 7
    return (indices, np.ones((64, 4), "f")), r.integers(0, 2, (64, 1)).astype("f")


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RowWiseAdagrad", "LazyAdam", "Ftrl"])
def test_resumed_training_is_straight_training(name, tmp_path):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.05, 50, 0.9)
    make = lambda: getattr(optimizers, name)(schedule)  # noqa: E731
    straight, first = make_model(make()), make_model(make())
    for step in range(200):
        straight.train_on_batch(*make_batch(step))
    for step in range(100):
        first.train_on_batch(*make_batch(step))
    first.save(tmp_path / "model.keras")
    second = keras.models.load_model(tmp_path / "model.keras")
    assert type(second.optimizer) is getattr(optimizers, name)
    for step in range(100, 200):
        second.train_on_batch(*make_batch(step))
    for a, b in zip(straight.variables, second.variables, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(straight.optimizer.variables, second.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a, b)
    assert second.optimizer.get_config() == first.optimizer.get_config()


def test_learning_rate_can_be_changed():
    model = make_model(optimizers.LazyAdam(0.1))
    model.train_on_batch(*make_batch(0))
    model.optimizer.learning_rate = 0.0
    before = [w.numpy() for w in model.weights]
    model.train_on_batch(*make_batch(1))
    for old, new in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, new)


def test_dynamic_loss_scaling():
    results = []
    for wrap in (lambda o: o, keras.mixed_precision.LossScaleOptimizer):
        model = make_model(wrap(optimizers.LazyAdam(0.05)))
        for step in range(20):
            model.train_on_batch(*make_batch(step))
        results.append(model.get_layer("fm").embeddings.numpy())
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-5)


def test_ordinary_keras_embedding(update):
    """Repeated ids in a model that knows nothing of this package."""
    results = []
    for optimizer in (optimizers.Adagrad(0.1), keras.optimizers.Adagrad(0.1)):
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [
                keras.Input((4,), dtype="int64"),
                keras.layers.Embedding(30, 3),
                keras.layers.Flatten(),
                keras.layers.Dense(1),
            ]
        )
        if isinstance(optimizer, optimizers.Adagrad):
            model.compile(optimizer, "mse", jit_compile=False)
        for step in range(20):
            (x, _), y = make_batch(step)
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(x % 30) - y) ** 2)
            gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
            if not isinstance(optimizer, optimizers.Adagrad):
                gradients = [tf.convert_to_tensor(g) for g in gradients]
            optimizer.apply(gradients, model.trainable_variables)
        results.append(model.weights[0].numpy())
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)


DETERMINISM = """
import hashlib, os, sys
import numpy as np, tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads({threads})
tf.config.threading.set_inter_op_parallelism_threads({threads})
from deepfm_ops import DeepFM, optimizers
model = DeepFM(20000, 20, embedding_dim=16, hidden_units=(), use_deep=False, seed=3)
model.compile(optimizers.LazyAdam(0.01), "binary_crossentropy")
r = np.random.default_rng(0)
for step in range(200):
    indices = (r.random((2048, 20)) ** 3 * 20000).astype(np.int64)
    model.train_on_batch((indices, np.ones((2048, 20), "f")), r.integers(0, 2, (2048, 1)).astype("f"))
digest = hashlib.sha256()
for variable in [*model.variables, *model.optimizer.variables]:
    digest.update(variable.numpy().tobytes())
print(digest.hexdigest())
"""


def test_same_bits_for_one_and_two_threads_and_run_to_run():
    if REFERENCE_MODE:
        return
    digests = {run_with_tensorflow(DETERMINISM.format(threads=threads)) for threads in (1, 2, 2)}
    assert len(digests) == 1


def test_same_bits_run_to_run_with_the_deep_part():
    """On a given number of threads: TensorFlow's dense layers give other bits on another number."""
    if REFERENCE_MODE:
        return
    code = DETERMINISM.replace("hidden_units=(), use_deep=False", "hidden_units=(32,)").replace(
        "range(200)", "range(50)"
    )
    assert len({run_with_tensorflow(code.format(threads=2)) for _ in range(2)}) == 1
