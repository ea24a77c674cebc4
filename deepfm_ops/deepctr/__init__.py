"""DeepCTR's names and modules: a DeepCTR script for DeepFM runs with `deepfm_ops.deepctr` in place of `deepctr`."""

from deepfm_ops.deepctr.feature_column import (
    DEFAULT_GROUP_NAME,
    DenseFeat,
    SparseFeat,
    VarLenSparseFeat,
    build_input_features,
    get_feature_names,
)
from deepfm_ops.deepctr.layers import custom_objects
from deepfm_ops.deepctr.models import DeepFM

__all__ = [
    "DEFAULT_GROUP_NAME",
    "DeepFM",
    "DenseFeat",
    "SparseFeat",
    "VarLenSparseFeat",
    "build_input_features",
    "custom_objects",
    "get_feature_names",
]
