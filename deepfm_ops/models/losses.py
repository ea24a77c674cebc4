"""The losses and metrics of a Keras model of one head or several, whose labels may be missing."""

import keras
import tensorflow as tf

from deepfm_ops import arguments, heads, replicas
from deepfm_ops.models import labels, recipe
from deepfm_ops.models.averaged import AveragedModel

MEANS = ("sum_over_batch_size", "mean")  # reductions of a loss over the samples of a batch


class HeadsModel(AveragedModel):
    """A model with a `plan`, whose task says what the labels and losses of its heads have to be."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Keras's loss; raises InvalidArgumentError for labels and sample weights that make it NaN.

        Of a dict of tasks, the loss of a head is that of the samples that have its label, and 0 where none has.
        """
        sample_weight = keras.tree.map_structure(_usable_weights, sample_weight)
        if isinstance(self.plan.task, dict):
            y, sample_weight = self._masked(y, sample_weight, training)
            # Keras counts a head's batches by adding a constant, which would also run where data that has no length
            # has come to its end.
            with tf.control_dependencies(list(y.values())):
                return super().compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)
        (y,) = self._by_head(y)
        if tf.is_tensor(y) and (y.dtype.is_floating or y.dtype.is_integer):
            ((head, rule),) = heads.rules(self.plan.task)
            y = _checked_labels(head, rule, y)
        loss = super().compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)
        if not training or replicas.others() is None or getattr(self.loss, "reduction", MEANS[0]) not in MEANS:
            return loss
        return self._of_all_samples(loss, tf.shape(y)[0])

    def _by_head(self, y):
        """[labels [B, 1] of each head]."""
        return [_as_column(part) for part in labels.by_head(self.plan.task, y)]

    def _weights(self, sample_weight):
        """{head: sample weights, or None} of a dict of tasks."""
        if sample_weight is None:
            return dict.fromkeys(self.plan.task)
        found = recipe.by_head("sample_weight", self.plan.task, sample_weight)
        missing = [name for name in self.plan.task if name not in found]
        if missing:
            raise ValueError(f"sample_weight has nothing for the head {missing[0]!r}: give ones, or one array for all")
        return found

    def _masked(self, y, sample_weight, training):
        """({head: labels}, {head: weights [B, 1]}): 0 where a label is missing, so that means are over those there."""
        found, weights, all_given = {}, {}, self._weights(sample_weight)
        for (head, rule), part in zip(heads.rules(self.plan.task), self._by_head(y), strict=True):
            part = tf.cast(part, tf.float32)
            is_there = tf.logical_not(rule.missing(part, tf.math.is_nan))
            found[head.name] = tf.where(is_there, _checked_labels(head, rule, part), 0)
            weight = tf.cast(is_there, tf.float32)
            if getattr(self.loss[head.name], "reduction", MEANS[0]) in MEANS:
                samples, there = tf.size(part), tf.math.count_nonzero(is_there)
                if training:
                    weight *= replicas.share(samples, replicas.total(there), weight.dtype)
                else:
                    weight *= tf.math.divide_no_nan(tf.cast(samples, weight.dtype), tf.cast(there, weight.dtype))
            given = all_given[head.name]
            weights[head.name] = weight if given is None else weight * tf.cast(tf.reshape(given, (-1, 1)), weight.dtype)
        return found, weights

    def _of_all_samples(self, loss, samples):
        """The loss of a replica with the gradient that makes the replicas' together that of the mean over a batch.

        What layers and regularizers add is no mean over samples.
        """
        share = replicas.share(samples, replicas.total(samples), loss.dtype)
        added = tf.add_n([tf.zeros([], loss.dtype), *map(self._aggregate_additional_loss, self.losses)])
        learned = share * (loss - added) + added
        return learned + tf.stop_gradient(loss - learned)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """Keras's metrics; of a dict of tasks, those of the samples that have the head's label."""
        found = self._by_head(y)
        if not isinstance(self.plan.task, dict):
            return super().compute_metrics(x, found[0], y_pred, sample_weight=sample_weight)
        there, weights, all_given = {}, {}, self._weights(sample_weight)
        for (head, rule), part in zip(heads.rules(self.plan.task), found, strict=True):
            rows = tf.where(~rule.missing(tf.cast(part, tf.float32), tf.math.is_nan)[:, 0])[:, 0]
            scores = y_pred[head.name] if isinstance(y_pred, dict) else y_pred
            there[head.name] = tf.gather(part, rows), tf.gather(scores, rows)
            given = all_given[head.name]
            weights[head.name] = None if given is None else tf.gather(given, rows)
        y, y_pred = ({name: pair[place] for name, pair in there.items()} for place in (0, 1))
        return super().compute_metrics(x, y, y_pred, sample_weight=None if sample_weight is None else weights)


def _usable_weights(weights):
    if tf.is_tensor(weights) and weights.dtype.is_floating:
        return arguments.usable("sample_weight", weights, what="argument")
    return weights


def _checked_labels(head, rule, y):
    """Labels, a tensor, once they are known to be ones a loss can use, or missing where they may be."""
    numbers = tf.cast(tf.reshape(y, [-1]), tf.float64)
    fine = rule.usable(numbers, tf.math.floor) | rule.missing(numbers, tf.math.is_nan)

    def shown():
        row = tf.argmin(tf.cast(fine, tf.int32))
        return row, tf.reshape(y, [-1])[row]

    with tf.control_dependencies(arguments.require(tf.reduce_all(fine), labels.bad(head, rule), shown)):
        return tf.identity(y)


def _as_column(y):
    """Labels [B], or of a rank that a retraced function has forgotten, as the scores are: [B, 1]."""
    return tf.reshape(y, (-1, 1)) if tf.is_tensor(y) and y.shape.rank != 2 else y
