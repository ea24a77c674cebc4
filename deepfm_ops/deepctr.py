"""DeepCTR's names: a DeepCTR script for DeepFM runs after its import lines are changed to this module."""

from deepfm_ops.features import (
    DEFAULT_GROUP_NAME,
    DenseFeat,
    SparseFeat,
    VarLenSparseFeat,
    get_feature_names,
    input_specs,
)
from deepfm_ops.models import DeepFM as _DeepFM

__all__ = [
    "DEFAULT_GROUP_NAME",
    "DeepFM",
    "DenseFeat",
    "SparseFeat",
    "VarLenSparseFeat",
    "build_input_features",
    "get_feature_names",
]


def DeepFM(linear_feature_columns, dnn_feature_columns, *args, **kwargs):  # noqa: N802
    """`deepfm_ops.DeepFM.from_columns`, under DeepCTR's name."""
    return _DeepFM.from_columns(linear_feature_columns, dnn_feature_columns, *args, **kwargs)


def build_input_features(feature_columns, prefix=""):
    """{name: keras.Input} of the columns' inputs, in their order."""
    import keras

    specs = input_specs(feature_columns)
    return {name: keras.Input(shape, dtype=dtype, name=prefix + name) for name, (shape, dtype) in specs.items()}
