"""Random arguments of the kernels' calls, and how close to float64 their results must be. Needs no TensorFlow."""

import ml_dtypes
import numpy as np

DTYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
WILD = [-1, -(2**31), 2**31 - 1]
# Of a number of the dtype: its distance from the next, and from 0 to the first.
STEPS = {"float32": (2**-23, 1e-44), "float64": (2**-52, 0), "float16": (2**-10, 2**-24), "bfloat16": (2**-7, 1e-39)}


def close(got, expected, terms, acc, dtype=None):
    """Checks that a result is what it must be, but for the rounding of `terms` sums, and of its dtype at the end."""
    (want, size), got = expected, np.asarray(got).astype(np.float64)
    bound = (terms + 8) * STEPS[np.dtype(acc).name][0] * size
    if dtype and dtype != np.dtype(acc).name:
        step, least = STEPS[dtype]
        bound = bound + step * np.abs(want) + least
        if dtype == "float16":
            bound = np.where(np.abs(want) > 60000, np.inf, bound)  # which it cannot hold
    want = np.reshape(want, got.shape)
    wrong = ~(np.abs(got - want) <= np.reshape(bound, got.shape) + 1e-30)
    assert not wrong.any(), f"at {np.argwhere(wrong)[0]}: {got[wrong][0]}, not {want[wrong][0]}"


def chance(rng, share):
    return rng.random() < share


def dimension(rng):
    return int(rng.integers(1, 41) if chance(rng, 0.8) else rng.choice([47, 64, 65, 127, 128, 130, 257]))


def splits_of(rng, parts, end):
    return np.concatenate([[0], np.sort(rng.integers(0, end + 1, parts - 1)), [end]]).astype(np.int64)


def random_pairs(rng, num_rows, acc, ragged, pooled):
    """(indices, values or None, row_splits or None, field_splits or None)."""
    large = chance(rng, 0.05)
    samples, pairs = int(rng.integers(0, 3000 if large else 12)), int(rng.integers(0, 12))
    shape = (samples, pairs)
    row_splits = field_splits = None
    if ragged:
        shape = (samples * pairs,)
        row_splits = splits_of(rng, samples, samples * pairs) if samples else np.zeros(1, np.int64)
    elif pooled:
        field_splits = splits_of(rng, int(rng.integers(1, pairs + 2)), pairs).tolist()
    kind = rng.integers(0, 4)
    indices = rng.integers(0, num_rows, shape)
    if kind == 0:
        indices = np.minimum(indices, rng.integers(0, num_rows, shape))  # some rows more often
    elif kind == 1 and 0 < indices.size <= num_rows:
        indices = np.sort(rng.choice(num_rows, indices.size, replace=False)).reshape(shape)  # each once, ascending
    values = None
    if chance(rng, 0.7):
        values = rng.normal(size=shape).astype(acc)
        values[rng.random(shape) < 0.2] = 0
    return indices.astype(rng.choice([np.int32, np.int64])), values, row_splits, field_splits


def random_table(rng, dtype):
    num_rows = int(rng.integers(1, 5000) if chance(rng, 0.3) else rng.integers(1, 40))
    table = (rng.normal(size=(num_rows, dimension(rng))) * 10.0 ** rng.integers(-2, 2)).astype(DTYPES[dtype])
    return table, rng.normal(size=(num_rows, 1)).astype(DTYPES[dtype])


def spoiled(rng, indices, num_rows):
    """Indices of which some are out of range."""
    bad = indices.copy()
    places = rng.integers(0, bad.size, rng.integers(1, 4))
    bad.ravel()[places] = rng.choice([*WILD, num_rows, num_rows + 1], len(places))
    return bad
