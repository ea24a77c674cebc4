"""What both kinds of models share as Keras models."""

import keras
import numpy as np
import tensorflow as tf

from deepfm_ops import arguments


class ConfiguredModel(keras.Model):
    """A functional model that is saved as the arguments it was made with."""

    def _finish(self, config, inputs, outputs, name, trainable, frozen, plan):
        super().__init__(inputs=inputs, outputs=outputs, name=name)
        self._config = config
        layers = set(map(id, self.layers))
        self.plan = plan.used(lambda layer: id(layer) in layers)  # Keras leaves out what nothing uses
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

    # Keras asks these for arrays, or for something it can iterate over.

    def fit(self, x=None, y=None, *args, validation_data=None, **kwargs):
        if isinstance(validation_data, list | tuple):
            x_validation, y_validation, *rest = validation_data
            validation_data = (self._as_inputs(x_validation), self._targets(y_validation), *rest)
        else:
            validation_data = self._as_inputs(validation_data)
        return super().fit(self._as_inputs(x), self._targets(y), *args, validation_data=validation_data, **kwargs)

    def evaluate(self, x=None, y=None, *args, **kwargs):
        return super().evaluate(self._as_inputs(x), self._targets(y), *args, **kwargs)

    def predict(self, x, *args, **kwargs):
        """Keras's `predict`; no samples give no scores, [0, 1], instead of an error."""
        x = self._as_inputs(x)
        arrays = keras.tree.flatten(x) if isinstance(x, dict | list | tuple) else []
        if arrays and all(getattr(array, "shape", None) and array.shape[0] == 0 for array in arrays):
            return np.zeros((0, 1), np.float32)
        return super().predict(x, *args, **kwargs)

    def train_on_batch(self, x, y=None, *args, **kwargs):
        return super().train_on_batch(self._as_inputs(x), self._targets(y), *args, **kwargs)

    def test_on_batch(self, x, y=None, *args, **kwargs):
        return super().test_on_batch(self._as_inputs(x), self._targets(y), *args, **kwargs)

    def predict_on_batch(self, x):
        return super().predict_on_batch(self._as_inputs(x))

    def _targets(self, y):
        """The labels, once those that are arrays are known to be ones a loss can use."""
        if y is not None and not tf.is_tensor(y):
            check_labels(self.plan.task, y)
        return y

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Keras's loss; raises InvalidArgumentError for labels that `check_labels` refuses."""
        if tf.is_tensor(y) and y.dtype.is_floating | y.dtype.is_integer:
            y = self._checked_labels(y)
        return super().compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)

    def _checked_labels(self, y):
        flat = tf.reshape(y, [-1])
        bad = (flat < 0) | (flat > 1) if self.plan.task == "binary" else tf.zeros_like(flat, tf.bool)
        if y.dtype.is_floating:
            bad |= tf.math.is_nan(flat) | tf.math.is_inf(flat)

        def shown():
            row = tf.argmax(tf.cast(bad, tf.int32))
            return row, flat[row]

        fine = tf.logical_not(tf.reduce_any(bad))
        with tf.control_dependencies(arguments.require(fine, BAD_LABEL[self.plan.task], shown)):
            return tf.identity(y)


BAD_LABEL = {
    "binary": "labels[{}] = {} is not in [0, 1], as task 'binary' needs it: map -1 and +1 by (labels + 1) / 2, other "
    "numbers by a threshold (labels > 3), or use task 'regression'",
    "regression": "labels[{}] = {} is not finite: drop the sample, or mend it",
}


def check_labels(task, labels):
    """Raises ValueError where a label is one that makes a loss NaN or senseless; TypeError where it is no number."""
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iufb":
        try:
            labels = labels.astype(np.float64)
        except (TypeError, ValueError):
            raise TypeError(f"labels must be numbers, got dtype {labels.dtype}") from None
    flat = labels.reshape(-1)
    good = (flat >= 0) & (flat <= 1) if task == "binary" else np.isfinite(flat)
    if not good.all():
        first = int(np.argmin(good))
        raise ValueError(BAD_LABEL[task].format(first, flat[first]))


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
