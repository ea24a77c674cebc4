"""The feature dictionary in TensorFlow: `FeatureDictionary.transform` as a graph of standard operations."""

import tensorflow as tf


class DictionaryEncoder(tf.Module):
    """`FeatureDictionary.transform` in standard TensorFlow operations."""

    def __init__(self, features):
        super().__init__()
        self.features = features  # its lists stay its own: a Module wraps those that it is given
        self.specs, self.tables = [], []
        for field in features.fields:
            dtype, table = tf.float32, None
            if field["kind"] != "numeric":
                dtype, keys = _keys(field, features.separator)
                if field["values"]:
                    values = tf.range(field["start"], field["start"] + len(field["values"]), dtype=tf.int64)
                    content = tf.lookup.KeyValueTensorInitializer(keys, values)
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
                known = tf.logical_not(tf.math.is_nan(x))
                index = tf.where(known, tf.constant(field["start"], tf.int64), 0)[:, tf.newaxis]
                value = tf.where(known, x, 0.0)[:, tf.newaxis]
            else:
                index = table.lookup(_bits(x))[:, tf.newaxis]
                value = tf.cast(index != 0, tf.float32)
            indices.append(index)
            values.append(value)
        return tf.concat(indices, 1), tf.concat(values, 1)

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
    """(dtype of the input, the values of a categorical or multivalued field as keys of a lookup table)."""
    values, name = field["values"], field["name"]
    kinds = {{str: "text", float: "fraction"}.get(type(value), "integer") for value in values}
    if "text" in kinds and len(kinds) > 1:
        raise ValueError(f"column {name!r} holds text and numbers, which one input of a SavedModel cannot")
    if field["kind"] == "multivalued":
        texts = [str(value) for value in values]
        for text in texts:
            if text.split(separator) != [text] or not text:
                raise ValueError(
                    f"column {name!r} has the value {text!r}, which text separated by {separator!r} cannot hold"
                )
        return tf.string, tf.constant(texts, tf.string)
    if kinds <= {"text"}:
        return tf.string, tf.constant(values, tf.string)
    if "fraction" in kinds:
        try:
            numbers = [float(value) for value in values]
        except OverflowError:
            numbers = []
        if len(set(numbers)) != len(values):
            raise ValueError(f"column {name!r} holds numbers that float64 cannot tell apart, or hold")
        return tf.float64, _bits(tf.constant(numbers, tf.float64))
    if any(not -(2**63) <= value < 2**63 for value in values):
        raise ValueError(f"column {name!r} holds integers of more than 64 bits")
    return tf.int64, tf.constant([int(value) for value in values], tf.int64)


def _bits(x):
    """Keys that a lookup table can have: of float64 the bits, -0 being 0."""
    return tf.bitcast(tf.where(x == 0, tf.zeros_like(x), x), tf.int64) if x.dtype == tf.float64 else x
