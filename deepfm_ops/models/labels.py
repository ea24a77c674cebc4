"""What labels may be: numbers that make no loss NaN or senseless."""

import numpy as np

# What labels are between: of regression, float32 holds the squares.
LIMITS = {"binary": (0.0, 1.0), "regression": (-(2.0**63), 2.0**63)}
BAD = {
    "binary": "labels[{}] = {} is not in [0, 1], as task 'binary' needs it: map -1 and +1 by (labels + 1) / 2, other "
    "numbers by a threshold (labels > 3), or use task 'regression'",
    "regression": "labels[{}] = {} is not finite, or too large to be squared: drop the sample, or mend it",
}


def rule(task):
    """What `Stream.check_labels` takes."""
    return *LIMITS[task], BAD[task].split(" is ", 1)[1]


def checked(task, labels):
    """The labels as an array of numbers.

    Raises:
        ValueError: one that makes a loss NaN or senseless, by its position.
        TypeError: labels that are no numbers.

    """
    array = np.asarray(labels)
    if array.dtype.kind not in "iufb":
        try:
            array = None if array.dtype.kind in "mMS" else array.astype(np.float64)
        except (TypeError, ValueError):
            array = None
        if array is None:
            raise TypeError(f"labels must be numbers, got dtype {np.asarray(labels).dtype}")
    (low, high), flat = LIMITS[task], array.reshape(-1)
    good = (flat >= low) & (flat <= high)
    if not good.all():
        first = int(np.argmin(good))
        raise ValueError(BAD[task].format(first, flat[first]))
    return array.astype(np.float32) if array.dtype.kind == "b" else array
