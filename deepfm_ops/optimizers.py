"""Optimizers whose step costs what the rows of a batch cost, whatever the size of the table.

Each is a Keras optimizer. A gradient that is a `tf.IndexedSlices`, as `FMInteraction` and `keras.layers.Embedding`
give, updates the rows it names in one native op: equal indices are added up first, each row and its slots are
fetched and written once, no other row is touched. A dense gradient is updated as Keras does.

With sparse gradients, and as against Keras's optimizers:

* clipping sees equal indices added up, so that the norm is that of the gradient;
* XLA cannot compile the native op: `compile(..., jit_compile=False)` for a model without a layer of this package;
* weight decay acts on the rows of the batch;
* `use_ema` keeps exponential averages of the weights that cost the rows of the batch too, and what Keras does with them
  is done better: see `averages`. The decay of step t is min(ema_momentum, (1 + t) / (10 + t)), as that of TensorFlow's
  ExponentialMovingAverage with num_updates, so that short training has an average worth using;
* `gradient_accumulation_steps` keeps a second whole table, which is rewritten at every step.
"""

import threading

import keras
import numpy as np
import tensorflow as tf

from deepfm_ops import arguments, fusion, ops
from deepfm_ops.averages import Averaging
from deepfm_ops.combined import CombinedOptimizer as CombinedOptimizer
from deepfm_ops.placement import beside

_step = threading.local()  # has the updates of the step that a thread takes
RARE_COUNT = 20  # kRareCount of the native op


def row_counts_of(variable):
    """What the layer of a table knows of how often the features of its rows occur, see `layers`; None of others."""
    return getattr(variable, "row_counts", lambda: None)()


def _number(x, dtype):
    """A scalar of the dtype; a Python number goes there at once, not by way of float32 as in tf.cast."""
    return tf.cast(x, dtype) if tf.is_tensor(x) else tf.constant(x, dtype)


def _added_up(slices):
    """The slices with equal indices added up, in the dtype that sums are kept in; ascending."""
    slices = _map(lambda g: tf.cast(g, arguments.accumulation_dtype(g.dtype)), slices)
    indices = slices.indices

    def add():
        unique, position = tf.unique(indices)
        order = tf.argsort(unique)
        rank = tf.math.invert_permutation(order)
        values = tf.math.unsorted_segment_sum(slices.values, tf.gather(rank, position), tf.size(unique))
        return values, tf.gather(unique, order)

    ascending = tf.reduce_all(indices[1:] > indices[:-1])
    values, indices = tf.cond(ascending, lambda: (tf.identity(slices.values), tf.identity(indices)), add)
    return tf.IndexedSlices(values, indices, slices.dense_shape)


class _Sparse(Averaging):
    """What the optimizers share; goes before a class of Keras's.

    A class below has, each in the native op's order:
        _rule: the native op's name for its update.
        _slot_lists: the names of the attributes that hold its slots, a list over the variables each.
        _hyper(rate): the numbers of the rule; the rate is a scalar of the dtype that sums are kept in.
        _row_step(g, p, slots, hyper): (new rows, new slots) in plain TensorFlow, the fallback and the oracle.
    """

    _slot_lists = ()
    rare_rate = 0.0  # LazyAdam's
    _moves_absent_rows = False  # then a sparse gradient is made dense

    def _slots(self, variable):
        index = self._get_variable_index(variable)
        return [getattr(self, name)[index] for name in self._slot_lists]

    def build(self, variables):
        if variables:  # Keras's loader of .h5 files builds with none, after which nothing could be trained
            super().build(variables)

    def apply(self, grads, trainable_variables=None):
        if self.loss_scale_factor is not None:  # Keras would divide, which slices cannot
            grads = [_map(lambda g: g / tf.cast(self.loss_scale_factor, g.dtype), g) for g in grads]
            scale, self.loss_scale_factor = self.loss_scale_factor, None
            try:
                return super().apply(grads, trainable_variables)
            finally:
                self.loss_scale_factor = scale
        return super().apply(grads, trainable_variables)

    def _backend_apply_gradients(self, grads, trainable_variables):
        if self.gradient_accumulation_steps or self._moves_absent_rows:
            grads = [tf.convert_to_tensor(g) for g in grads]
        sparse = (v for g, v in zip(grads, trainable_variables, strict=True) if isinstance(g, tf.IndexedSlices))
        self._sparse_keys = {self._var_key(v) for v in sparse}
        super()._backend_apply_gradients(grads, trainable_variables)

    def _moves_rows_only(self, gradient, variable):
        dense = self.gradient_accumulation_steps or self._moves_absent_rows or variable.constraint is not None
        return isinstance(gradient, tf.IndexedSlices) and not dense

    def _clip_gradients(self, grads):
        if not (self.clipnorm or self.clipvalue or self.global_clipnorm):
            return grads
        grads = [_added_up(g) if isinstance(g, tf.IndexedSlices) else g for g in grads]
        # The rows that are not named are zero: they change no norm, and clipping leaves them zero.
        clipped = super()._clip_gradients([g.values if isinstance(g, tf.IndexedSlices) else g for g in grads])
        return [_map(lambda _, c=c: c, g) for g, c in zip(grads, clipped, strict=True)]

    def _apply_weight_decay(self, variables):
        super()._apply_weight_decay([v for v in variables if self._var_key(v) not in self._sparse_keys])

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        _step.updates = fusion.Updates()
        try:
            super()._backend_update_step(grads, trainable_variables, learning_rate)
            _step.updates.emit()
        finally:
            _step.updates = None

    def update_step(self, gradient, variable, learning_rate):
        if not isinstance(gradient, tf.IndexedSlices):
            return super().update_step(gradient, variable, learning_rate)
        value = variable.value if isinstance(variable, keras.Variable) else variable
        dtype = arguments.accumulation_dtype(value.dtype)
        rate = tf.cast(learning_rate, dtype)
        decay = rate * self.weight_decay if self.weight_decay and self._use_weight_decay(variable) else 0.0
        hyper = [_number(x, dtype) for x in (decay, *self._hyper(rate))]
        slots = [slot.value for slot in self._slots(variable)]
        lags = []
        tracked = self._trainable_variables[self._get_variable_index(variable)]
        if self.use_ema and self._moves_rows_only(gradient, tracked):
            lags = [self._lag_of(variable).value]
            hyper.append(tf.cast(self._lag_scale, dtype))
        counts, row_counts = None, row_counts_of(tracked) if self.rare_rate else None
        if row_counts is not None:
            counts, is_counted, first_pass = row_counts
            hyper += [self.rare_rate * tf.cast(is_counted, dtype), tf.cast(first_pass, dtype)]
        gradient = _map(lambda g: tf.cast(g, value.dtype), gradient)
        if value.dtype not in arguments.TABLE_DTYPES or ops.native_for(value) is None:
            self._update_rows(gradient, value, slots, lags, counts, hyper)
            return
        step = getattr(_step, "updates", None)
        updates = step or fusion.Updates()
        updates.add(
            gradient,
            table=value.handle,
            slots=[slot.handle for slot in slots],
            lags=[lag.handle for lag in lags],
            hyper=tf.stack(hyper),
            counts=[] if counts is None else [counts],
            rule=self._rule,
        )
        if step is None:
            updates.emit()

    def _update_rows(self, gradient, value, slots, lags, counts, hyper):
        if counts is not None:
            *hyper, rare, seen = hyper
        if lags:
            *hyper, lag_scale = hyper
        gradient = _added_up(gradient)
        indices, dtype = gradient.indices, hyper[0].dtype
        p, *rows = [
            tf.ensure_shape(tf.cast(tf.gather(variable, indices), dtype), [None, *variable.shape[1:]])
            for variable in (value, *slots)
        ]
        before = p
        p, rows = self._row_step(tf.cast(gradient.values, dtype), p - p * hyper[0], rows, hyper[1:])
        if counts is not None:
            n = tf.cast(tf.gather(counts, indices), dtype)
            farther = rare * RARE_COUNT / (RARE_COUNT + seen * n)
            p += (p - before) * tf.reshape(farther, [-1] + [1] * (p.shape.rank - 1))
        for lag in lags:
            rows.append(tf.gather(lag, indices) - (p - before) * lag_scale)
        for variable, new in zip((value, *slots, *lags), (p, *rows), strict=True):
            variable.scatter_update(tf.IndexedSlices(tf.cast(new, variable.dtype), indices))


def _map(function, gradient):
    """The function of a gradient's values: all of them, or those of the slices; None stays None."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(function(gradient.values), gradient.indices, gradient.dense_shape)
    return None if gradient is None else function(gradient)


@keras.saving.register_keras_serializable("deepfm_ops")
class SGD(_Sparse, keras.optimizers.SGD):
    """Stochastic gradient descent: `w -= learning_rate * g`; arguments as for `keras.optimizers.SGD`.

    On sparse gradients it equals the dense update. With momentum every row moves at every step, so the gradient
    is then made dense, and the step costs the whole table.
    """

    _rule = "sgd"

    @property
    def _moves_absent_rows(self):
        return self.momentum != 0

    def _hyper(self, rate):
        return [rate]

    def _row_step(self, g, p, slots, hyper):
        return p - g * hyper[0], []


@keras.saving.register_keras_serializable("deepfm_ops")
class Adagrad(_Sparse, keras.optimizers.Adagrad):
    """Adagrad: `s += g^2; w -= learning_rate * g / sqrt(s + epsilon)`; arguments as for `keras.optimizers.Adagrad`.

    On sparse gradients it equals the dense update.

    References:
        Duchi, Hazan and Singer, "Adaptive Subgradient Methods", JMLR 2011.

    """

    _rule = "adagrad"
    _slot_lists = ("_accumulators",)

    def _hyper(self, rate):
        return [rate, self.epsilon]

    def _row_step(self, g, p, slots, hyper):
        rate, epsilon = hyper
        s = slots[0] + tf.square(g)
        return p - g * rate / tf.sqrt(s + epsilon), [s]


@keras.saving.register_keras_serializable("deepfm_ops")
class RowWiseAdagrad(_Sparse, keras.optimizers.Optimizer):
    """Adagrad with one accumulator per row: `s += mean(g^2); w -= learning_rate * g / (sqrt(s) + epsilon)`.

    Its state is [V] for a table [V, K], where Adagrad's is [V, K]: for tables that hardly fit. A row is what
    the first axis counts; the mean is over the others, and a vector's rows are its elements. On sparse gradients
    it equals the dense update.

    Args:
        learning_rate: float, schedule or callable.
        initial_accumulator_value: where s starts.
        epsilon: added to the root.
        **kwargs: Keras's `weight_decay`, `clipnorm`, `loss_scale_factor`, `name` and so on.

    References:
        The `EXACT_ROWWISE_ADAGRAD` of FBGEMM; Mudigere et al., "Software-Hardware Co-design for Fast and
        Scalable Training of Deep Learning Recommendation Models", ISCA 2022.

    """

    _rule = "row_wise_adagrad"
    _slot_lists = ("_accumulators",)

    def __init__(self, learning_rate=0.001, initial_accumulator_value=0.0, epsilon=1e-8, **kwargs):
        super().__init__(learning_rate=learning_rate, **kwargs)
        if initial_accumulator_value < 0:
            raise ValueError(f"initial_accumulator_value must be at least 0, got {initial_accumulator_value}")
        if epsilon <= 0:
            raise ValueError(f"epsilon must be above 0, got {epsilon}")
        self.initial_accumulator_value = initial_accumulator_value
        self.epsilon = epsilon

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        start = keras.initializers.Constant(self.initial_accumulator_value)
        self._accumulators = []
        for v in variables:
            # As Keras does for a slot of a variable's own shape: on the device that the variable is on.
            with beside(v), tf.distribute.get_strategy().extended.colocate_vars_with(v.value):
                slot = self.add_variable(v.shape[:1], start, v.dtype, name=f"{v.path.replace('/', '_')}_accumulator")
            self._accumulators.append(slot)

    def update_step(self, gradient, variable, learning_rate):
        if isinstance(gradient, tf.IndexedSlices):
            return super().update_step(gradient, variable, learning_rate)
        (slot,) = self._slots(variable)
        dtype = arguments.accumulation_dtype(tf.as_dtype(variable.dtype))
        hyper = [_number(x, dtype) for x in self._hyper(learning_rate)]
        g, p, s = (tf.cast(tf.convert_to_tensor(x), dtype) for x in (gradient, variable, slot))
        p, (s,) = self._row_step(g, p, [s], hyper)
        self.assign(slot, s)
        self.assign(variable, p)

    def _hyper(self, rate):
        return [rate, self.epsilon]

    def _row_step(self, g, p, slots, hyper):
        rate, epsilon = hyper
        axes = list(range(1, p.shape.rank))
        s = slots[0] + tf.reduce_mean(tf.square(g), axis=axes)
        scale = rate / (tf.sqrt(s) + epsilon)
        return p - g * scale[(..., *[tf.newaxis] * len(axes))], [s]

    def get_config(self):
        return {
            **super().get_config(),
            "initial_accumulator_value": self.initial_accumulator_value,
            "epsilon": self.epsilon,
        }


@keras.saving.register_keras_serializable("deepfm_ops")
class LazyAdam(_Sparse, keras.optimizers.Adam):
    """Adam that leaves absent rows alone; arguments as for `keras.optimizers.Adam`, without amsgrad.

    With t the number of the step, for the rows of the batch:

        m += (1 - beta_1) * (g - m);  v += (1 - beta_2) * (g^2 - v)
        w -= learning_rate * sqrt(1 - beta_2^t) / (1 - beta_1^t) * m / (sqrt(v) + epsilon)

    The moments of a row that is not in the batch do not decay, and the row does not move; dense Adam would go on
    moving it along its fading momentum. t counts all steps, not those of the row. These are the semantics of
    PyTorch's SparseAdam (torch/optim/_functional.py, sparse_adam) and of TensorFlow Addons' LazyAdam. Dense
    gradients get exactly Keras's Adam.

    Args:
        learning_rate, beta_1, beta_2, epsilon: as Keras's.
        amsgrad: False.
        rare_rate: rows of rare features learn faster: one whose feature was counted n times moves
            1 + rare_rate * 20 / (20 + n) times as far; in the first pass over `num_samples`, n is how often it will
            have come up to now. Of tables of layers that were given `feature_counts`.
        **kwargs: Keras's.

    References:
        Kingma and Ba, "Adam", ICLR 2015, end of section 2 (the bias corrections folded into the rate).

    """

    _rule = "lazy_adam"
    _slot_lists = ("_momentums", "_velocities")

    def __init__(
        self,
        learning_rate=0.001,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-7,
        amsgrad=False,
        *,
        rare_rate=0.0,
        **kwargs,
    ):
        if amsgrad:
            raise ValueError("amsgrad is not supported: the largest second moment of an absent row is not kept")
        is_number = isinstance(rare_rate, int | float | np.number) and not isinstance(rare_rate, bool)
        if not is_number or not 0 <= rare_rate < float("inf"):
            raise ValueError(f"rare_rate must be a number of at least 0, got {rare_rate!r}")
        super().__init__(learning_rate, beta_1, beta_2, epsilon, **kwargs)
        self.rare_rate = float(rare_rate)

    def get_config(self):
        return {**super().get_config(), "rare_rate": self.rare_rate}

    def _hyper(self, rate):
        step = tf.cast(self.iterations + 1, rate.dtype)
        beta_1, beta_2 = tf.cast(self.beta_1, rate.dtype), tf.cast(self.beta_2, rate.dtype)  # rounded as by Keras
        correction = tf.sqrt(1 - tf.pow(beta_2, step)) / (1 - tf.pow(beta_1, step))
        return [rate * correction, 1 - self.beta_1, 1 - self.beta_2, self.epsilon]

    def _row_step(self, g, p, slots, hyper):
        rate, one_minus_beta_1, one_minus_beta_2, epsilon = hyper
        m = slots[0] + (g - slots[0]) * one_minus_beta_1
        v = slots[1] + (tf.square(g) - slots[1]) * one_minus_beta_2
        return p - m * rate / (tf.sqrt(v) + epsilon), [m, v]


@keras.saving.register_keras_serializable("deepfm_ops")
class Ftrl(_Sparse, keras.optimizers.Ftrl):
    """Follow the regularized leader; arguments and formula as for `keras.optimizers.Ftrl`.

    On sparse gradients the rows of the batch get the dense update. A row that was never in a batch keeps its
    initial value, where the dense update would set it to zero in the first step: with weights that start at
    zero, Ftrl's own start, the two are equal (a learning rate that changes, and shrinkage, act on a row when it
    comes).

    References:
        McMahan et al., "Ad Click Prediction: a View from the Trenches", KDD 2013, algorithm 1.

    """

    _rule = "ftrl"
    _slot_lists = ("_accumulators", "_linears")

    def _hyper(self, rate):
        return [
            rate,
            self.learning_rate_power,
            self.l1_regularization_strength,
            self.l2_regularization_strength + self.beta / (2.0 * rate),
            self.l2_shrinkage_regularization_strength,
        ]

    def _row_step(self, g, p, slots, hyper):
        rate, power, l1, l2, shrinkage = hyper
        n = slots[0] + tf.square(g)
        powered = tf.pow(n, -power)
        linear = slots[1] + (g + 2 * shrinkage * p) - (powered - tf.pow(slots[0], -power)) / rate * p
        return (tf.clip_by_value(linear, -l1, l1) - linear) / (powered / rate + 2 * l2), [n, linear]
