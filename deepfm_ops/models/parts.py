"""What both kinds of models are made of, after the lookups: the deep part and the head."""

import keras
import tensorflow as tf

from deepfm_ops import heads, reference
from deepfm_ops.layers import add_field_weights, check_interaction
from deepfm_ops.models.penalties import l2_regularizer


@keras.saving.register_keras_serializable("deepfm_ops")
class Head(keras.layers.Layer):
    """Adds the parts of a model to a bias and makes each head's output of its numbers, in float32.

    Args:
        task: see `heads`; H numbers a sample in all.

    Call arguments:
        inputs: list of [B, H].

    Returns:
        [B, 1] float32, a probability ("binary") or the plain sum ("regression"), or [B, C], those of the classes; of a
        dict of tasks {name: one of these}.

    """

    def __init__(self, task="binary", **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.task = heads.plain(task)

    def build(self, input_shape=None):
        self.bias = self.add_weight(name="bias", shape=(heads.width(self.task),), initializer="zeros", autocast=False)

    def call(self, inputs):
        logits = tf.add_n([tf.cast(x, tf.float32) for x in inputs]) + tf.cast(self.bias, tf.float32)
        # Keras's cross-entropies take the logits back from what makes probabilities, so nothing may follow it.
        return heads.joined(self.task, [OUTPUT[head.kind](x) for head, x in heads.split(self.task, logits)])

    def compute_output_spec(self, inputs):
        batch = inputs[0].shape[0]
        specs = [keras.KerasTensor((batch, head.width), "float32") for head in heads.of(self.task)]
        return heads.joined(self.task, specs)

    def get_config(self):
        return {**super().get_config(), "task": self.task}


OUTPUT = {
    "binary": keras.activations.sigmoid,
    "regression": keras.activations.linear,
    "multiclass": keras.activations.softmax,
}


@keras.saving.register_keras_serializable("deepfm_ops")
class Projection(keras.layers.Layer):
    """The second order of each of several heads: their sums of a bi-interaction's elements, each with weights.

    Ones at first for a head of one number, which so starts as a plain factorization machine. Classes start with normal
    weights of deviation 1: with ones they would all have the same number, which a softmax does not see.

    Args:
        task: see `heads`; H numbers a sample in all.
        seed: int for repeatable weights, or None.

    Call arguments:
        vector: [B, K].

    Returns:
        [B, H].

    """

    def __init__(self, task, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.task, self.seed = heads.plain(task), seed

    def build(self, input_shape):
        def initial(shape, dtype):
            normal = keras.initializers.RandomNormal(stddev=1.0, seed=self.seed)(shape, dtype)
            is_class = [head.kind == "multiclass" for head in heads.of(self.task) for _ in range(head.width)]
            return tf.where(is_class, normal, tf.ones(shape, dtype))

        self.kernel = self.add_weight(
            name="kernel", shape=(input_shape[-1], heads.width(self.task)), initializer=initial
        )

    def call(self, vector):
        return tf.matmul(vector, self.kernel)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], heads.width(self.task))

    def get_config(self):
        return {**super().get_config(), "task": self.task, "seed": self.seed}


@keras.saving.register_keras_serializable("deepfm_ops")
class BiInteraction(keras.layers.Layer):
    """The interaction of embeddings that are there already; see `FMInteraction`.

    Args:
        output: "scalar" or "vector".
        order: 2, or 3 for triples of fields too.
        field_weights: whether every pair of fields has a trained weight.

    Call arguments:
        embeddings: [B, F, K].

    Returns:
        [B, 1], the sum over pairs of fields of their inner products; or [B, K], those of their elementwise products.

    """

    def __init__(self, output="scalar", order=2, field_weights=False, **kwargs):
        super().__init__(**kwargs)
        check_interaction(order, field_weights)
        self.output_kind, self.order, self.has_field_weights, self.field_weights = output, order, field_weights, None

    def build(self, input_shape):
        if self.has_field_weights:
            self.field_weights = add_field_weights(self, input_shape[1])

    def call(self, embeddings):
        weights = None if self.field_weights is None else tf.cast(self.field_weights.value, embeddings.dtype)
        return reference.interact(embeddings, self.output_kind, self.order, weights)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], 1 if self.output_kind == "scalar" else input_shape[2])

    def get_config(self):
        return {
            **super().get_config(),
            "output": self.output_kind,
            "order": self.order,
            "field_weights": self.has_field_weights,
        }


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


def second_order(x, plan, seed):
    """The second order of the heads, [B, H], of an interaction that is a scalar for one number and else a vector."""
    if plan.width == 1:
        return x
    layer = Projection(plan.task, seed_for(seed, 4), name=f"second_order_{len(plan.projections)}")
    plan.projections.append(layer)
    return layer(x)


def mlp(x, plan, hidden_units, activation, dropout, batch_norm, l2, seed, changes):
    """The deep part: [B, n] to [B, H]; it is entered in the plan."""
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
    plan.deep = keras.layers.Dense(plan.width, use_bias=False, kernel_initializer=last, name="deep")
    plan.deep = with_changes(plan.deep, changes)
    return plan.deep(x)
