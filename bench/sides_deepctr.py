"""DeepCTR's FM layer behind a tf-keras Embedding, as its models use it."""

import os

os.environ["TF_USE_LEGACY_KERAS"] = "1"

import numpy as np
import tensorflow as tf
import tf_keras as keras
from deepctr.layers.interaction import FM


def sides(case, table, indices, values):
    if case.dtype != "float32":
        return {}
    embedding, layer = keras.layers.Embedding(case.rows, case.dim), FM()
    embedding.build(None)
    embedding.embeddings.assign(table)
    sets, x = [tf.constant(i) for i in indices], tf.constant(values)[..., tf.newaxis]

    def interaction(i):
        return layer(embedding(i) * x)

    @tf.function
    def gradient(i):
        with tf.GradientTape() as tape:
            y = tf.reduce_sum(interaction(i))
        slices = tape.gradient(y, embedding.embeddings)
        return slices.indices, slices.values

    forward = tf.function(interaction)
    return {"DeepCTR FM layer": {"forward": lambda n: forward(sets[n]), "gradient": lambda n: gradient(sets[n])}}


def result(kind, value):
    return [np.asarray(a) for a in (value if kind == "gradient" else [value])]
