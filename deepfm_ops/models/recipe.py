"""What `compile()` without arguments and `DeepFM.from_features` choose: docs/learning.md says why."""

import math

import numpy as np

from deepfm_ops import heads
from deepfm_ops.combined import CombinedOptimizer, unscaled
from deepfm_ops.optimizers import LazyAdam

HIDDEN_UNITS = (256, 128)
EMBEDDING_PRIOR, LINEAR_PRIOR = 0.05, 0.3  # deviations
LOSS = {
    "binary": "binary_crossentropy",
    "regression": "mean_squared_error",
    "multiclass": "sparse_categorical_crossentropy",
}
NAME = "recommended"


def losses(task, given=None):
    """The loss of a task, {head: loss} where it is a dict; `given`: what a caller has said of it.

    Raises:
        ValueError: losses of heads that are not there.

    """
    found = [LOSS[head.kind] for head in heads.of(task)]
    if isinstance(task, dict):
        return dict(zip(task, found, strict=True)) | by_head("loss", task, given)
    return found[0] if given is None else given


def weights(task, given):
    """`loss_weights` as Keras takes them, 1 for heads of which nothing was said.

    Raises:
        ValueError: weights of heads that are not there, or that are no finite numbers.

    """
    if given is None or not isinstance(task, dict):
        return given
    given = {name: weight for name, weight in by_head("loss_weights", task, given).items() if weight is not None}
    for name, weight in given.items():
        if not isinstance(weight, int | float | np.number) or not math.isfinite(weight):
            raise ValueError(f"loss_weights[{name!r}] must be a finite number, got {weight!r:.100}")
    return dict.fromkeys(task, 1.0) | given


def by_head(argument, task, given):
    """{head: what a caller has said of it}, out of a dict, of a list in the order of the heads, or of one for all.

    Raises:
        ValueError: heads that are not there, or a list of another length.

    """
    if isinstance(given, list | tuple):
        if len(given) != len(task):
            raise ValueError(f"{argument} must have an entry for each of the heads {list(task)}, got {len(given)}")
        given = dict(zip(task, given, strict=True))
    if not isinstance(given, dict):
        given = {} if given is None else dict.fromkeys(task, given)
    unknown = [name for name in given if name not in task]
    if unknown:
        raise ValueError(f"{argument} has {unknown[0]!r}, which is no head of the model: it has {list(task)}")
    return given


def optimizer(variables=(), rate=1.0):
    """The recommended optimizers: tables learn faster than dense weights, and averages of both are what predicts.

    Weights narrower than float32 have no averages. `rate`: what the learning rates are times.
    """
    average = {"use_ema": all(v.dtype in ("float32", "float64") for v in variables), "ema_momentum": 0.999}
    return CombinedOptimizer(
        LazyAdam(3e-3 * rate, rare_rate=4.0, **average), LazyAdam(5e-4 * rate, **average), name=NAME
    )


def batch_size(optimizer, num_samples):
    """Samples per step of a model that was compiled without arguments; None, Keras's choice, of another.

    A power of two near num_samples^2 / 1.2e6, from 64 (under 10,000 samples) to 1,024 (from 30,000 on).
    """
    if getattr(unscaled(optimizer), "name", None) != NAME:
        return None
    return 2 ** min(10, max(6, round(math.log2(max(1, num_samples) ** 2 / 1.2e6))))
