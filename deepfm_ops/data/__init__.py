"""From files and tables of any size to batches. Imports neither TensorFlow nor Keras."""

from deepfm_ops.data.files import CRITEO, files
from deepfm_ops.data.libsvm import Samples, iter_libffm, iter_libsvm, read_libffm, read_libsvm
from deepfm_ops.data.pairs import PairFeatures

__all__ = ["CRITEO", "PairFeatures", "Samples", "files", "iter_libffm", "iter_libsvm", "read_libffm", "read_libsvm"]
