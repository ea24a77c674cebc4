"""Training steps of DeepCTR's DeepFM on tf-keras, without its penalties on whole tables."""

import os

os.environ["TF_USE_LEGACY_KERAS"] = "1"

import tensorflow as tf
import tf_keras as keras
from deepctr.feature_column import SparseFeat
from deepctr.models import DeepFM
from train import F, K


def step(side, rows, indices, labels):
    per_field = rows // F
    columns = [SparseFeat(f"f{i}", per_field, K, dtype="int64") for i in range(F)]
    model = DeepFM(columns, columns, dnn_hidden_units=(400, 400, 400), l2_reg_linear=0, l2_reg_embedding=0)
    optimizer, loss_of = keras.optimizers.Adam(1e-3), keras.losses.BinaryCrossentropy()
    batches = [{f"f{i}": tf.constant(b[:, i] % per_field) for i in range(F)} for b in indices]
    labels = [tf.constant(y) for y in labels]

    @tf.function
    def run(inputs, y):
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(inputs, training=True))
        optimizer.apply_gradients(
            zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
        )
        return loss

    return lambda n: run(batches[n], labels[n]).numpy()
