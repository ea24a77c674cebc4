"""DeepFM as a Keras model, over index and value matrices or over feature columns."""

from deepfm_ops.models.columns import ColumnDeepFM
from deepfm_ops.models.matrix import DeepFM

__all__ = ["ColumnDeepFM", "DeepFM"]
