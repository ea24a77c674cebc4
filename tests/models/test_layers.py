"""FMInteraction and FirstOrder as Keras layers."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from testing import REFERENCE_MODE, dense_samples, oracle

from deepfm_ops import FMInteraction
from deepfm_ops.layers import FirstOrder


@pytest.fixture
def pairs(rng):
    return rng.integers(0, 50, (6, 4)), rng.normal(size=(6, 4)).astype("f")


def weighted(layer, rng):
    layer.build()
    for weight in layer.weights:
        weight.assign(rng.normal(size=weight.shape))
    return layer


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_outputs(backend, pairs, rng):
    indices, values = pairs
    layer = weighted(FMInteraction(50, 3, use_linear=True, return_embeddings=True, backend=backend), rng)
    embeddings, y = layer((indices, values))
    table, w = layer.embeddings.numpy(), layer.w.numpy()
    np.testing.assert_allclose(embeddings, table[indices] * values[..., None], rtol=1e-6)
    first = (w[indices, 0] * values).sum(1, keepdims=True)
    np.testing.assert_allclose(y, oracle(table, dense_samples(indices, values)) + first, rtol=1e-4, atol=1e-5)
    vector = weighted(FMInteraction(50, 3, output="vector", backend=backend), rng)
    expected = oracle(vector.embeddings.numpy(), dense_samples(indices), "vector")
    np.testing.assert_allclose(vector(indices), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(vector([indices, np.ones(indices.shape)]), expected, rtol=1e-4, atol=1e-5)


def test_symbolic_shapes_are_the_real_ones(pairs):
    inputs = (keras.Input((4,), dtype="int64"), keras.Input((4,)))
    for arguments in ({}, {"output": "vector"}, {"return_embeddings": True}, {"field_sizes": [1, 3]}):
        layer = FMInteraction(50, 3, **arguments)
        symbolic, real = layer(inputs), layer(pairs)
        for a, b in zip(keras.tree.flatten(symbolic), keras.tree.flatten(real), strict=True):
            assert a.shape[1:] == tuple(b.shape[1:]) and a.dtype == b.dtype.name
    assert FMInteraction(50, 3).compute_output_shape(((None, 4), (None, 4))) == (None, 1)
    assert FirstOrder(50).compute_output_shape((7, 4)) == (7, 1)


def test_field_sizes_sum_columns(pairs, rng):
    indices, values = pairs
    layer = weighted(FMInteraction(50, 3, field_sizes=[1, 2, 1], return_embeddings=True), rng)
    embeddings, y = layer((indices, values))
    table = layer.embeddings.numpy()
    samples = [
        [[(i[0], x[0])], [(i[1], x[1]), (i[2], x[2])], [(i[3], x[3])]] for i, x in zip(indices, values, strict=True)
    ]
    np.testing.assert_allclose(y, oracle(table, samples), rtol=1e-4, atol=1e-5)
    assert embeddings.shape == (6, 3, 3)
    with pytest.raises(ValueError, match="indices must have 4 columns, got shape"):
        layer(indices[:, :3])
    with pytest.raises(ValueError, match="field_sizes need dense indices"):
        layer(tf.ragged.constant([[1, 2]], dtype=tf.int64))


def test_ragged_and_sparse(rng):
    ragged = tf.ragged.constant([[1, 2], [], [3, 4, 5]], dtype=tf.int64)
    layer = weighted(FMInteraction(50, 3, return_embeddings=True, use_linear=True), rng)
    e1, y1 = layer(ragged)
    e2, y2 = layer((ragged.to_sparse(), ragged.with_flat_values(np.ones(5, "f")).to_sparse()))
    np.testing.assert_array_equal(y1, y2)
    np.testing.assert_array_equal(e1.flat_values, e2.flat_values)
    np.testing.assert_array_equal(e1.row_splits, [0, 2, 2, 5])


@pytest.mark.parametrize("policy", ["float32", "float64", "bfloat16", "float16", "mixed_float16", "mixed_bfloat16"])
def test_dtype_policies(policy, pairs, rng):
    layer = weighted(FMInteraction(50, 8, use_linear=True, return_embeddings=True, dtype=policy), rng)
    with tf.GradientTape() as tape:
        embeddings, y = layer(pairs)
        loss = tf.reduce_sum(tf.cast(y, tf.float32))
    assert embeddings.dtype == y.dtype == layer.compute_dtype
    gradient = tape.gradient(loss, layer.embeddings.value)
    assert isinstance(gradient, tf.IndexedSlices) and gradient.dtype == layer.variable_dtype
    table, w = (tf.cast(v, tf.float64).numpy() for v in (layer.embeddings, layer.w))
    indices, values = pairs
    expected = oracle(table, dense_samples(indices, values)) + (w[indices, 0] * values).sum(1, keepdims=True)
    rtol = {"float64": 1e-6, "float32": 1e-4}.get(policy, 2e-2)
    np.testing.assert_allclose(tf.cast(y, tf.float64), expected, rtol=rtol, atol=rtol * 10)


def test_config_round_trip():
    layer = FMInteraction(
        50,
        3,
        use_linear=True,
        return_embeddings=True,
        embeddings_initializer="zeros",
        embeddings_regularizer="l2",
        linear_regularizer="l1",
        field_sizes=[1, 2],
        backend="reference",
        name="fm",
    )
    config = layer.get_config()
    again = FMInteraction.from_config(config)
    assert again.get_config() == config
    again.build()
    assert [w.path for w in again.weights] == ["fm/embeddings", "fm/w"]
    assert not again.embeddings.numpy().any()
    assert len(again.losses) == 2


def test_in_a_keras_model(pairs, tmp_path):
    """Compiled as Keras does by default: trains, saves, loads."""
    inputs = [keras.Input((4,), dtype="int64"), keras.Input((4,))]
    embeddings, y = FMInteraction(50, 3, use_linear=True, return_embeddings=True)(inputs)
    outputs = keras.layers.Add()([y, keras.layers.Dense(1)(keras.layers.Flatten()(embeddings))])
    model = keras.Model(inputs, outputs)
    model.compile("adam", "mse")
    assert model.jit_compile is False  # Keras's "auto" sees supports_jit
    history = model.fit(list(pairs), np.ones(6), epochs=30, verbose=0).history["loss"]
    assert history[-1] < history[0]
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again.predict(list(pairs), verbose=0), model.predict(list(pairs), verbose=0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_features": 0}, "num_features must be an integer of at least 1, got 0"),
        ({"embedding_dim": 0}, "embedding_dim must be an integer of at least 1"),
        ({"output": "sum"}, "output must be one of scalar, vector, got 'sum'"),
        ({"output": "vector", "use_linear": True}, "use_linear adds the first order to the scalar"),
        ({"field_sizes": [3, -1, 1]}, "a field size must be an integer of at least 1, got -1"),
        ({"backend": "cuda"}, "backend must be one of auto, native, reference, got 'cuda'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FMInteraction(**{"num_features": 5, "embedding_dim": 2, **arguments})


def test_bad_inputs():
    layer = FMInteraction(5, 2)
    with pytest.raises(TypeError, match="indices must be int32 or int64, got float32"):
        layer(np.ones((2, 2), "f"))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"indices\[1,0\] = 5 is not in \[0, 5\)"):
        layer(np.array([[0, 1], [5, 2]]))


def test_backend_native_says_why_it_cannot():
    if not REFERENCE_MODE:
        assert FMInteraction(5, 2, backend="native")(np.array([[0, 1]])).shape == (1, 1)
