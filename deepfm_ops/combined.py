"""One optimizer for tables and another for dense weights."""

import keras

from deepfm_ops.averages import Averaging


@keras.saving.register_keras_serializable("deepfm_ops")
class CombinedOptimizer(keras.optimizers.Optimizer):
    """One optimizer for the tables of a model and another for its dense weights, in one `compile`.

    Tables are the weights of `FMInteraction` and `FirstOrder`, and those of `keras.layers.Embedding`; each optimizer
    has a learning rate or schedule, clipping and slots of its own, and is saved and resumed.

    Args:
        tables, dense: Keras optimizers, their names or configurations.
        name: of this one.

    Attributes:
        learning_rate: that of `dense`. Setting it, as Keras's callbacks do, changes that of `tables` by the same
            factor.

    Raises:
        ValueError: averages (`use_ema`) in one of the two only, or in an optimizer that is not of this package.

    Example:
        >>> import keras
        >>> from deepfm_ops import optimizers
        >>> decay = keras.optimizers.schedules.CosineDecay(1e-3, 10_000)
        >>> optimizer = optimizers.CombinedOptimizer(optimizers.RowWiseAdagrad(0.05), keras.optimizers.Adam(decay))

    """

    def __init__(self, tables, dense, name="combined_optimizer"):
        super().__init__(learning_rate=0.0, name=name)
        self.tables, self.dense = keras.optimizers.get(tables), keras.optimizers.get(dense)
        self.use_ema, self._ratio = self.tables.use_ema, 1.0
        if self.tables is self.dense:
            raise ValueError("tables and dense must be two optimizers, got one for both")
        if self.tables.use_ema != self.dense.use_ema:
            raise ValueError("use_ema must be the same of both optimizers, or averages would be of half a model")
        for optimizer in (self.tables, self.dense):
            if optimizer.use_ema and not isinstance(optimizer, Averaging):
                raise ValueError(
                    f"{type(optimizer).__name__} of Keras cannot show averages and go on from the raw weights: use one "
                    "of deepfm_ops.optimizers (LazyAdam's dense step is Adam's)"
                )

    @property
    def _parts(self):
        return self.tables, self.dense

    def _split(self, variables, *others):
        """For each of the parts, the variables that are its, and what goes with them."""
        groups = [], []
        for items in zip(variables, *others, strict=True):
            groups[0 if is_table(items[0]) else 1].append(items)
        found = zip(self._parts, groups, strict=True)
        return [(part, *map(list, zip(*group, strict=True))) for part, group in found if group]

    def build(self, variables):
        if self.built or not variables:  # Keras's loader of .h5 files builds with none
            return
        for part, mine in self._split(variables):
            part.build(mine)
        self._trainable_variables = list(variables)
        self.built = True

    def apply(self, grads, trainable_variables=None):
        variables = self._trainable_variables if trainable_variables is None else list(trainable_variables)
        self.build(variables)
        for part, mine, gradients in self._split(variables, grads):
            if any(gradient is not None for gradient in gradients):
                part.apply(gradients, mine)

    @property
    def variables(self):
        return [variable for part in self._parts for variable in part.variables]

    @property
    def iterations(self):
        return self.dense.iterations if self.dense.built else self.tables.iterations

    @property
    def learning_rate(self):
        return self.dense.learning_rate

    @learning_rate.setter
    def learning_rate(self, rate):
        if callable(rate):
            raise TypeError("set a schedule in `tables` and `dense`: the two have rates of their own")
        if before := float(self.dense.learning_rate):
            self._ratio = float(self.tables.learning_rate) / before
        self.tables.learning_rate, self.dense.learning_rate = float(rate) * self._ratio, float(rate)

    @property
    def averages_are_shown(self):
        return self.use_ema and any(part.averages_are_shown for part in self._parts)

    def show_averages(self):
        """See `averages.Averaging`."""
        for part in self._parts if self.use_ema else ():
            part.show_averages()

    def hide_averages(self):
        """See `averages.Averaging`."""
        for part in self._parts if self.use_ema else ():
            part.hide_averages()

    _model_variables_moving_average = Averaging._model_variables_moving_average

    def finalize_variable_values(self, var_list):
        for part in self._parts:
            part.finalize_variable_values(var_list)

    def get_config(self):
        return {
            "name": self.name,
            "tables": keras.optimizers.serialize(self.tables),
            "dense": keras.optimizers.serialize(self.dense),
        }


def is_table(variable):
    """Whether a weight is a table that is looked up, of this package's layers or of `keras.layers.Embedding`."""
    return hasattr(variable, "row_counts") or variable.name == "embeddings"


def unscaled(optimizer):
    """The optimizer without the loss scaling that Keras wraps it into under mixed precision."""
    return getattr(optimizer, "inner_optimizer", optimizer)
