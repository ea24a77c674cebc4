"""Where a model's L2 penalties act: on the rows of a batch, or on whole tables.

"batch" is the `l2` of `FMInteraction` and `FirstOrder`, which the op adds to the gradient of the rows it names
(`reference.interaction` says what it computes); "table" is a Keras regularizer.
"""

import keras

SCOPES = ("batch", "table")


def l2_regularizer(strength):
    return keras.regularizers.L2(strength) if strength else None


def weights_l2(scope, strength):
    """The arguments of a `FirstOrder` for an L2 penalty of this scope."""
    if scope not in SCOPES:
        raise ValueError(f"l2_scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    return {"l2": strength} if scope == "batch" else {"weights_regularizer": l2_regularizer(strength)}


def table_l2(scope, strength, linear_strength=0.0):
    """The arguments of an `FMInteraction`, likewise."""
    weights_l2(scope, strength)
    if scope == "batch":
        return {"l2": strength, "l2_linear": linear_strength}
    return {"embeddings_regularizer": l2_regularizer(strength), "linear_regularizer": l2_regularizer(linear_strength)}
