"""What both kinds of models are made of."""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

TASKS = ("binary", "regression")
SCOPES = ("batch", "table")


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


def l2_regularizer(strength):
    return keras.regularizers.L2(strength) if strength else None


def weights_l2(scope, strength):
    """The arguments of a `FirstOrder` for an L2 penalty of this scope."""
    if scope not in SCOPES:
        raise ValueError(f"l2_scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    return {"l2": strength} if scope == "batch" else {"weights_regularizer": l2_regularizer(strength)}


def table_l2(scope, strength, linear_strength=0.0):
    """The arguments of an `FMInteraction`, likewise."""
    weights_l2(scope, strength)
    if scope == "batch":
        return {"l2": strength, "l2_linear": linear_strength}
    return {"embeddings_regularizer": l2_regularizer(strength), "linear_regularizer": l2_regularizer(linear_strength)}


@dataclasses.dataclass
class Plan:
    """What a model adds up, by the names of its layers, for those who compute it without Keras.

    Attributes:
        first_orders: dicts of "layer" (a `FirstOrder`, or, with "spans", an `FMInteraction`), "encoder" (number of
            the `ColumnEncoder` whose pairs it takes; None: the inputs themselves) and "spans" (of `PoolMax`, or None).
        lookups: dicts of "layer" (an `FMInteraction`, whose own first order is added if it has one), "encoder" and
            "spans".
        second_order: the number of a lookup, for its interaction, or a list of (lookup, field) that interact.
        num_encoders: how many encoders there are.

    """

    first_orders: list = dataclasses.field(default_factory=list)
    lookups: list = dataclasses.field(default_factory=list)
    second_order: list = dataclasses.field(default_factory=list)
    num_encoders: int = 0


def seed_for(seed, offset):
    """A seed per weight, so that no two weights start equal."""
    return None if seed is None else seed + offset


def mlp(x, hidden_units, activation, dropout, batch_norm, l2, seed):
    """The deep part: [B, n] to [B, 1]."""
    for i, units in enumerate(hidden_units):
        initializer = keras.initializers.GlorotNormal(seed_for(seed, 10 + i))
        x = keras.layers.Dense(
            units, kernel_initializer=initializer, kernel_regularizer=l2_regularizer(l2), name=f"hidden_{i}"
        )(x)
        if batch_norm:
            x = keras.layers.BatchNormalization(name=f"batch_norm_{i}")(x)
        x = keras.layers.Activation(activation, name=f"activation_{i}")(x)
        if dropout:
            x = keras.layers.Dropout(dropout, seed=seed_for(seed, 100 + i), name=f"dropout_{i}")(x)
    last = keras.initializers.GlorotNormal(seed_for(seed, 10 + len(hidden_units)))
    return keras.layers.Dense(1, use_bias=False, kernel_initializer=last, name="deep")(x)


class ConfiguredModel(keras.Model):
    """A functional model that is saved as the arguments it was made with."""

    def _finish(self, config, inputs, outputs, name, trainable, frozen, plan):
        super().__init__(inputs=inputs, outputs=outputs, name=name)
        self._config = config
        self._plan = plan
        self._index_inputs = [tensor.name for tensor in self.inputs if tensor.dtype == "int64"]
        self.trainable = trainable
        for layer in frozen:
            self.get_layer(layer).trainable = False

    def get_config(self):
        return {
            **self._config,
            "name": self.name,
            "trainable": self.trainable,
            "frozen": [layer.name for layer in self.layers if self.trainable and not layer.trainable],
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
        }

    def __call__(self, inputs, *args, **kwargs):
        if hasattr(self, "_index_inputs"):  # Keras calls the model while it is being made, too
            inputs = self._checked(inputs)
        return super().__call__(inputs, *args, **kwargs)

    def predict(self, x, *args, **kwargs):
        """Keras's `predict`; no samples give no scores, [0, 1], instead of an error."""
        arrays = keras.tree.flatten(x) if isinstance(x, dict | list | tuple) else []
        if arrays and all(getattr(array, "shape", None) and array.shape[0] == 0 for array in arrays):
            return np.zeros((0, 1), np.float32)
        return super().predict(x, *args, **kwargs)


class DtypePolicy:
    """The dtype policy of a saved model while its layers are made again; None: the policy in force."""

    def __init__(self, dtype):
        self.policy = None if dtype is None else keras.dtype_policies.get(dtype)

    def __enter__(self):
        self.before = keras.config.dtype_policy()
        if self.policy is not None:
            keras.config.set_dtype_policy(self.policy)

    def __exit__(self, *_):
        keras.config.set_dtype_policy(self.before)


def check_integers(name, x):
    """Raises where Keras would cast numbers to integers silently."""
    dtype = getattr(x, "dtype", None) or np.asarray(x).dtype
    if "int" not in str(getattr(dtype, "name", dtype)):
        raise TypeError(f"{name} must be int32 or int64, got {getattr(dtype, 'name', dtype)}")
