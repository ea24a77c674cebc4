"""What a model, or a scorer, adds up for a sample, term by term, and over a data set. Imports no TensorFlow itself."""

from deepfm_ops.explanations.explaining import explain
from deepfm_ops.explanations.results import Explanation, FeaturePair, Summary

__all__ = ["Explanation", "FeaturePair", "Summary", "explain"]
