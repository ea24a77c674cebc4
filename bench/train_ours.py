"""Training steps of deepfm_ops, of Keras 3 alone, and of the MLP without any table."""

import keras
import tensorflow as tf
from train import B, F, K

from deepfm_ops import DeepFM, FMInteraction, optimizers


def mlp(x):
    for units in (400, 400, 400):
        x = keras.layers.Dense(units, activation="relu")(x)
    return keras.layers.Dense(1)(x)


class SecondOrder(keras.layers.Layer):
    """The plain formula."""

    def call(self, e):
        s = keras.ops.sum(e, axis=1)
        return 0.5 * keras.ops.sum(s * s - keras.ops.sum(e * e, axis=1), axis=1, keepdims=True)


def keras_deepfm(rows):
    indices = keras.Input((F,), dtype="int64")
    e = keras.layers.Embedding(rows, K, embeddings_initializer=keras.initializers.RandomNormal(stddev=0.01))(indices)
    w = keras.layers.Embedding(rows, 1, embeddings_initializer="zeros")(indices)
    first = keras.ops.sum(w, axis=1)
    logits = keras.layers.Add()([first, SecondOrder()(e), mlp(keras.layers.Flatten()(e))])
    return keras.Model(indices, keras.layers.Activation("sigmoid")(logits))


def make(model, optimizer, jit=False, input_gradient=False):
    """(inputs, labels) to the loss, one step taken."""
    loss_of = keras.losses.BinaryCrossentropy()
    optimizer.build(model.trainable_variables)

    @tf.function(jit_compile=jit)
    def step(inputs, labels):
        variables = [v.value for v in model.trainable_variables]
        with tf.GradientTape() as tape:
            if input_gradient:
                tape.watch(inputs)
            loss = loss_of(labels, model(inputs, training=True))
        gradients = tape.gradient(loss, [*variables, *([inputs] if input_gradient else [])])
        optimizer.apply(gradients[: len(variables)], model.trainable_variables)
        return loss, gradients[len(variables) :]

    return lambda inputs, labels: step(inputs, labels)[0].numpy()


def fm(rows):
    inputs = keras.Input((F,), dtype="int64")
    layer = FMInteraction(rows, K)
    return keras.Model(inputs, keras.layers.Activation("sigmoid")(layer(inputs)))


def step(side, rows, indices, labels):
    keras.utils.set_random_seed(1)
    indices, labels = [tf.constant(i) for i in indices], [tf.constant(y) for y in labels]
    if side.startswith("MLP"):
        inputs = keras.Input((F * K,))
        model = keras.Model(inputs, keras.layers.Activation("sigmoid")(mlp(inputs)))
        x = tf.random.normal((B, F * K))
        run = make(model, keras.optimizers.Adam(1e-3), input_gradient="gradient" in side)
        return lambda n: run(x, labels[0])
    if "Keras 3" in side:
        run = make(keras_deepfm(rows), keras.optimizers.Adam(1e-3), jit="XLA" in side)
        return lambda n: run(indices[n], labels[n])
    if side == "FM, deepfm_ops RowWiseAdagrad":
        run = make(fm(rows), optimizers.RowWiseAdagrad(0.02))
        return lambda n: run(indices[n], labels[n])
    ones = tf.ones((B, F))
    if side == "DeepFM, deepfm_ops LazyAdam":
        run = make(DeepFM(rows, F, K, seed=1), optimizers.LazyAdam(1e-3))
    else:
        run = make(DeepFM(rows, F, K, use_deep=False, seed=1), optimizers.Adagrad(0.1))
    return lambda n: run((indices[n], ones), labels[n])
