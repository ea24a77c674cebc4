"""Tables that change between the forward and its gradient: persistent tapes, two optimizers in turn."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from testing import REFERENCE_MODE

import deepfm_ops
from deepfm_ops import DeepFM, FMInteraction, optimizers

INDICES = np.array([[0, 1, 2, 1], [3, 3, 4, 0]])
needs_op = pytest.mark.skipif(REFERENCE_MODE, reason="what the op does not keep")


def dense(gradients):
    return [tf.convert_to_tensor(gradient).numpy() for gradient in gradients]


@pytest.mark.parametrize(
    "options", [{}, {"output": "vector"}, {"field_sizes": [1, 2, 1]}, {"use_linear": True}], ids=str
)
@pytest.mark.parametrize("form", ["dense", "ragged"])
def test_where_embeddings_are_kept_the_gradient_is_that_of_the_forward(form, options, rng):
    if form == "ragged" and "field_sizes" in options:
        return
    table, values = rng.normal(size=(6, 3)), tf.constant(rng.normal(size=INDICES.shape))
    results = []
    for backend in ("auto", "reference"):
        layer = FMInteraction(6, 3, return_embeddings=True, backend=backend, dtype="float64", **options)
        layer.build()
        layer.embeddings.assign(table)
        with tf.GradientTape(persistent=True) as tape:
            inputs = INDICES, values
            if form == "ragged":
                inputs = [tf.RaggedTensor.from_row_lengths(tf.reshape(part, [-1]), [5, 3]) for part in inputs]
            embeddings, y = layer(inputs)
            e = embeddings.flat_values if form == "ragged" else embeddings
            loss = tf.reduce_sum(tf.sin(y)) + tf.reduce_sum(tf.cos(e))
        for _ in range(3):
            gradients = tape.gradient(loss, layer.trainable_weights)
            results.append(dense(gradients))
            optimizers.SGD(1.0).apply(gradients, layer.trainable_weights)
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_two_optimizers_in_turn_on_one_tape(rng):
    keras.utils.set_random_seed(1)
    model = DeepFM(6, 4, 3, (5,))
    tables = [w for w in model.trainable_weights if hasattr(w, "row_counts")]
    parts = [tables, [w for w in model.trainable_weights if not hasattr(w, "row_counts")]]
    for weight in model.trainable_weights:
        weight.assign(rng.normal(size=weight.shape))
    with tf.GradientTape(persistent=True) as tape:
        loss = tf.reduce_sum(model((INDICES, tf.ones(INDICES.shape))))
    want = [dense(tape.gradient(loss, part)) for part in parts]
    for number in (0, 1, 0):
        gradients = tape.gradient(loss, parts[number])
        for a, b in zip(dense(gradients), want[number], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
        optimizers.LazyAdam(1.0).apply(gradients, parts[number])


@needs_op
def test_where_nothing_is_kept_the_rows_are_read_when_the_gradient_is_taken(rng):
    """Beside the sums of the forward."""
    before, after = rng.normal(size=(6, 3)), rng.normal(size=(6, 3))
    x = rng.normal(size=INDICES.shape)
    table, values = tf.Variable(before), tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(values)
        y = deepfm_ops.fm_interaction(table, INDICES, values)
    table.assign(after)
    d_table, d_values = dense(tape.gradient(y, [table, values]))
    sums = np.sum(x[..., None] * before[INDICES], axis=1, keepdims=True)
    de = sums - x[..., None] * after[INDICES]
    want = np.zeros_like(before)
    np.add.at(want, INDICES, x[..., None] * de)
    np.testing.assert_allclose(d_table, want, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(d_values, np.sum(de * after[INDICES], axis=-1), rtol=1e-12, atol=1e-12)


@needs_op
def test_values_and_penalties_read_the_rows_when_the_gradient_is_taken(rng):
    before, after = rng.normal(size=(6, 3)), rng.normal(size=(6, 3))
    x = rng.normal(size=INDICES.shape)
    layer = FMInteraction(6, 3, return_embeddings=True, l2=0.5, dtype="float64")
    layer.build()
    layer.embeddings.assign(before)
    values = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(values)
        _, y = layer((INDICES, values))
        loss = tf.reduce_sum(y) + sum(layer.losses)
    layer.embeddings.assign(after)
    d_table, d_values = dense(tape.gradient(loss, [layer.embeddings.value, values]))
    e = x[..., None] * before[INDICES]
    de = np.sum(e, axis=1, keepdims=True) - e
    want = np.zeros_like(before)
    np.add.at(want, INDICES, x[..., None] * de)
    used = np.unique(INDICES)
    want[used] += 2 * 0.5 * after[used]
    np.testing.assert_allclose(d_table, want, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(d_values, np.sum(de * after[INDICES], axis=-1), rtol=1e-12, atol=1e-12)
