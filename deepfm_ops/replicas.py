"""What a step knows of the other replicas that take it, under a strategy of tf.distribute.

Each replica has some of the samples of a batch, perhaps none. Keras divides what a replica adds to the loss by the
number of replicas and adds the gradients of all of them up, so that a loss is the mean over the replicas; with these
functions it is the mean over the batch, as that of one process.
"""

import tensorflow as tf

from deepfm_ops import reference


def others():
    """The context of a replica of several, or None: in one process, and where no step is taken."""
    context = tf.distribute.get_replica_context()
    return context if context is not None and context.num_replicas_in_sync > 1 else None


def total(samples):
    """The samples of all replicas together, int64, from those of this one."""
    samples, context = tf.cast(samples, tf.int64), others()
    return samples if context is None else context.all_reduce(tf.distribute.ReduceOp.SUM, samples)


def share(samples, total, dtype):
    """What a mean over this replica's samples is times, for the mean over replicas to be that over all samples."""
    context = others()
    replicas = 1 if context is None else context.num_replicas_in_sync
    return tf.math.divide_no_nan(tf.cast(samples, dtype) * replicas, tf.cast(total, dtype))


def silent_l2(tables, indices, strengths):
    """Zero, with the gradient of l2 on rows that replicas use, each once however many of them use it.

    Args:
        tables: variables [V, n].
        indices: int32 or int64 of any shape, of this replica.
        strengths: a number for each table.

    """
    context = others()
    unique = tf.unique(tf.reshape(indices, [-1])).y
    used = tf.sort(context.all_gather(unique, axis=0))
    users = tf.searchsorted(used, unique, side="right") - tf.searchsorted(used, unique, side="left")
    # The loss is divided by the number of replicas; of a row's penalty each user has its part.
    parts = context.num_replicas_in_sync / tf.cast(users, tf.float64)[:, tf.newaxis]
    return tf.add_n(
        [reference.silent_penalty(t, unique, 2 * s * parts) for t, s in zip(tables, strengths, strict=True)]
    )
