"""DeepFM over matrices: parts, training, saving, exporting, policies."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from testing import REFERENCE_MODE, dense_samples, oracle, run_python, run_with_tensorflow

import deepfm_ops
from deepfm_ops import DeepFM, optimizers


@pytest.fixture
def data(rng):
    indices, values = rng.integers(0, 60, (64, 5)), rng.normal(size=(64, 5)).astype("f")
    return (indices, values), rng.integers(0, 2, 64)


def small(**arguments):
    defaults = {"num_features": 60, "num_fields": 5, "embedding_dim": 4, "hidden_units": (8, np.int64(6)), "seed": 1}
    return DeepFM(**{**defaults, **arguments})


PARTS = {
    "LR": {"use_fm": False, "use_deep": False},
    "FM": {"use_deep": False},
    "DNN": {"use_linear": False, "use_fm": False},
    "DeepFM": {},
    "regression": {"task": "regression"},
    "everything": {"batch_norm": True, "dropout": 0.3, "activation": "tanh", "l2_linear": 1e-3, "l2_embedding": 1e-3},
    "fields": {"num_fields": 3, "field_sizes": [1, 3, 1]},
    "l2_deep": {"l2_deep": 1e-3},
    "reference": {"backend": "reference"},
}


def make(kind):
    arguments = dict(PARTS[kind])
    num_fields = arguments.pop("num_fields", 5)
    return DeepFM(60, num_fields, **{"embedding_dim": 4, "hidden_units": (8, 6), "seed": 1, **arguments})


def test_the_formula(data, rng):
    """Y = sigmoid(w0 + y1 + y2 + MLP), part by part, in NumPy."""
    (indices, values), _ = data
    model = small()
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape))
    w = {weight.path: weight.numpy().astype(float) for weight in model.weights}
    e = w["fm/embeddings"][indices] * values[..., None]
    x = e.reshape(64, -1)
    for i in range(2):
        x = np.maximum(0, x @ w[f"hidden_{i}/kernel"] + w[f"hidden_{i}/bias"])
    first = (w["fm/w"][indices, 0] * values).sum(1, keepdims=True)
    second = oracle(w["fm/embeddings"], dense_samples(indices, values))
    logits = w["head/bias"] + first + second + x @ w["deep/kernel"]
    np.testing.assert_allclose(model.predict(data[0], verbose=0), 1 / (1 + np.exp(-logits)), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", PARTS)
def test_trains_saves_loads_and_exports(kind, data, tmp_path):
    inputs, labels = data
    model = make(kind)
    model.compile("adam", "mse" if kind == "regression" else "binary_crossentropy", metrics=["mae"])
    before = model.predict(inputs, verbose=0)
    history = model.fit(inputs, labels, epochs=20, batch_size=16, verbose=0).history["loss"]
    assert history[-1] < history[0]
    scores = model.predict(inputs, verbose=0)
    assert scores.shape == (64, 1) and scores.dtype == np.float32 and np.abs(scores - before).max() > 1e-3
    assert model.jit_compile is False

    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.get_config() == model.get_config()
    np.testing.assert_array_equal(again(inputs), model(inputs))
    if kind not in ("LR", "DNN", "everything", "fields", "reference"):
        return  # what follows takes seconds, and these five have every part
    again.fit(inputs, labels, epochs=1, verbose=0)  # the optimizer came along

    model.save_weights(tmp_path / "model.weights.h5")
    fresh = make(kind)
    fresh.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(fresh(inputs), model(inputs))

    model.export(tmp_path / "exported", verbose=False)
    exported = tf.saved_model.load(tmp_path / "exported")
    served = exported.serve((tf.constant(inputs[0]), tf.constant(inputs[1])))
    np.testing.assert_allclose(served, scores, rtol=1e-6, atol=1e-6)  # summed in another order


def test_loads_in_a_fresh_process(data, tmp_path):
    (indices, values), _ = data
    model = small()
    scores = model.predict((indices, values), verbose=0)
    model.save(tmp_path / "model.keras")
    model.export(tmp_path / "exported", verbose=False)
    np.savez(tmp_path / "data.npz", indices=indices, values=values, scores=scores)
    code = f"""
import keras, numpy as np, tensorflow as tf, deepfm_ops.ops
data = np.load({str(tmp_path / "data.npz")!r})
inputs = (data["indices"], data["values"])
exported = tf.saved_model.load({str(tmp_path / "exported")!r})
served = exported.serve(tuple(tf.constant(x) for x in inputs))
import deepfm_ops.models
scores = keras.models.load_model({str(tmp_path / "model.keras")!r}).predict(inputs, verbose=0)
print(np.abs(scores - data["scores"]).max() < 1e-6, np.abs(served - data["scores"]).max() < 1e-6)
"""
    assert run_with_tensorflow(code).split()[-2:] == ["True", "True"]


def test_one_seed_gives_one_model(data):
    inputs, labels = data
    results = []
    for seed in (1, 1, 2):
        keras.utils.set_random_seed(seed)
        model = small(seed=seed, dropout=0.5)
        model.compile("adam", "binary_crossentropy")
        model.fit(inputs, labels, epochs=3, verbose=0)
        results.append(model.predict(inputs, verbose=0))
    np.testing.assert_array_equal(results[0], results[1])
    assert np.abs(results[0] - results[2]).max() > 1e-4
    kernels = [w.numpy().ravel() for w in small().weights if "kernel" in w.path]
    assert len({k[0] for k in kernels}) == len(kernels)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_dtype_policies(policy, data, tmp_path):
    inputs, labels = data
    model = small(dtype=policy)
    assert keras.config.dtype_policy().name == "float32"
    assert model.get_layer("hidden_0").dtype_policy.name == policy
    model.compile(keras.optimizers.Adam(0.01), "binary_crossentropy")
    history = model.fit(inputs, labels, epochs=15, verbose=0).history["loss"]
    assert history[-1] < history[0]
    scores = model.predict(inputs, verbose=0)
    assert scores.dtype == np.float32
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.get_layer("hidden_0").dtype_policy.name == policy
    np.testing.assert_array_equal(again.predict(inputs, verbose=0), scores)
    keras.config.set_dtype_policy(policy)
    try:
        assert small().get_layer("hidden_0").dtype_policy.name == policy
    finally:
        keras.config.set_dtype_policy("float32")


def test_the_loss_uses_the_logits(data):
    """With a bias of 200 the probability is 1 in float32; a label of 0 must still cost 200, with a gradient."""
    model = small(use_fm=False, use_deep=False)
    model.get_layer("head").bias.assign([200.0])
    model.compile(keras.optimizers.SGD(1.0), "binary_crossentropy")
    assert model.train_on_batch(data[0], np.zeros(64)) == pytest.approx(200, rel=1e-3)
    np.testing.assert_allclose(model.get_layer("head").bias.numpy(), [199.0], rtol=1e-3)


def test_the_gradient_of_the_model_is_sparse(data):
    inputs, _ = data
    model = small()
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model([tf.constant(x) for x in inputs]))
    gradients = tape.gradient(loss, [w.value for w in model.trainable_weights])
    kinds = {w.path: type(g).__name__ for w, g in zip(model.trainable_weights, gradients, strict=True)}
    assert kinds.pop("fm/embeddings") == kinds.pop("fm/w") == "IndexedSlices"
    assert "IndexedSlices" not in kinds.values()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"use_linear": False, "use_fm": False, "use_deep": False}, "at least one of use_linear, use_fm and use_deep"),
        ({"task": "multiclass"}, "task must be one of binary, regression, .* got 'multiclass'"),
        ({"field_sizes": [1, 2]}, "field_sizes must have num_fields = 5 entries, got 2"),
        ({"embedding_dim": 0}, "embedding_dim must be an integer of at least 1, got 0"),
        ({"num_fields": 0}, "num_fields must be an integer of at least 1"),
        ({"num_features": 3.7}, "num_features must be an integer of at least 1, got 3.7"),
        ({"l2_scope": "rows"}, "l2_scope must be one of batch, table, got 'rows'"),
        ({"l2_embedding": -1.0}, "l2 must be a number of at least 0, got -1.0"),
        ({"hidden_units": (4, 0)}, "a hidden width must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_frozen_layers_stay_frozen(data, tmp_path):
    inputs, labels = data
    model = small()
    model.get_layer("fm").trainable = False
    model.compile("adam", "binary_crossentropy")
    model.fit(inputs, labels, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert not again.get_layer("fm").trainable and again.get_layer("head").trainable
    assert len(again.optimizer.variables) == len(model.optimizer.variables)
    table = again.get_layer("fm").embeddings.numpy()
    again.fit(inputs, labels, verbose=0)
    np.testing.assert_array_equal(again.get_layer("fm").embeddings.numpy(), table)


@pytest.mark.parametrize("field_sizes", [None, [1, 1, 1], [1, 1, 2]])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_number_of_columns_that_changes(field_sizes, backend):
    """Keras retraces with unknown sizes, so only the run can tell."""
    columns = 3 if field_sizes is None else sum(field_sizes)
    model = DeepFM(10, 3, 1, use_deep=False, field_sizes=field_sizes, backend=backend)
    assert model.predict((np.ones((2, columns), int), np.ones((2, columns))), verbose=0).shape == (2, 1)
    assert model.predict((np.ones((3, columns), int), np.ones((3, columns))), verbose=0).shape == (3, 1)
    for wrong in (columns + 2, columns - 1):
        with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=f"{columns}"):
            model.predict((np.ones((2, wrong), int), np.ones((2, wrong))), verbose=0)


def test_bad_inputs(data):
    (indices, values), _ = data
    model = small()
    for wrong in (indices + 0.5, values):
        with pytest.raises(TypeError, match="indices must be int32 or int64, got float"):
            model.predict((wrong, values), verbose=0)
        with pytest.raises(TypeError, match="indices must be int32 or int64, got float"):
            model((tf.constant(wrong), values))
    assert model.predict((indices[:0], values[:0]), verbose=0).shape == (0, 1)
    with pytest.raises(ValueError, match="incompatible|[Ii]nvalid"):
        model.predict((indices[:, :4], values[:, :4]), verbose=0)
    indices = indices.copy()
    indices[2, 1] = 60
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"indices\[2,1\] = 60 is not in \[0, 60\)"):
        model.predict((indices, values), verbose=0)


def test_public_names():
    for name in deepfm_ops.__all__:
        assert getattr(deepfm_ops, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        deepfm_ops.nothing  # noqa: B018
    assert (
        run_python("import sys, deepfm_ops, deepfm_ops.features; print('tensorflow' in sys.modules)").strip() == "False"
    )


def test_one_op_looks_everything_up():
    if REFERENCE_MODE:
        return
    model, optimizer = small(l2_embedding=1e-3), optimizers.LazyAdam(0.1)
    optimizer.build(model.trainable_variables)

    @tf.function(input_signature=[tf.TensorSpec((None, 5), tf.int64), tf.TensorSpec((None, 5), tf.float32)])
    def step(indices, values):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model((indices, values)))
        variables = [w.value for w in model.trainable_weights]
        optimizer.apply(tape.gradient(loss, variables), model.trainable_weights)

    names = [op.type for op in step.get_concrete_function().graph.get_operations()]
    assert names.count("DeepfmOpsResourceFmInteraction") == names.count("DeepfmOpsResourceFmInteractionGrad") == 1
    assert names.count("DeepfmOpsResourceFmUpdate") == 1
    assert "DeepfmOpsSparseUpdate" not in names and "ResourceGather" not in names


@pytest.mark.parametrize("wrap", [lambda o: o, keras.mixed_precision.LossScaleOptimizer], ids=["plain", "scaled"])
@pytest.mark.parametrize("flags", [{}, {"use_fm": False, "use_deep": False}, {"use_fm": False}], ids=str)
def test_penalty_on_the_batch_is_that_on_the_table_for_rows_in_it(flags, wrap):
    """With every row in the batch the two are equal, whatever scales the loss; absent rows are left alone."""
    indices = np.concatenate([np.arange(40), np.arange(40) // 5 * 5])[:, None].repeat(4, 1)
    inputs, labels = (indices, np.ones((80, 4), "f")), np.random.default_rng(0).integers(0, 2, (80, 1)).astype("f")
    results = []
    for scope in ("batch", "table"):
        keras.utils.set_random_seed(0)
        model = DeepFM(
            40, 4, embedding_dim=8, hidden_units=(6,), seed=1, l2_embedding=0.3, l2_linear=0.2, l2_scope=scope, **flags
        )
        layer = model.get_layer("fm" if flags.get("use_deep", True) else "first_order")
        layer.w.assign(np.random.default_rng(1).normal(size=(40, 1)))
        model.compile(wrap(keras.optimizers.SGD(0.1)), "binary_crossentropy")
        for _ in range(3):
            model.train_on_batch(inputs, labels)
        before = layer.weights[0].numpy()
        model.train_on_batch(tuple(x[:10] for x in inputs), labels[:10])  # rows 10 and up are absent
        assert (layer.weights[0].numpy()[10:] == before[10:]).all() == (scope == "batch")
        results.append([before, layer.w.numpy()[:10], layer.weights[0].numpy()[:10]])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
