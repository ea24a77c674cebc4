"""What `compile()` without arguments and `DeepFM.from_features` choose: docs/learning.md says why."""

from deepfm_ops.optimizers import CombinedOptimizer, LazyAdam

HIDDEN_UNITS = (256, 128)
EMBEDDING_PRIOR, LINEAR_PRIOR = 0.05, 0.3  # deviations
BATCH_SIZE = 1024
LOSS = {"binary": "binary_crossentropy", "regression": "mean_squared_error"}
NAME = "recommended"


def optimizer():
    """The recommended optimizers: tables learn faster than dense weights, and averages of both are what predicts."""
    average = {"use_ema": True, "ema_momentum": 0.999}
    return CombinedOptimizer(LazyAdam(3e-3, rare_rate=4.0, **average), LazyAdam(5e-4, **average), name=NAME)


def batch_size(optimizer):
    """Samples per step of a model that was compiled without arguments; None, Keras's choice, of another."""
    return BATCH_SIZE if getattr(optimizer, "name", None) == NAME else None
