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
            dtype, table = (tf.float32 if field.kind == "numeric" else tf.string), None
            if field.transform in ("quantiles", "standardize"):  # float32 would be on another side of a boundary
                dtype = tf.float64
            if field.has_values:
                dtype, keys, indices = _keys(field, features.vocabulary, features.separator)
                if len(indices):
                    content = tf.lookup.KeyValueTensorInitializer(keys, tf.constant(indices, tf.int64))
                    table = tf.lookup.StaticHashTable(content, default_value=field.unseen)
            self.specs.append(tf.TensorSpec([None], dtype, field.name))
            self.tables.append(table)

    def __call__(self, inputs):
        indices, values = [], []
        for field, table in zip(self.features.fields, self.tables, strict=True):
            x = inputs[field.name]
            if field.kind == "multivalued":
                index, value = self._multivalued(field, table, x)
            elif field.kind == "numeric":
                index, value = self._numeric(field, x)
            else:
                index = self._index(field, table, x)[:, tf.newaxis]
                value = tf.cast(index != 0, tf.float32)
            indices.append(index)
            values.append(value)
        return tf.concat(indices, 1), tf.concat(values, 1)

    def _index(self, field, table, x):
        """The indices of values; 0 of what is missing: NaN, and empty text unless it is a value."""
        if field.buckets is not None:
            found = tf.strings.to_hash_bucket_fast(x, field.buckets) + field.start
        elif table is None:  # nothing was seen in it
            found = tf.fill(tf.shape(x), tf.constant(field.unseen, tf.int64))
        else:
            found = table.lookup(_bits(x))
        if x.dtype == tf.string and (field.buckets is not None or field.unseen):
            is_value = field.buckets is None and self.features.vocabulary.id(field.number, "")
            return found if is_value else tf.where(x == "", tf.constant(0, tf.int64), found)
        return tf.where(tf.math.is_nan(x), tf.constant(0, tf.int64), found) if x.dtype.is_floating else found

    def _numeric(self, field, x):
        x = self._usable(field.name, x)
        known = tf.logical_not(tf.math.is_nan(x))
        start = tf.constant(field.start, tf.int64)
        if field.transform == "quantiles":
            bucket = tf.searchsorted(tf.constant(field.boundaries, tf.float64), tf.cast(x, tf.float64), side="right")
            index, value = start + tf.cast(bucket, tf.int64), tf.ones_like(x, tf.float32)
        else:
            index, value = tf.fill(tf.shape(x), start), x
        if field.transform == "log1p":
            value = tf.sign(x) * tf.math.log1p(tf.abs(x))
        elif field.transform == "standardize":
            value = tf.cast((x - field.mean) / field.deviation, tf.float32)
        return tf.where(known, index, 0)[:, tf.newaxis], tf.where(known, value, 0.0)[:, tf.newaxis]

    def _usable(self, name, x):
        """The numbers, NaN where they are missing; see `cells.checked_numbers`."""
        if self.features.nonfinite == "missing":
            return tf.where(tf.abs(x) > cells.LARGEST, float("nan"), x)
        return arguments.usable(name, x, allow_missing=True)

    def _multivalued(self, field, table, x):
        size, separator = field.size, self.features.separator
        pieces = tf.strings.split(x, separator)
        pieces = tf.ragged.boolean_mask(pieces, pieces != "")
        weights = None
        if field.weighted:
            weight = tf.strings.regex_replace(pieces.flat_values, "^(?s:.*):([^:]*)$", r"\1")
            has_weight = tf.strings.regex_full_match(pieces.flat_values, "(?s:.*):[^:]*")
            weights = pieces.with_flat_values(tf.strings.to_number(tf.where(has_weight, weight, "1"), tf.float32))
            pieces = pieces.with_flat_values(tf.strings.regex_replace(pieces.flat_values, ":[^:]*$", ""))
            named = pieces != ""
            pieces, weights = tf.ragged.boolean_mask(pieces, named), tf.ragged.boolean_mask(weights, named)
        if field.max_length is not None:
            pieces = pieces[:, : field.max_length]
            weights = None if weights is None else weights[:, : field.max_length]
        found = tf.ragged.map_flat_values(lambda flat: self._index(field, table, flat), pieces)
        is_known = found != 0
        known = tf.ragged.boolean_mask(found, is_known)[:, :size]
        if weights is not None:
            weights = tf.ragged.boolean_mask(weights, is_known)[:, :size]
            return known.to_tensor(shape=(None, size)), weights.to_tensor(shape=(None, size))
        count = known.row_lengths()[:, tf.newaxis]
        present = tf.range(size, dtype=tf.int64) < count
        share = tf.cast(tf.math.divide_no_nan(tf.constant(1, tf.float64), tf.cast(count, tf.float64)), tf.float32)
        return known.to_tensor(shape=(None, size)), tf.where(present, share, 0.0)


def _keys(field, vocabulary, separator):
    """(dtype of the input, the values of a field as keys of a lookup table, their indices).

    Of numbers the input is int64 or float64, as they were in `fit`, where those can tell all of them apart.
    """
    texts, indices = vocabulary.values(field.number)
    if field.kind == "multivalued":
        for text in texts:
            if text.split(separator) != [text] or not text:
                raise ValueError(
                    f"column {field.name!r} has the value {text!r}, which text separated by {separator!r} cannot hold"
                )
    elif field.dtype == "boolean":
        return tf.int64, tf.constant([int(text == "True") for text in texts], tf.int64), indices
    elif field.dtype == "integer" and all(cells.is_integer(text) and -(2**63) <= int(text) < 2**63 for text in texts):
        return tf.int64, tf.constant(list(map(int, texts)), tf.int64), indices
    elif field.dtype == "fraction":
        numbers = list(map(float, texts))
        if len(set(numbers)) == len(numbers) and all(map(math.isfinite, numbers)):
            return tf.float64, _bits(tf.constant(numbers, tf.float64)), indices
    return tf.string, tf.constant(texts, tf.string), indices


def _bits(x):
    """Keys that a lookup table can have: of float64 the bits, -0 being 0."""
    return tf.bitcast(tf.where(x == 0, tf.zeros_like(x), x), tf.int64) if x.dtype == tf.float64 else x
