"""Scores a trained model with the kernels and NumPy alone: importing this imports neither TensorFlow nor Keras.

`deepfm_ops.export_scorer` writes the file, anywhere TensorFlow runs; `Scorer.load(path).score(...)` reads it where it
does not.
"""

from deepfm_ops.scorer.file import ScorerFileError
from deepfm_ops.scorer.ranking import Items
from deepfm_ops.scorer.scoring import ACTIVATIONS, Scorer

__all__ = ["ACTIVATIONS", "Items", "Scorer", "ScorerFileError"]
