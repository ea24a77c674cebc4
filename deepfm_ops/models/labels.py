"""What labels may be: numbers that make no loss NaN or senseless."""

from collections.abc import Mapping

import numpy as np

from deepfm_ops import heads
from deepfm_ops.features.tables import column_names, is_table


def bad(head, wanted):
    """What is said of a label that cannot be used, with a {} for its position and one for itself."""
    return f"{head.of_labels}[{{}}] = {{}} is {wanted.said}"


def by_head(task, y):
    """[labels] of each head, out of what holds those of all.

    Raises:
        ValueError, TypeError: no labels of a head, or labels that do not say which head's they are.

    """
    found = heads.of(task)
    if not isinstance(task, dict):
        if isinstance(y, Mapping):
            raise TypeError(f"labels must be an array, as the model predicts one thing, got a dict of {list(y)}")
        return [y]
    if not isinstance(y, Mapping) and not is_table(y):
        if len(found) > 1:
            raise TypeError(f"labels must be a dict with an array for each of {list(task)}, got {type(y).__name__}")
        return [y]
    known = y if isinstance(y, Mapping) else column_names(y)
    missing = [name for name in task if name not in known]
    if missing:
        raise ValueError(f"labels must have {missing[0]!r}, a head of the model: NaN where a sample has no label")
    return [y[name] for name in task]


def checked(task, y):
    """The labels as the model takes them: [B, 1] of its only output, or a dict of them.

    Raises:
        ValueError: one that makes a loss NaN or senseless, by its position; a shape that is not [B] or [B, 1].
        TypeError: labels that are no numbers.

    """
    return heads.joined(
        task, [_checked(*of, some) for of, some in zip(heads.rules(task), by_head(task, y), strict=True)]
    )


def _checked(head, wanted, labels):
    array = np.asarray(labels)
    if array.dtype.kind not in "iufb":
        try:
            array = None if array.dtype.kind in "mMS" else array.astype(np.float64)
        except (TypeError, ValueError):
            array = None
        if array is None:
            raise TypeError(f"{head.of_labels} must be numbers, got dtype {np.asarray(labels).dtype}")
    if (wanted.whole or wanted.may_miss) and array.shape[1:] not in ((), (1,)):
        raise ValueError(f"{head.of_labels} must have shape [B] or [B, 1], got {array.shape}")
    flat = array.reshape(-1)
    good = wanted.usable(flat)
    if not good.all():
        good |= wanted.missing(flat)
    if not good.all():
        first = int(np.argmin(good))
        raise ValueError(bad(head, wanted).format(first, flat[first]))
    array = array.astype(np.float32) if array.dtype.kind == "b" else array
    return array.reshape(-1, 1) if array.ndim == 1 else array
