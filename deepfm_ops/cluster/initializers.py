"""Initial values of a table's rows that do not depend on how the table is split."""

import keras
import numpy as np
import tensorflow as tf

_GAMMA, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORDS = 3  # of 64 bits, four uniform numbers each


@keras.saving.register_keras_serializable("deepfm_ops")
class RowNormal(keras.initializers.Initializer):
    """Numbers that follow from the row, the column and the seed alone, so that a table may be made in parts.

    They are nearly normal: the sum of twelve uniform numbers, which has a deviation of 1 and ends at 6 of them. All of
    it is integer arithmetic, so that every machine gets the same bits.

    Args:
        stddev: their deviation.
        seed: int; None: one at random.

    Call arguments:
        shape: of the whole table, [V, ...].
        dtype: a float type.

    References:
        The hash is the finalizer of Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA
        2014 (SplitMix64).

    """

    def __init__(self, stddev=0.01, seed=None):
        if not isinstance(stddev, int | float | np.number) or not 0 <= stddev < np.inf:
            raise ValueError(f"stddev must be a number of at least 0, got {stddev!r}")
        self.stddev = float(stddev)
        self.seed = int(np.random.SeedSequence().generate_state(1)[0] >> 1) if seed is None else int(seed)

    def __call__(self, shape, dtype=None):
        return self.rows(tf.range(shape[0], dtype=tf.int64), shape[1:], dtype)

    def rows(self, numbers, shape, dtype=None):
        """The rows of these numbers, int64 [n]: [n, *shape]."""
        width = int(np.prod(shape))
        place = tf.cast(numbers, tf.uint64)[:, tf.newaxis] * tf.constant(width, tf.uint64)
        place += tf.cast(tf.range(width), tf.uint64)
        total = tf.zeros(tf.shape(place), tf.int32)
        for word in range(_WORDS):
            bits = _mixed(place * tf.constant(_WORDS, tf.uint64) + tf.constant(word, tf.uint64), self.seed)
            for shift in (0, 16, 32, 48):
                part = tf.bitwise.right_shift(bits, tf.constant(shift, tf.uint64))
                total += tf.cast(tf.bitwise.bitwise_and(part, tf.constant(0xFFFF, tf.uint64)), tf.int32)
        # Of twelve numbers in 0 .. 65535 the mean is 12 * 32767.5, the deviation 65536 to ten digits.
        centered = tf.cast(total - 6 * 65535, tf.float32) * np.float32(self.stddev / 65536)
        return tf.reshape(tf.cast(centered, dtype or keras.config.floatx()), [-1, *shape])

    def get_config(self):
        return {"stddev": self.stddev, "seed": self.seed}


def _mixed(x, seed):
    """Each of the words uint64, hashed."""
    start = (seed * _GAMMA + _GAMMA) % (1 << 64)
    x = x * tf.constant(_GAMMA, tf.uint64) + tf.constant(start, tf.uint64)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        x = tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, tf.constant(shift, tf.uint64)))
        x *= tf.constant(factor, tf.uint64)
    return tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, tf.constant(31, tf.uint64)))


def rows_of(initializer, numbers, shape, dtype):
    """Rows [n, *shape] of a table by an initializer that makes each row for itself.

    Raises:
        ValueError: an initializer whose values depend on the table as a whole.

    """
    if isinstance(initializer, RowNormal):
        return initializer.rows(numbers, shape, dtype)
    alike = (keras.initializers.Zeros, keras.initializers.Ones, keras.initializers.Constant)
    if isinstance(initializer, alike):
        return tf.cast(initializer((tf.shape(numbers)[0], *shape), dtype=dtype), dtype)
    raise ValueError(
        f"a table that is split needs an initializer that makes each row for itself: cluster.RowNormal, zeros, ones or "
        f"a constant; got {type(initializer).__name__}"
    )
