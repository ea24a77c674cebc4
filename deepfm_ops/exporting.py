"""A trained model on its way out: SavedModels, and the scorer's file."""

import contextlib
import dataclasses
import re

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.trackable import resource

from deepfm_ops import _library, _scorer_file, scorer
from deepfm_ops import columns as _columns
from deepfm_ops._narrow import bfloat16, quantized
from deepfm_ops._parts import ConfiguredModel
from deepfm_ops.features import DenseFeat

TABLES = ("float32", "bfloat16", "int8")


def export(model, path, portable=True, *, features=None):
    """Writes a SavedModel with one signature, "serving_default": named inputs of any batch size to "score" [B, 1].

    Args:
        model: a DeepFM, or any functional Keras model with this package's layers and one output.
        path: folder; what a SavedModel there holds is overwritten.
        portable: True: standard TensorFlow operations alone, so that it loads and serves where this package was
            never installed. False: with the native op; then `import deepfm_ops.ops` before loading it.
        features: the FeatureDictionary of a model over matrices. The encoding becomes part of the SavedModel, and its
            inputs are the dictionary's columns, [B] each: text or int64 for a categorical column, as its values in
            `fit` were (float64 where there were fractions); float32 for a numeric one, NaN where it is missing; text
            for a multivalued one, its values separated as in `fit`. A value that was not seen counts as missing.

    The inputs are otherwise the model's: `indices` and `values`, or those of the feature columns.

    Raises:
        TypeError, ValueError: a model or dictionary that cannot be exported; the text says why.
        RuntimeError: portable=False without the native op.

    """
    if not isinstance(model, keras.Model) or not model.built or not getattr(model, "inputs", None):
        raise TypeError(f"model must be a functional Keras model, got {type(model).__name__}")
    if len(model.outputs) != 1:
        raise ValueError(f"model must have one output, got {len(model.outputs)}")
    if dense := [x.name for x in model.inputs if getattr(x, "sparse", False) or getattr(x, "ragged", False)]:
        raise ValueError(f"inputs {dense} are ragged or sparse, which a signature here cannot have")
    native = None if portable else _library.native_ops()
    if native is None and not portable:
        raise RuntimeError(f"portable=False needs the native op: {_library.native_info()['reason']}")
    encoder = None if features is None else _DictionaryEncoder(_fitting(model, features))
    specs = (
        [tf.TensorSpec((None, *x.shape[1:]), x.dtype, x.name) for x in model.inputs]
        if encoder is None
        else encoder.specs
    )
    _check_names([spec.name for spec in specs])

    @tf.function(input_signature=[{spec.name: spec for spec in specs}])
    def score(inputs):
        if native is not None:  # the first operation that is not known is the one an error names
            native.import_deepfm_ops_dot_ops_before_loading_this_model()
        if encoder is not None:
            inputs = encoder(inputs)
        else:
            inputs = keras.tree.pack_sequence_as(model.input, [inputs[x.name] for x in model.inputs])
        return {"score": model(inputs, training=False)}

    with _library.portable() if portable else contextlib.nullcontext():
        signature = score.get_concrete_function()
    module = tf.Module()  # what the signature uses must hang on it
    module.parts = [variable.value for variable in model.variables], _resources(model), encoder
    tf.saved_model.save(module, str(path), signatures={"serving_default": signature})


def _fitting(model, features):
    """The dictionary, if the model's matrices are its."""
    shapes = [tuple(x.shape[1:]) for x in model.inputs]
    if not features.fields:
        raise ValueError("features must be fitted")
    if shapes != [(features.num_columns,)] * 2:
        raise ValueError(
            f"features have {features.num_columns} columns, but the inputs of the model have shapes {shapes}"
        )
    rows = model._config["num_features"] if isinstance(model, ConfiguredModel) else features.num_features
    if rows != features.num_features:
        raise ValueError(f"features number {features.num_features} features, but the model has {rows}")
    sizes = getattr(model, "_config", {}).get("field_sizes")
    if isinstance(model, ConfiguredModel) and (sizes or [1] * len(features.fields)) != features.field_sizes:
        raise ValueError(f"features have field_sizes {features.field_sizes}, but the model has {sizes}")
    return features


def _check_names(names):
    """Raises for names that TensorFlow would change or refuse."""
    seen = {}
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or name == "self":
            raise ValueError(
                f"input {name!r}: in a SavedModel a name is a letter, then letters, digits and _, and not 'self'; "
                "rename the column"
            )
        if seen.setdefault(name.lower(), name) != name:
            raise ValueError(
                f"inputs {seen[name.lower()]!r} and {name!r} differ in case alone, which a SavedModel cannot"
            )


def _resources(model):
    """The lookup tables of the model's layers, those of nested models too."""
    found = []
    for layer in model._flatten_layers():
        for value in vars(layer).values():
            parts = value.values() if isinstance(value, dict) else [value]
            found += [part for part in parts if isinstance(part, resource.CapturableResource)]
    return found


class _DictionaryEncoder(tf.Module):
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


def export_scorer(model, path, table="float32", *, features=None):
    """Writes the file of `deepfm_ops.scorer.Scorer`, replacing what is at `path` whole or not at all.

    Args:
        model: a DeepFM, over matrices or feature columns.
        path: of the file.
        table: how embeddings and first-order weights are kept. "float32"; "bfloat16": rounded to nearest; "int8":
            each row as K codes in 0..255 with a scale and an offset of its own, weights as bfloat16: 22 bytes for a
            row of 16 and its weight, instead of 68. The rows of the MLP's kernels are kept so too, or they would be
            most of a small model's file; they are float32 again once they are loaded.
        features: the FeatureDictionary of a model over matrices: the scorer then takes raw features too.

    Raises:
        TypeError: a model that is none of these.
        ValueError: an activation or a transform_fn that the scorer does not have, a dictionary that does not fit, or
            rows that int8 cannot hold.

    """
    if not isinstance(model, ConfiguredModel):
        raise TypeError(f"model must be a deepfm_ops.DeepFM, got {type(model).__name__}")
    if table not in TABLES:
        raise ValueError(f"table must be one of {', '.join(TABLES)}, got {table!r}")
    if features is not None:
        _fitting(model, features)
    layers = {layer.name: layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)}
    arrays, plan = {}, _used(dataclasses.asdict(model._plan), layers)
    plan["encoders"] = [_plain(layers[name].columns) for name in plan["encoders"]]
    plan["first_orders"] = [_table(layers, part, arrays, table) for part in plan["first_orders"]]
    plan["lookups"] = [_table(layers, part, arrays, table) for part in plan["lookups"]]
    plan["linear_dense"] = _dense(layers.get("linear_dense"))
    plan["deep_dense"] = _dense(layers.get("deep_dense"))
    if "linear_kernel" in layers:
        arrays["linear_kernel"] = _kernel(layers["linear_kernel"])
    plan["num_hidden"] = 0
    plan["activation"] = model._config.get("activation", model._config.get("dnn_activation"))
    while f"hidden_{plan['num_hidden']}" in layers:
        number = plan["num_hidden"]
        kernel, bias = _folded(layers[f"hidden_{number}"], layers.get(f"batch_norm_{number}"))
        arrays |= {f"kernel_{number}": quantized(kernel) if table == "int8" else kernel, f"bias_{number}": bias}
        plan["num_hidden"] += 1
    known = isinstance(plan["activation"], str) and plan["activation"] in scorer.ACTIVATIONS
    if plan["num_hidden"] and not known:
        known = ", ".join(scorer.ACTIVATIONS)
        raise ValueError(f"the scorer has the activations {known}; this model has {plan['activation']!r}")
    if "deep" in layers:
        arrays["deep"] = _kernel(layers["deep"])
    arrays["bias"] = _array(layers["head"].bias)
    specs = getattr(model, "_input_specs", None)  # of a model of feature columns
    plan["inputs"] = specs
    if specs is not None:
        inputs, kinds = "columns", {name: kind for name, (_, kind) in specs.items()}
    elif features is not None:
        inputs, kinds = "features", {field["name"]: field["kind"] for field in features.fields}
    else:
        inputs, kinds = "matrices", {}
    if "bfloat16" in kinds.values():
        raise ValueError("the scorer has no inputs of bfloat16; give the DenseFeat another dtype")
    info = {
        "task": model._config["task"],
        "table": table,
        "inputs": inputs,
        "kinds": kinds,
        "num_features": model._config.get("num_features"),
        "num_columns": None if inputs == "columns" else int(model.inputs[0].shape[1]),
    }
    manifest = {"info": info, "plan": plan, "features": None if features is None else features.to_config()}
    _scorer_file.write(path, manifest, arrays)


def _used(plan, layers):
    """The plan without what Keras left out of the model because nothing uses it."""
    lookups = [number for number, part in enumerate(plan["lookups"]) if part["layer"] in layers]
    second_order = []
    for group in plan["second_order"]:
        pairs = [(lookups.index(table), field) for table, field in group] if isinstance(group, list) else None
        second_order.append(lookups.index(group) if pairs is None else pairs)
    parts = [*plan["first_orders"], *(plan["lookups"][number] for number in lookups)]
    encoders = sorted({part["encoder"] for part in parts} - {None})
    for part in parts:
        part["encoder"] = None if part["encoder"] is None else encoders.index(part["encoder"])
    return {
        "first_orders": plan["first_orders"],
        "lookups": [plan["lookups"][number] for number in lookups],
        "second_order": second_order,
        "encoders": [f"encode_{number}" for number in encoders],
    }


def _array(variable):
    return keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32"))


def _kernel(layer):
    if getattr(layer, "quantization_mode", None) is not None:
        raise ValueError(f"layer {layer.name!r} was quantized by Keras ({layer.quantization_mode}); export it before")
    return _array(layer.kernel)


def _plain(columns):
    """Columns as JSON-ready dicts, with what their encoding needs alone."""
    for column in columns:
        _refuse_transform(column)
    configs = [_columns.column_to_config(_columns.encoding(column)) for column in columns]
    for config in configs:
        config.get("sparsefeat", config).pop("vocabulary_path", None)  # its content is in the vocabulary
    return configs


def _dense(layer):
    """The names of the columns of a `DenseColumns`."""
    columns = [] if layer is None else layer.columns
    for column in columns:
        _refuse_transform(column)
    return [column.name for column in columns]


def _refuse_transform(column):
    if isinstance(column, DenseFeat) and column.transform_fn is not None:
        raise ValueError(
            f"column {column.name!r} has a transform_fn, which the scorer cannot run: transform the column before it "
            "enters the model, or use export"
        )


def _table(layers, part, arrays, kind):
    """The plan of a table for the scorer; its rows go to `arrays`."""
    layer = layers[part["layer"]]
    weights = getattr(layer, "w", None)
    rows = layer.embeddings if hasattr(layer, "embeddings") else None
    if rows is None:  # a first order alone is a table of one column
        rows, weights = weights, None
    name = f"{part['layer']}_rows"
    found = {"table": name, "weights": None, "encoder": part["encoder"], "spans": part["spans"]}
    found["field_sizes"] = list(layer.field_sizes)
    rows, weights = _array(rows), None if weights is None else _array(weights)
    if kind == "int8" and rows.shape[1] > 1:
        arrays[name] = quantized(rows, weights)
        return found
    narrow = (lambda x: x) if kind == "float32" else bfloat16
    arrays[name] = narrow(rows)
    if weights is not None:
        found["weights"] = f"{part['layer']}_weights"
        arrays[found["weights"]] = narrow(weights)
    return found


def _folded(layer, norm):
    """(kernel, bias) of a dense layer and the normalization behind it."""
    kernel, bias = _kernel(layer), _array(layer.bias)
    if norm is None:
        return kernel, bias
    gamma, beta, mean, variance = (
        np.float64(_array(x)) for x in (norm.gamma, norm.beta, norm.moving_mean, norm.moving_variance)
    )
    scale = gamma / np.sqrt(variance + norm.epsilon)
    return (kernel * scale).astype(np.float32), ((bias - mean) * scale + beta).astype(np.float32)
