"""DeepCTR's `feature_column`."""

from deepfm_ops.features import (
    DEFAULT_GROUP_NAME,
    DenseFeat,
    SparseFeat,
    VarLenSparseFeat,
    get_feature_names,
    input_specs,
)

__all__ = [
    "DEFAULT_GROUP_NAME",
    "DenseFeat",
    "SparseFeat",
    "VarLenSparseFeat",
    "build_input_features",
    "get_feature_names",
]


def build_input_features(feature_columns, prefix=""):
    """{name: keras.Input} of the columns' inputs, in their order."""
    import keras

    specs = input_specs(feature_columns)
    return {name: keras.Input(shape, dtype=dtype, name=prefix + name) for name, (shape, dtype) in specs.items()}
