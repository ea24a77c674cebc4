"""DeepCTR's `models`: DeepFM over feature columns."""

from deepfm_ops.models import ColumnDeepFM as DeepFM

__all__ = ["DeepFM"]
