"""The feature dictionary in TensorFlow: `FeatureDictionary.transform` as a graph of standard operations."""

import math

import tensorflow as tf

from deepfm_ops import arguments
from deepfm_ops.features import cells


class DictionaryEncoder(tf.Module):
    """`FeatureDictionary.transform` in standard TensorFlow operations."""

    def __init__(self, features):
        super().__init__()
        self.features = features  # its lists stay its own: a Module wraps those that it is given
        self.specs, self.tables = [], []
        for field in features.fields:
            dtype, table = tf.float32, None
            if field["kind"] != "numeric":
                dtype, keys, indices = _keys(field, features.separator)
                if indices:
                    content = tf.lookup.KeyValueTensorInitializer(keys, tf.constant(indices, tf.int64))
                    table = tf.lookup.StaticHashTable(content, default_value=0)
            self.specs.append(tf.TensorSpec([None], dtype, field["name"]))
            self.tables.append(table)

    def __call__(self, inputs):
        indices, values = [], []
        for field, table in zip(self.features.fields, self.tables, strict=True):
            x = inputs[field["name"]]
            if field["kind"] != "numeric" and table is None:  # nothing was seen in it
                index = tf.zeros((tf.size(x), field["size"]), tf.int64)
                value = tf.zeros(tf.shape(index))
            elif field["kind"] == "multivalued":
                index, value = self._multivalued(field, table, x)
            elif field["kind"] == "numeric":
                x = self._usable(field["name"], x)
                known = tf.logical_not(tf.math.is_nan(x))
                index = tf.where(known, tf.constant(field["start"], tf.int64), 0)[:, tf.newaxis]
                value = tf.where(known, x, 0.0)[:, tf.newaxis]
            else:
                index = table.lookup(_bits(x))[:, tf.newaxis]
                value = tf.cast(index != 0, tf.float32)
            indices.append(index)
            values.append(value)
        return tf.concat(indices, 1), tf.concat(values, 1)

    def _usable(self, name, x):
        """The numbers, NaN where they are missing; see `cells.checked_numbers`."""
        if self.features.nonfinite == "missing":
            return tf.where(tf.abs(x) > cells.LARGEST, float("nan"), x)
        return arguments.usable(name, x, allow_missing=True)

    def _multivalued(self, field, table, x):
        size = field["size"]
        pieces = tf.strings.split(x, self.features.separator)
        found = tf.ragged.map_flat_values(table.lookup, pieces)
        known = tf.ragged.boolean_mask(found, (found != 0) & (pieces != ""))[:, :size]
        count = known.row_lengths()[:, tf.newaxis]
        present = tf.range(size, dtype=tf.int64) < count
        share = tf.cast(tf.math.divide_no_nan(tf.constant(1, tf.float64), tf.cast(count, tf.float64)), tf.float32)
        return known.to_tensor(shape=(None, size)), tf.where(present, share, 0.0)


def _keys(field, separator):
    """(dtype of the input, the values of a field as keys of a lookup table, their indices).

    Of numbers the input is int64 or float64, as they were in `fit`, where those can tell all of them apart.
    """
    known = [(text, index) for index, text in enumerate(field["values"], field["start"]) if text is not None]
    texts, indices = [text for text, _ in known], [index for _, index in known]
    if field["kind"] == "multivalued":
        for text in texts:
            if text.split(separator) != [text] or not text:
                name = field["name"]
                raise ValueError(
                    f"column {name!r} has the value {text!r}, which text separated by {separator!r} cannot hold"
                )
    elif field["dtype"] == "boolean":
        return tf.int64, tf.constant([int(text == "True") for text in texts], tf.int64), indices
    elif field["dtype"] == "integer" and all(-(2**63) <= int(text) < 2**63 for text in texts):
        return tf.int64, tf.constant(list(map(int, texts)), tf.int64), indices
    elif field["dtype"] == "fraction":
        numbers = list(map(float, texts))
        if len(set(numbers)) == len(numbers) and all(map(math.isfinite, numbers)):
            return tf.float64, _bits(tf.constant(numbers, tf.float64)), indices
    return tf.string, tf.constant(texts, tf.string), indices


def _bits(x):
    """Keys that a lookup table can have: of float64 the bits, -0 being 0."""
    return tf.bitcast(tf.where(x == 0, tf.zeros_like(x), x), tf.int64) if x.dtype == tf.float64 else x
