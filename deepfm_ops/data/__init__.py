"""From files and tables of any size to batches. Imports neither TensorFlow nor Keras."""

from deepfm_ops.data.files import CRITEO, files

__all__ = ["CRITEO", "files"]
