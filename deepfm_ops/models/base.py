"""What both kinds of models share as Keras models."""

import keras
import numpy as np


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
