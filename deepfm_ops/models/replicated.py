"""Batches for the replicas of a tf.distribute strategy, each of which takes a part of every batch, in their order.

TensorFlow would cut batches by itself, where it can find out how large they are, and leave the parts of a last batch to
chance. Here the parts of a batch of n samples are rows n*r//R to n*(r+1)//R of it, for the r-th of R replicas; some are
empty where there are fewer samples than replicas.
"""

import types

import keras
import numpy as np
import tensorflow as tf
from keras.src.trainers import data_adapters

from deepfm_ops.data.stream import Stream

AutoShardPolicy = tf.data.experimental.AutoShardPolicy


def is_multi_worker(strategy):
    """Whether the replicas are in several processes, each of which runs the same program."""
    kind = tf.distribute.MultiWorkerMirroredStrategy
    return isinstance(strategy, kind) and strategy.num_replicas_in_sync > len(strategy.extended.worker_devices)


class Batches(data_adapters.data_adapter.DataAdapter):
    """What Keras iterates over, as a data adapter of its own, for the replicas of a strategy.

    Args:
        strategy: tf.distribute.Strategy of several replicas.
        x, y, sample_weight, **options: as for Keras's `get_data_adapter`. Where there are several processes, arrays
            and a tf.data.Dataset are those of all processes, which have to be given the same, and a stream, a
            generator, a PyDataset, or a dataset with AutoShardPolicy.OFF, those of this process alone.

    Raises:
        ValueError: processes whose arrays or datasets have another number of batches.

    """

    def __init__(self, strategy, x, y=None, sample_weight=None, **options):
        self.strategy = strategy
        self._batches = data_adapters.get_data_adapter(x, y, sample_weight, **options)
        self._policy = AutoShardPolicy.DATA
        if isinstance(x, Stream | types.GeneratorType | keras.utils.PyDataset):
            self._policy = AutoShardPolicy.OFF
        elif isinstance(x, tf.data.Dataset):
            self._policy = x.options().experimental_distribute.auto_shard_policy
        self._dataset = self._batches.get_tf_dataset()
        self._is_own = is_multi_worker(strategy) and self._policy not in (AutoShardPolicy.AUTO, AutoShardPolicy.DATA)
        if is_multi_worker(strategy) and not self._is_own:
            the_same(strategy, "batches", self._batches.num_batches or 0)

    @property
    def element_spec(self):
        return self._dataset.element_spec

    def first_batch(self):
        return next(iter(self._dataset))

    def get_tf_dataset(self):
        if self._policy in (AutoShardPolicy.FILE, AutoShardPolicy.HINT):
            return self._dataset  # TensorFlow deals out the files
        return self.strategy.distribute_datasets_from_function(self._of_process)

    def _of_process(self, context):
        here = len(self.strategy.extended.worker_devices)
        if self._policy == AutoShardPolicy.OFF:
            return _cut(self._dataset, 0, here, here)
        return _cut(self._dataset, context.input_pipeline_id * here, here, context.num_replicas_in_sync)

    # Of one epoch as of the other.

    @property
    def num_batches(self):
        """0: not known, as what each process has of its own may end earlier or later."""
        return 0 if self._is_own else self._batches.num_batches

    @property
    def batch_size(self):
        return self._batches.batch_size

    @property
    def has_partial_batch(self):
        return None

    @property
    def partial_batch_size(self):
        return None

    def on_epoch_begin(self):
        self._batches.on_epoch_begin()

    def on_epoch_end(self):
        self._batches.on_epoch_end()


def _part(batch, number, count):
    """The rows of the number-th of so many parts."""
    size = tf.shape(tf.nest.flatten(batch)[0], tf.int64)[0]
    start, stop = size * number // count, size * (number + 1) // count
    return tf.nest.map_structure(lambda x: x[start:stop], batch)


@tf.autograph.experimental.do_not_convert
def _cut(dataset, first, number, count):
    """A dataset of `number` parts of each batch, one after the other from the first on, of `count`."""
    if number == count == 1:
        return dataset

    @tf.autograph.experimental.do_not_convert
    def parts(*batch):
        batch = batch if isinstance(dataset.element_spec, tuple) else batch[0]
        numbers = tf.data.Dataset.range(first, first + number)
        return numbers.map(tf.autograph.experimental.do_not_convert(lambda r: _part(batch, r, count)))

    cut, batches = dataset.flat_map(parts), dataset.cardinality()
    if batches >= 0:
        cut = cut.apply(tf.data.experimental.assert_cardinality(batches * number))
    return cut.prefetch(2 * number)


def dealt(strategy, batch):
    """A batch (x, y, ...) of all replicas, without what is None, as PerReplica values; those stay as they are."""
    batch = tuple(part for part in batch if part is not None) if isinstance(batch, tuple) else (batch,)
    if any(isinstance(x, tf.distribute.DistributedValues) for x in keras.tree.flatten(batch)):
        return batch
    batch = tf.nest.map_structure(tf.convert_to_tensor, batch)

    def of_replica(context):
        return _part(batch, context.replica_id_in_sync_group, context.num_replicas_in_sync)

    return strategy.experimental_distribute_values_from_function(of_replica)


def the_same(strategy, name, number):
    """Raises ValueError unless every process has the number."""
    numbers = gathered(strategy, number)
    if len(np.unique(numbers)) > 1:
        raise ValueError(
            f"every process must be given the same data, of which it takes its part, but they have "
            f"{', '.join(map(str, numbers))} {name}"
        )


def gathered(strategy, number):
    """[n], an int64 of every process."""
    numbers = strategy.run(lambda: tf.constant([number], tf.int64))
    return strategy.gather(numbers, axis=0).numpy()[:: len(strategy.extended.worker_devices)]
