"""DeepCTR's `layers`: what `keras.models.load_model` is given there; here it needs nothing to be given."""

import importlib

from deepfm_ops.saving import HOME

__all__ = ["custom_objects"]

custom_objects = {
    name: getattr(importlib.import_module(f"deepfm_ops.{module}"), name)
    for name, module in HOME.items()
    if module != "optimizers"  # they share Keras's names
}
