"""Fused, sparse factorization-machine ops and DeepFM for TensorFlow and Keras 3.

Names are loaded when first used: importing the package does not import TensorFlow.
"""

import importlib

from deepfm_ops import saving
from deepfm_ops._version import __version__

_HOME = {
    "fm_interaction": "ops",
    "FMInteraction": "layers",
    "DeepFM": "models",
    "SparseFeat": "features",
    "DenseFeat": "features",
    "VarLenSparseFeat": "features",
    "get_feature_names": "features",
    "FeatureDictionary": "features",
    "native_info": "_library",
    "Checkpoint": "checkpoints",
    "export": "saved_model",
    "export_scorer": "scorer.export",
    "explain": "explanations",
}
_MODULES = (
    "checkpoints",
    "cluster",
    "data",
    "datasets",
    "deepctr",
    "explanations",
    "features",
    "kernels",
    "layers",
    "models",
    "ops",
    "optimizers",
    "reference",
    "scorer",
)

__all__ = ["__version__", *_HOME, *_MODULES]

saving.when_keras_comes()


def __getattr__(name):
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
