"""deepfm_ops: the op, the kernels on NumPy arrays; plain TensorFlow in its several forms; the touch floor."""

import ml_dtypes
import numpy as np
import tensorflow as tf
from common import aligned

import deepfm_ops
from deepfm_ops import kernels, reference


def formula(table, indices, values):
    """The plain TensorFlow formula: gather, square of the sum, sum of the squares."""
    e = tf.cast(tf.gather(table, indices), tf.float32) * values[..., tf.newaxis]
    s = tf.reduce_sum(e, axis=1)
    return 0.5 * tf.reduce_sum(s * s - tf.reduce_sum(e * e, axis=1), axis=1, keepdims=True)


def sides(case, table, indices, values):
    dtype = {"float32": tf.float32, "bfloat16": tf.bfloat16}[case.dtype]
    array = aligned(table if case.dtype == "float32" else table.astype(ml_dtypes.bfloat16))
    variable = tf.Variable(tf.cast(table, dtype))
    # As in training: after a sparse update, reading the variable's value would copy it.
    variable.scatter_sub(tf.IndexedSlices(tf.zeros((1, case.dim), dtype), [0]))
    sets, x = [tf.constant(i) for i in indices], tf.constant(values)

    def make(function, unique=False, **options):
        def gradient(i):
            with tf.GradientTape() as tape:
                y = tf.reduce_sum(function(variable, i, x))
            slices = tape.gradient(y, variable)
            if not unique:
                return slices.indices, slices.values
            rows, position = tf.unique(slices.indices)
            return rows, tf.math.unsorted_segment_sum(slices.values, position, tf.size(rows))

        forward = tf.function(lambda i: function(variable, i, x), **options)
        gradient = tf.function(gradient, **options)
        return {"forward": lambda n: forward(sets[n]), "gradient": lambda n: gradient(sets[n])}

    ones = np.ones((case.batch, 1), np.float32)

    def kernels_forward(n):
        return kernels.fm_forward(array, indices[n], values)[0]

    def kernels_gradient(n):
        y, sums, _, _ = kernels.fm_forward(array, indices[n], values)
        return kernels.fm_gradient(array, indices[n], values, sums, ones)[:2]

    unique = make(formula, unique=True)
    return {
        "deepfm_ops op": make(deepfm_ops.fm_interaction),
        "deepfm_ops kernels on NumPy": {"forward": kernels_forward, "gradient": kernels_gradient},
        "deepfm_ops fallback": make(reference.fm_interaction),
        "TensorFlow formula": make(formula),
        "TensorFlow formula, XLA": {"forward": make(formula, jit_compile=True)["forward"]},
        "TensorFlow formula, tf.unique": {"gradient": unique["gradient"]},
        "touch floor": {"forward": lambda n: kernels.read_rows(array, indices[n], distance=64)},
        "empty tf.function": {"forward": make(lambda variable, i, x: x[:1])["forward"]},
    }


def result(kind, value):
    if kind == "forward":
        return [np.asarray(value)]
    return [np.asarray(value[0]), np.asarray(value[1]).astype(np.float32)]
