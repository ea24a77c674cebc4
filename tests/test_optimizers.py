"""Keras's optimizers are exact on our gradient, and not on that of keras.layers.Embedding."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from deepfm_ops import FMInteraction

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
