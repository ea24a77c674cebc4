"""More rows for the tables of a model: what `DeepFM.resize` does, to its weights and to whatever an optimizer keeps."""

import keras
import numpy as np
import tensorflow as tf

from deepfm_ops.combined import unscaled
from deepfm_ops.placement import beside


def fresh_rows(old, new):
    """Which indices of a dictionary are another's than they were, ascending, int64: those that it had, and those added.

    Args:
        old: FeatureDictionary, before updates.
        new: after them.

    Raises:
        ValueError: the new one does not come from the old one by `update` and `evict`.

    """
    before, after = old.vocabulary, new.vocabulary
    size = before.size
    alike = len(old.fields) == len(new.fields) and after.size >= size and after.generation >= before.generation
    # What categories come as may change with an update.
    alike = alike and all(
        {**vars(a), "dtype": None} == {**vars(b), "dtype": None} for a, b in zip(old.fields, new.fields, strict=True)
    )
    changed = alike and after.changed[:size] > before.generation
    if alike:  # a value that was evicted has no key until another gets its row
        same = (after.columns[:size] == before.columns) & (after.keys()[:size] == before.keys())
        alike = bool((same | changed).all())
    if not alike:
        raise ValueError(
            "features are not the model's after `update` or `evict`: they were fitted on their own, so every index "
            "would be another's; make another model of them"
        )
    return np.concatenate([np.flatnonzero(changed), np.arange(size, after.size)])


def grow(variable, rows, values):
    """Gives a weight other values at some rows, and as many rows as they need; the others keep theirs.

    Args:
        variable: keras.Variable [V, ...]; what it becomes is made where it lies.
        rows: int64 [n], ascending.
        values: [n, ...], or one value for all.

    """
    if not len(rows):
        return
    old = variable.value
    added = max(0, int(rows[-1]) + 1 - old.shape[0])
    with beside(variable):
        grown = tf.concat([old, tf.zeros((added, *old.shape[1:]), old.dtype)], 0)
        values = tf.broadcast_to(tf.cast(values, old.dtype), (len(rows), *old.shape[1:]))
        grown = tf.tensor_scatter_nd_update(grown, tf.constant(rows)[:, tf.newaxis], values)
        # Whoever holds the variable, a layer, a model, an optimizer, goes on holding it.
        variable._shape = tuple(grown.shape)
        variable._initialize(grown)


def grow_tables(optimizer, tables):
    """`grow` for tables, and for what an optimizer keeps of them, as a fresh one would.

    Args:
        optimizer: built, or None.
        tables: [(variable, rows int64 [n], ascending, its values there)].

    """
    optimizer = unscaled(optimizer)
    parts = [] if optimizer is None else getattr(optimizer, "_parts", (optimizer,))
    keys = [[part._var_key(variable) for variable in part._trainable_variables] for part in parts]
    for variable, rows, values in tables:
        for part in parts:
            if any(variable is other for other in part._trainable_variables):
                _grow_slots(part, variable, rows)
        grow(variable, rows, values)
    for part, before in zip(parts, keys, strict=True):  # it tells variables apart by what is inside them
        after = [part._var_key(variable) for variable in part._trainable_variables]
        part._trainable_variables_indices = {key: place for place, key in enumerate(after)}
        renamed = dict(zip(before, after, strict=True))
        for name in ("_exclude_from_weight_decay", "_exclude_from_weight_decay_cache"):
            known = getattr(part, name, None)
            if isinstance(known, set):
                setattr(part, name, {renamed.get(key, key) for key in known})
            elif known is not None:
                setattr(part, name, {})


def _grow_slots(optimizer, variable, rows):
    variables = optimizer._trainable_variables
    place = next(i for i, other in enumerate(variables) if other is variable)
    # What a fresh optimizer keeps of a row, of another one of the same arguments; every row has the same.
    row = keras.Variable(tf.zeros((1, *variable.shape[1:]), variable.dtype), name=variable.name, trainable=True)
    if hasattr(variable, "row_counts"):
        row.row_counts = lambda: None
    other = type(optimizer).from_config(optimizer.get_config())
    other.build([row])
    for name, slots in list(vars(optimizer).items()):
        if not isinstance(slots, list | tuple) or len(slots) != len(variables) or name == "_trainable_variables":
            continue
        slot = slots[place]
        if isinstance(slot, keras.Variable) and slot.shape.rank and slot.shape[0] == variable.shape[0]:
            grow(slot, rows, vars(other)[name][0].numpy())


def fresh_values(variable, initializer, rows, size):
    """What a fresh weight of so many rows has at some of them, [n, ...]."""
    whole = initializer((size, *variable.shape[1:]), dtype=variable.dtype)
    return tf.gather(whole, rows).numpy()
