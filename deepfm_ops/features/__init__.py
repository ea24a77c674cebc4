"""Raw data to features: DeepCTR-style columns, and the feature dictionary. Imports neither TensorFlow nor Keras."""

from deepfm_ops.features.columns import (
    DEFAULT_GROUP_NAME,
    DenseFeat,
    SparseFeat,
    VarLenSparseFeat,
    get_feature_names,
    input_specs,
)
from deepfm_ops.features.dictionary import FeatureDictionary
from deepfm_ops.features.vocabulary import DictionaryFileError

__all__ = [
    "DEFAULT_GROUP_NAME",
    "DenseFeat",
    "DictionaryFileError",
    "FeatureDictionary",
    "SparseFeat",
    "VarLenSparseFeat",
    "get_feature_names",
    "input_specs",
]
