"""What both kinds of models are made of, after the lookups: the deep part and the head."""

import keras
import tensorflow as tf

from deepfm_ops.models.penalties import l2_regularizer

TASKS = ("binary", "regression")


@keras.saving.register_keras_serializable("deepfm_ops")
class Head(keras.layers.Layer):
    """Adds the parts of a model to a bias and, for "binary", applies the sigmoid, in float32.

    Args:
        task: "binary" or "regression".

    Call arguments:
        inputs: list of [B, 1].

    Returns:
        [B, 1] float32: a probability, or the plain sum.

    """

    def __init__(self, task="binary", **kwargs):
        super().__init__(autocast=False, **kwargs)
        if task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
        self.task = task

    def build(self, input_shape=None):
        self.bias = self.add_weight(name="bias", shape=(1,), initializer="zeros", autocast=False)

    def call(self, inputs):
        logits = tf.add_n([tf.cast(x, tf.float32) for x in inputs]) + tf.cast(self.bias, tf.float32)
        # Keras's cross-entropy takes the logits back from this sigmoid, so nothing may follow it.
        return keras.activations.sigmoid(logits) if self.task == "binary" else logits

    def compute_output_spec(self, inputs):
        return keras.KerasTensor((inputs[0].shape[0], 1), "float32")

    def get_config(self):
        return {**super().get_config(), "task": self.task}


@keras.saving.register_keras_serializable("deepfm_ops")
class BiInteraction(keras.layers.Layer):
    """The second-order term of embeddings that are there already.

    Call arguments:
        embeddings: [B, F, K].

    Returns:
        [B, 1], the sum over pairs of fields of their inner products.

    """

    def build(self, input_shape=None):
        pass

    def call(self, embeddings):
        pairs = tf.square(tf.reduce_sum(embeddings, axis=1)) - tf.reduce_sum(tf.square(embeddings), axis=1)
        return 0.5 * tf.reduce_sum(pairs, axis=1, keepdims=True)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], 1)


@keras.saving.register_keras_serializable("deepfm_ops")
class Fields(keras.layers.Layer):
    """Some of the fields of a tensor [B, F, ...], by position: [B, len(positions), ...].

    A layer, as Keras cannot load its own operations from an .h5 file.
    """

    def __init__(self, positions, **kwargs):
        super().__init__(**kwargs)
        self.positions = [int(position) for position in positions]

    def build(self, input_shape=None):
        pass

    def call(self, x):
        return tf.gather(x, self.positions, axis=1)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], len(self.positions), *input_shape[2:])

    def get_config(self):
        return {**super().get_config(), "positions": self.positions}


@keras.saving.register_keras_serializable("deepfm_ops")
class Sum(keras.layers.Layer):
    """The sum over the fields of a tensor: [B, F, K] to [B, K]."""

    def build(self, input_shape=None):
        pass

    def call(self, x):
        return tf.reduce_sum(x, axis=1)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], *input_shape[2:])


def seed_for(seed, offset):
    """A seed per weight, so that no two weights start equal."""
    return None if seed is None else seed + offset


def with_changes(layer, changes):
    """The layer with what Keras's `quantize` and `enable_lora` had changed in one of its name."""
    if layer.name not in changes:
        return layer
    return type(layer).from_config({**layer.get_config(), **changes[layer.name]})


def mlp(x, plan, hidden_units, activation, dropout, batch_norm, l2, seed, changes):
    """The deep part: [B, n] to [B, 1]; it is entered in the plan."""
    plan.activation = activation if isinstance(activation, str) else keras.activations.serialize(activation)
    # Of a batch that replicas share, over all of it: a replica by itself would have statistics of its own, and of no
    # samples none.
    shared = {"synchronized": True} if tf.distribute.get_strategy().num_replicas_in_sync > 1 else {}
    for i, units in enumerate(hidden_units):
        initializer = keras.initializers.GlorotNormal(seed_for(seed, 10 + i))
        dense = keras.layers.Dense(
            units, kernel_initializer=initializer, kernel_regularizer=l2_regularizer(l2), name=f"hidden_{i}"
        )
        dense = with_changes(dense, changes)
        norm = keras.layers.BatchNormalization(name=f"batch_norm_{i}", **shared) if batch_norm else None
        plan.hidden.append((dense, norm))
        x = dense(x) if norm is None else norm(dense(x))
        x = keras.layers.Activation(activation, name=f"activation_{i}")(x)
        if dropout:
            x = keras.layers.Dropout(dropout, seed=seed_for(seed, 100 + i), name=f"dropout_{i}")(x)
    last = keras.initializers.GlorotNormal(seed_for(seed, 10 + len(hidden_units)))
    plan.deep = with_changes(keras.layers.Dense(1, use_bias=False, kernel_initializer=last, name="deep"), changes)
    return plan.deep(x)
