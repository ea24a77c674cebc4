"""How often each feature occurs in the training rows. Imports neither TensorFlow nor Keras."""

import base64
import zlib

import numpy as np

MOST = np.iinfo(np.int32).max


def occurrences(indices, values, num_features):
    """How many pairs with a value other than zero each feature has, int64 [num_features]."""
    return np.bincount(indices[values != 0], minlength=num_features)


def checked(counts, num_features):
    """Counts as int32 [num_features]; those beyond int32 are its largest number. From numbers, or from `packed`'s text.

    Raises:
        TypeError: counts that are no whole numbers.
        ValueError: another length, or a negative one.

    """
    counts = unpacked(counts, num_features) if isinstance(counts, str) else np.asarray(counts)
    is_whole = counts.dtype.kind in "iu" or (counts.dtype.kind == "f" and np.array_equal(counts, np.round(counts)))
    if not is_whole or not np.isfinite(counts).all():
        raise TypeError(f"feature_counts must be whole numbers, got dtype {counts.dtype}")
    if counts.shape != (num_features,):
        raise ValueError(f"feature_counts must have shape ({num_features},), one per feature, got {counts.shape}")
    if counts.size and counts.min() < 0:
        first = int(np.argmax(counts < 0))
        raise ValueError(f"feature_counts[{first}] = {counts[first]} is negative")
    return np.minimum(counts, MOST).astype(np.int32)


def packed(counts):
    """Counts as text for a saved model's configuration."""
    return base64.b64encode(zlib.compress(np.ascontiguousarray(counts, "<i4").tobytes())).decode()


def unpacked(text, num_features):
    """`packed` back, in memory for so many counts."""
    unpacker = zlib.decompressobj()
    try:
        content = unpacker.decompress(base64.b64decode(text, validate=True), 4 * num_features + 1)
        if not unpacker.eof:
            raise ValueError(f"they are cut off, or more than {num_features}")
        return np.frombuffer(content, "<i4")
    except (ValueError, zlib.error) as error:  # binascii's error is a ValueError
        raise ValueError(f"feature_counts are text that is none of a saved model's: {error}") from error
