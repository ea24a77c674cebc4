"""Steps that replicas take together, each with a part of every batch: those of one process, or of several.

Keras's own functions for a step fail for every model under MultiWorkerMirroredStrategy, and under MirroredStrategy with
several steps per execution, in Keras 3.15 still. Its loop over epochs and steps, with callbacks, validation and
progress bar, works with these in their place.
"""

import contextlib

import tensorflow as tf
from tensorflow.python.eager import context

from deepfm_ops.models.replicated import dealt, is_multi_worker


def function(model, step):
    """What Keras calls for the next steps.

    Args:
        model: made under a strategy of several replicas.
        step: its `train_step` or `test_step`.

    Returns:
        A function of an iterator over batches, which gives the logs of the last step: the mean over all replicas.
        It raises StopIteration where every process is at the end of its data, and the step is not taken.

    """
    strategy, steps = model.distribute_strategy, {}

    def replica_step(batch):
        logs = {name: tf.cast(value, tf.float32) for name, value in step(batch).items()}
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.MEAN, logs)

    def take(batch):
        logs = strategy.run(replica_step, args=(batch,))
        return {name: strategy.experimental_local_results(value)[0] for name, value in logs.items()}

    def taken(batch):
        if model.run_eagerly:
            return take(batch)
        # One trace for parts of any size: a process that traced again by itself would name its messages anew.
        parts = tf.nest.flatten(batch, expand_composites=True)
        kind = tuple((part.dtype, *part.shape[1:]) for part in parts)
        if kind not in steps:
            specs = [tf.TensorSpec((None, *part.shape[1:]), part.dtype) for part in parts]
            pack = lambda parts: tf.nest.pack_sequence_as(batch, parts, expand_composites=True)  # noqa: E731
            steps[kind] = tf.function(lambda *parts: take(pack(parts)), input_signature=specs, autograph=False)
        return steps[kind](*parts)

    def run(batches):
        batches, logs = iter(batches), None
        for _ in range(model.steps_per_execution):
            with _telling_the_others() if is_multi_worker(strategy) else contextlib.nullcontext():
                batch = next(batches, None)
                if batch is None:
                    break
                logs = taken(dealt(strategy, batch))
        if logs is None:
            raise StopIteration
        return logs

    return run


@contextlib.contextmanager
def _telling_the_others():
    """Inside, an error of this process is one of every process, which would wait for it otherwise."""
    try:
        yield
    except tf.errors.OpError as error:
        with contextlib.suppress(tf.errors.OpError):  # they know: it is one of theirs
            context.context().report_error_to_cluster(error.error_code, error.message[:1000])
        raise
