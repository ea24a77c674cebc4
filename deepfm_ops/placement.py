"""Where variables lie: in this process, or on another machine of a cluster."""

import contextlib

import keras
import tensorflow as tf


def beside(variable):
    """Inside, ops run on the parameter server that a variable lies on, if it does."""
    device = (variable.value if isinstance(variable, keras.Variable) else variable).device or ""
    return tf.device(device) if "/job:ps/" in device else contextlib.nullcontext()
