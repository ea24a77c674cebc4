"""What keeps the weights of a model small: L2 on the rows of a batch or on whole tables, and priors that count.

Those of a batch are arguments of `FMInteraction` and `FirstOrder`, and the op adds them to the gradient of the rows it
names (`reference.Penalty` says what it computes); L2 on a table is a Keras regularizer.
"""

from typing import NamedTuple

import keras
import numpy as np

from deepfm_ops.layers import deviation

SCOPES = ("batch", "table")


def l2_regularizer(strength):
    return keras.regularizers.L2(strength) if strength else None


class Penalties(NamedTuple):
    scope: str  # of the two l2
    l2: float
    l2_linear: float
    embedding_prior: float | None = None  # deviations
    linear_prior: float | None = None
    counts: np.ndarray | None = None  # [V], or None: no priors
    num_samples: int | None = None
    counted_later: bool = False  # then there are counts, of zero as yet

    def over(self, num_rows):
        """Those of a table with so many rows."""
        return self._replace(counts=np.zeros(num_rows, int)) if self.counted_later else self

    def checked(self):
        if self.scope not in SCOPES:
            raise ValueError(f"l2_scope must be one of {', '.join(SCOPES)}, got {self.scope!r}")
        for name in ("embedding_prior", "linear_prior"):
            deviation(name, getattr(self, name))
        return self

    def _counted(self, **priors):
        if self.counts is None:
            return {}
        return {"feature_counts": self.counts, "num_samples": self.num_samples, **priors}

    def of_weights(self):
        """The arguments of a `FirstOrder`."""
        counted = self._counted(prior=self.linear_prior)
        if self.scope == "batch":
            return {"l2": self.l2_linear, **counted}
        return {"weights_regularizer": l2_regularizer(self.l2_linear), **counted}

    def of_table(self, use_linear=True):
        """The arguments of an `FMInteraction`."""
        l2_linear = self.l2_linear if use_linear else 0.0
        counted = self._counted(embedding_prior=self.embedding_prior, linear_prior=self.linear_prior)
        if self.scope == "batch":
            return {"l2": self.l2, "l2_linear": l2_linear, **counted}
        regularizers = {
            "embeddings_regularizer": l2_regularizer(self.l2),
            "linear_regularizer": l2_regularizer(l2_linear),
        }
        return {**regularizers, **counted}

    def of_weights_in_a_table(self):
        """The arguments of an `FMInteraction` whose one column is the first order."""
        return self._replace(l2=self.l2_linear, embedding_prior=self.linear_prior).of_table(use_linear=False)
