"""A fresh order of the samples in every epoch of `fit` on arrays.

Keras (3.15) shuffles arrays in a tf.data map whose seed, once a global one is set, is the same in every iteration: all
epochs then have one order. Here the order of an epoch is a permutation from (seed, epoch), which a checkpoint can go on
with.
"""

import time

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.data.ops import batch_op, from_tensor_slices_op, prefetch_op


class EpochOrder:
    """Batches of arrays in another order every epoch, without a copy of the arrays.

    Args:
        arrays: what `arrays_of` gave.
        batch_size: samples of a batch, the last one of an epoch may have fewer; None: as Keras has it.
        steps_per_epoch: or None.
        shuffle: False: in their own order.

    Attributes:
        seed, epoch: what an order follows from.

    """

    def __init__(self, arrays, batch_size, steps_per_epoch=None, shuffle=True):
        self.seed = int(tf.random.uniform((), 0, np.iinfo(np.int32).max, tf.int32))  # follows from the global seed
        self.epoch = 0
        self._shuffle = shuffle
        self._nest, self._arrays = arrays, keras.tree.flatten(arrays)
        self._length = len(self._arrays[0])
        self._batch_size = batch_size or (-(-self._length // steps_per_epoch) if steps_per_epoch else 32)

    def __len__(self):
        return self._length

    def order(self):
        """The rows of the epoch in their order, int64 [n]."""
        if not self._shuffle:
            return np.arange(self._length)
        return np.random.default_rng((self.seed, self.epoch)).permutation(self._length)

    def take(self, rows):
        """The arrays of some rows, one behind the other."""
        taken = [np.take(array, rows, axis=0) for array in self._arrays]
        return [x.astype(_dtype(x).as_numpy_dtype, copy=False) for x in taken]

    def dataset(self):
        """As a tf.data.Dataset, which shuffles whenever an iteration begins."""
        dtypes = [_dtype(array) for array in self._arrays]

        @tf.autograph.experimental.do_not_convert
        def batches(_):  # of an iteration, which has its order for itself: others may have begun
            order = tf.ensure_shape(tf.numpy_function(self.order, [], tf.int64), (None,))

            @tf.autograph.experimental.do_not_convert
            def batch(start):
                parts = tf.numpy_function(self.take, [order[start : start + self._batch_size]], dtypes)
                for part, array in zip(parts, self._arrays, strict=True):
                    part.set_shape((None, *array.shape[1:]))
                return keras.tree.pack_sequence_as(self._nest, parts)

            return tf.data.Dataset.range(0, self._length, self._batch_size).map(batch)

        number = -(-self._length // self._batch_size)
        dataset = tf.data.Dataset.range(1).flat_map(batches).apply(tf.data.experimental.assert_cardinality(number))
        options = tf.data.Options()
        options.autotune.enabled = False  # there is nothing to tune
        options.experimental_optimization.apply_default_optimizations = False
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
        return dataset.with_options(options).prefetch(2)


def cut(dataset):
    """Of `from_tensor_slices(...).batch(...)`, with or without `prefetch`, the same batches, cut from the tensors.

    TensorFlow makes such a batch row by row, which costs an FM a third of its step. Other datasets are as they are.
    """
    batched = dataset
    while isinstance(batched, prefetch_op._PrefetchDataset):
        batched = batched._input_dataset
    source = batched._input_dataset if isinstance(batched, batch_op._BatchDataset) else None
    if not isinstance(source, from_tensor_slices_op._TensorSliceDataset):
        return dataset
    specs, tensors = tf.nest.flatten(dataset.element_spec), source._tensors
    if not all(isinstance(spec, tf.TensorSpec) for spec in specs):
        return dataset
    length, size = tensors[0].shape[0], int(batched._batch_size)
    if bool(batched._drop_remainder):
        length -= length % size

    @tf.autograph.experimental.do_not_convert
    def batch(start):
        rows, parts = tf.minimum(start + size, length) - start, []
        for tensor, spec in zip(tensors, specs, strict=True):
            rest = spec.shape.rank - 1
            parts.append(tf.slice(tensor, [start, *[0] * rest], [rows, *[-1] * rest]))
            parts[-1].set_shape(spec.shape)
        return tf.nest.pack_sequence_as(dataset.element_spec, parts)

    return tf.data.Dataset.range(0, length, size).map(batch).with_options(dataset.options()).prefetch(2)


def _dtype(array):
    """What an array is in a batch: Keras makes floats of another width its own, and text is text."""
    if array.dtype.kind in "OSU":
        return tf.string
    return tf.as_dtype(keras.config.floatx()) if array.dtype.kind == "f" else tf.as_dtype(array.dtype)


def arrays_of(x, y, sample_weight):
    """(x, y, sample_weight), without those that are None, as NumPy arrays of one length; None if they are no arrays."""
    nest = _with_tuples(keras.utils.pack_x_y_sample_weight(x, y, sample_weight))
    leaves = keras.tree.flatten(nest)
    strange = (tf.RaggedTensor, tf.SparseTensor, tf.data.Dataset, keras.utils.PyDataset)
    if not leaves or any(isinstance(leaf, strange) or not hasattr(leaf, "__array__") for leaf in leaves):
        return None
    arrays = [np.asarray(leaf) for leaf in leaves]
    if not all(array.ndim and len(array) == len(arrays[0]) for array in arrays) or not len(arrays[0]):
        return None  # Keras has an error for them
    return keras.tree.pack_sequence_as(nest, arrays)


def _with_tuples(nest):
    """The nest with tuples for its lists, which tf.data takes for tensors."""
    if isinstance(nest, dict):
        return {key: _with_tuples(part) for key, part in nest.items()}
    return tuple(map(_with_tuples, nest)) if isinstance(nest, list | tuple) else nest


def split(arrays, validation_split):
    """Arrays to train on and those to validate on, the last ones, as Keras splits them."""
    length = len(keras.tree.flatten(arrays)[0])
    at = int(length * (1.0 - validation_split))
    if not 0 < at < length:
        raise ValueError(f"validation_split = {validation_split} leaves one of the two parts of {length} samples empty")

    def last(x):  # as Keras takes it: text is a tensor
        return tf.constant(x[at:]) if _dtype(x) == tf.string else x[at:]

    return keras.tree.map_structure(lambda x: x[:at], arrays), keras.tree.map_structure(last, arrays)


def with_first(callbacks, first):
    """The callbacks, a list, a single one, None or Keras's CallbackList, with one before them."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks.callbacks.insert(0, first)
        first.set_model(callbacks.model)
        return callbacks
    return [first, *keras.tree.flatten(callbacks or [])]


def callback_list(model, callbacks, verbose, epochs, steps=None):
    """Keras's list of callbacks, whose bar has no length if `steps` is None."""
    options = {"add_history": True, "add_progbar": verbose != 0, "verbose": verbose, "epochs": epochs, "steps": steps}
    return keras.callbacks.CallbackList(callbacks, model=model, **options)


class EpochCallback(keras.callbacks.Callback):
    """What a model's `fit` does around each epoch, before the other callbacks do."""

    def __init__(self, order=None):
        super().__init__()
        self.order = order

    def on_epoch_begin(self, epoch, logs=None):
        self._next = epoch + 1
        if self.order is not None:
            self.order.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.order is not None:
            self.order.epoch = self._next  # of what begins from now on: a strategy reads ahead at once

    def on_epoch_end(self, epoch, logs=None):
        self.model.show_averages()


class StreamCallback(EpochCallback):
    """Moves a stream's position with the training, and shows rows and rows per second in Keras's bar."""

    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    def on_epoch_begin(self, epoch, logs=None):
        self.stream.is_at_end = False
        self._batches, self._start = 0, time.perf_counter()
        self._rows, self._done = 0, self.stream.rows

    def on_train_batch_end(self, batch, logs=None):
        self._rows += self.stream.trained(batch + 1 - self._batches)
        self._batches = batch + 1
        if logs is not None:
            logs["rows"] = self._done + self._rows
            logs["rows_per_second"] = self._rows / (time.perf_counter() - self._start)
