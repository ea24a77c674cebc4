"""Exponential averages of weights, at the cost of the rows that a step moves.

With d_t the decay of step t and D_t = d_1 * ... * d_t, the average a_t = d_t * a_(t-1) + (1 - d_t) * w_t is kept as
lag_t = (a_t - w_t) / D_t. A step that moves a weight by m does lag -= m / D_(t-1). Where a weight does not move, its
lag does not change either, so that rows without a gradient need no visit, and what is computed for the others is bit
for bit what a pass over the whole table would.
"""

import numpy as np
import tensorflow as tf

from deepfm_ops import arguments
from deepfm_ops.placement import beside

CHUNK = 1 << 16  # rows at a time
SMALLEST_DECAY = 2.0**-80  # of the decay so far, before lags are scaled down by it: float32 goes on to 2^-126


class Averaging:
    """Goes before a class of Keras's optimizers: what `use_ema` means for those of this package.

    While weights are trained they are the raw ones, the averages stand beside them. `show_averages` exchanges the two,
    which is how weights are evaluated, saved and exported, and `hide_averages` exchanges them back, which is how
    training goes on; weights that were set in between are where it goes on from.

    A class below may override `_moves_rows_only(gradient, variable)`, and then updates their lags itself by
    `_lag_of(variable)` and `_lag_scale`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.use_ema and not 0 < self.ema_momentum < 1:
            raise ValueError(f"ema_momentum must be above 0 and below 1, got {self.ema_momentum}")

    def build(self, variables):
        if self.built:
            return
        averaged, self.use_ema = self.use_ema, False  # Keras's own averages are rewritten whole at every step
        super().build(variables)
        self.use_ema = averaged
        if not averaged:
            return
        narrow = sorted({str(v.dtype) for v in variables} - {"float32", "float64"})
        if narrow:
            raise ValueError(f"averages (use_ema) need weights of float32 or float64, got {', '.join(narrow)}")
        self._lags = [self.add_variable_from_reference(v, name="lag") for v in variables]
        self._decay_so_far = self.add_variable((), "ones", "float64", name="decay_so_far")
        self._shown = self.add_variable((), "zeros", "int64", name="averages_shown")
        self._shown_as = self.add_variable((len(variables),), "zeros", "int64", name="averages_shown_as")

    def apply(self, grads, trainable_variables=None):
        if not self.use_ema or len(grads) == 0:
            super().apply(grads, trainable_variables)
            return
        variables = self._trainable_variables if trainable_variables is None else list(trainable_variables)
        if not self.built:
            self.build(variables)
        text = (
            "the weights are their averages now, which training would go on from: call optimizer.hide_averages() "
            "before a step of your own (averages_shown = {})"
        )
        with tf.control_dependencies(arguments.require(self._shown.value == 0, text, lambda: (self._shown.value,))):
            decay = tf.identity(self._decay_so_far.value)
        self._lag_scale = scale = 1 / decay  # of replicas of a strategy each has its own
        whole = [v for g, v in zip(grads, variables, strict=True) if g is not None and not self._moves_rows_only(g, v)]
        before = []
        for variable in whole:
            with beside(variable):
                before.append(tf.identity(variable.value))
        super().apply(grads, trainable_variables)
        for variable, old in zip(whole, before, strict=True):
            with beside(variable):
                move = tf.convert_to_tensor(variable.value) - old
                self._lag_of(variable).value.assign_sub(move * tf.cast(scale, move.dtype))
        step = tf.cast(self._iterations.value, tf.float64)  # the first is 1
        decay *= tf.minimum(tf.constant(self.ema_momentum, tf.float64), (1 + step) / (10 + step))
        tf.cond(decay < SMALLEST_DECAY, lambda: self._rescale(decay), lambda: self._keep(decay))
        if self.ema_overwrite_frequency:
            now = tf.equal(self._iterations.value % self.ema_overwrite_frequency, 0)
            tf.cond(now, self._go_on_from_averages, lambda: True)
        self._lag_scale = None  # a tensor of this step

    # What Keras does at every step.

    def _update_model_variables_moving_average(self, trainable_variables):
        pass

    def _overwrite_model_variables_with_average_value(self, trainable_variables):
        pass

    def _keep(self, decay):
        self._decay_so_far.assign(decay)
        return True

    def _rescale(self, decay):
        for lag in self._lags:
            lag.value.assign(lag.value * tf.cast(SMALLEST_DECAY, lag.value.dtype))  # a power of two: exact
        return self._keep(decay / SMALLEST_DECAY)

    def _go_on_from_averages(self):
        for variable, lag in zip(self._trainable_variables, self._lags, strict=True):
            variable.value.assign(variable.value + lag.value * tf.cast(self._decay_so_far.value, lag.value.dtype))
            lag.value.assign(tf.zeros_like(lag.value))
        return self._keep(tf.ones([], tf.float64))

    def _moves_rows_only(self, gradient, variable) -> bool:
        return False

    def _lag_of(self, variable):
        return self._lags[self._get_variable_index(variable)]

    @property
    def averages_are_shown(self):
        """Whether the weights are their averages now."""
        return bool(self.use_ema and self.built and self._shown.numpy())

    def show_averages(self):
        """Exchanges the weights for their averages, in one pass over them; nothing where there are none."""
        if not self.use_ema or not self.built or self.averages_are_shown:
            return
        decay = self._decay_so_far.numpy()
        shown = []
        for variable, lag in zip(self._trainable_variables, self._lags, strict=True):
            mark = Fingerprint()
            for read, write in _chunks(variable.value, lag.value):
                raw, late = read()
                average = raw + late * tf.cast(decay, late.dtype)
                write(average, raw)
                mark.add(average)
            shown.append(mark.total)
        self._shown_as.assign(shown)
        self._shown.assign(1)

    def hide_averages(self):
        """Exchanges averages that are shown for the raw weights again."""
        if not self.averages_are_shown:
            return
        marks = self._shown_as.numpy()
        for variable, lag, mark in zip(self._trainable_variables, self._lags, marks, strict=True):
            now = Fingerprint()
            for read, _ in _chunks(variable.value):
                now.add(*read())
            untouched = now.total == mark
            for read, write in _chunks(variable.value, lag.value):
                average, raw = read()
                if untouched:
                    write(raw, average - raw)
                else:  # set in the meantime: the average starts there too
                    write(average, tf.zeros_like(average))
        self._decay_so_far.assign(1.0)
        self._shown.assign(0)

    def finalize_variable_values(self, var_list):
        """At the end of Keras's `fit`: the averages are the weights from now on, unless they are shown already."""
        if self.use_ema and self.built and not self.averages_are_shown:
            self._go_on_from_averages()

    @property
    def _model_variables_moving_average(self):
        raise RuntimeError(  # Keras asks by hasattr, which would hide an AttributeError
            f"{type(self).__name__} keeps averages another way than Keras: show_averages() and hide_averages() "
            "exchange them, and a DeepFM's fit, evaluate and predict do so themselves, without SwapEMAWeights"
        )


def _chunks(*variables):
    """Functions (read, write) of some rows of all the variables at a time: tables are exchanged in place."""
    shape = variables[0].shape
    if shape.rank == 0 or shape[0] <= CHUNK:
        yield (
            lambda: [tf.identity(v) for v in variables],
            lambda *new: [v.assign(x) for v, x in zip(variables, new, strict=True)],
        )
        return
    for start in range(0, shape[0], CHUNK):
        rows = tf.range(start, min(start + CHUNK, shape[0]))
        yield (
            lambda rows=rows: [tf.gather(v, rows) for v in variables],
            lambda *new, rows=rows: [
                v.scatter_update(tf.IndexedSlices(x, rows)) for v, x in zip(variables, new, strict=True)
            ],
        )


class Fingerprint:
    """Tells other contents, another order too: the sums of each part's words, times odd numbers at random, modulo 2^64
    are the digits of one number.
    """

    BASE = 0x9E3779B97F4A7C15

    def __init__(self):
        self._digits = 1
        self._odd = np.zeros(0, np.uint64)

    def add(self, x):
        """Goes on with the elements of a tensor: in NumPy, whose product of vectors writes no products."""
        bits = np.asarray(x).reshape(-1)
        if bits.nbytes % 8:
            bits = np.append(bits, bits.dtype.type(0))
        words = bits.view(np.uint64)
        # Of the highest bit, the sign, a product with an odd number has that bit alone: two of them would add up to 0.
        words = words ^ (words >> np.uint64(29))
        if len(words) > len(self._odd):
            self._odd = np.random.PCG64(0).random_raw(len(words)) | np.uint64(1)  # the same in every version of NumPy
        digit = int(np.einsum("i,i", words, self._odd[: len(words)]))
        self._digits = (self._digits * self.BASE + digit) % (1 << 64)

    @property
    def total(self):
        return np.uint64(self._digits).astype(np.int64)
