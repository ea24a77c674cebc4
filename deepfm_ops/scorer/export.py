"""A trained model to the scorer's file."""

import keras
import numpy as np

from deepfm_ops.features import columns_tensorflow as encoding
from deepfm_ops.features.columns import DenseFeat
from deepfm_ops.models.base import ConfiguredModel, fitting
from deepfm_ops.scorer import file
from deepfm_ops.scorer.content import TABLES
from deepfm_ops.scorer.rows import bfloat16, quantized
from deepfm_ops.scorer.scoring import ACTIVATIONS


def export_scorer(model, path, table="float32", *, features=None):
    """Writes the file of `deepfm_ops.scorer.Scorer`, replacing what is at `path` whole or not at all.

    Args:
        model: a DeepFM, over matrices or feature columns.
        path: of the file.
        table: how embeddings and first-order weights are kept. "float32"; "bfloat16": rounded to nearest; "int8":
            each row as K codes in 0..255 with a scale and an offset of its own, weights as bfloat16: 22 bytes for a
            row of 16 and its weight, instead of 68. The rows of the MLP's kernels are kept so too, or they would be
            most of a small model's file; they are float32 again once they are loaded.
        features: the FeatureDictionary of a model over matrices: the scorer then takes raw features too. None: the
            model's own, if it has one.

    Raises:
        TypeError: a model that is none of these.
        ValueError: an activation or a transform_fn that the scorer does not have, a dictionary that does not fit, or
            rows that int8 cannot hold.

    """
    if not isinstance(model, ConfiguredModel):
        raise TypeError(f"model must be a deepfm_ops.DeepFM, got {type(model).__name__}")
    model.show_averages()
    if table not in TABLES:
        raise ValueError(f"table must be one of {', '.join(TABLES)}, got {table!r}")
    features = getattr(model, "features", None) if features is None else fitting(model, features)
    plan, arrays = model.plan, {}
    known = isinstance(plan.activation, str) and plan.activation in ACTIVATIONS
    if plan.hidden and not known:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"the scorer has the activations {known}; this model has {plan.activation!r}")
    for number, (layer, norm) in enumerate(plan.hidden):
        kernel, bias = _folded(layer, norm)
        arrays |= {f"kernel_{number}": quantized(kernel) if table == "int8" else kernel, f"bias_{number}": bias}
    for name in ("linear_kernel", "deep"):
        if getattr(plan, name) is not None:
            arrays[name] = _kernel(getattr(plan, name))
    arrays["bias"] = _array(plan.head.bias)
    content = {
        "encoders": [_plain(columns) for columns in plan.encoders],
        "first_orders": [_table(part, arrays, table) for part in plan.first_orders],
        "lookups": [_table(part, arrays, table) for part in plan.lookups],
        "second_order": plan.second_order,
        "linear_dense": _names(plan.linear_dense),
        "deep_dense": _names(plan.deep_dense),
        "num_hidden": len(plan.hidden),
        "activation": plan.activation,
        "inputs": plan.inputs,
    }
    if plan.inputs is not None:
        inputs, kinds = "columns", {name: kind for name, (_, kind) in plan.inputs.items()}
    elif features is not None:
        inputs, kinds = "features", {field.name: field.kind for field in features.fields}
    else:
        inputs, kinds = "matrices", {}
    if "bfloat16" in kinds.values():
        raise ValueError("the scorer has no inputs of bfloat16; give the DenseFeat another dtype")
    matrix = plan.inputs is None
    info = {
        "task": plan.task,
        "table": table,
        "inputs": inputs,
        "kinds": kinds,
        "num_features": plan.tables[0].source.num_features if matrix else None,
        "num_columns": sum(plan.tables[0].field_sizes) if matrix else None,
    }
    manifest = {"info": info, "plan": content, "features": None}
    if features is not None:
        manifest["features"], vocabulary = features.state(texts=False)
        arrays |= {f"features_{name}": array for name, array in vocabulary.items()}
    file.write(path, manifest, arrays)


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
    configs = [encoding.column_to_config(encoding.encoding(column)) for column in columns]
    for config in configs:
        config.get("sparsefeat", config).pop("vocabulary_path", None)  # its content is in the vocabulary
    return configs


def _names(columns):
    for column in columns:
        _refuse_transform(column)
    return [column.name for column in columns]


def _refuse_transform(column):
    if isinstance(column, DenseFeat) and column.transform_fn is not None:
        raise ValueError(
            f"column {column.name!r} has a transform_fn, which the scorer cannot run: transform the column before it "
            "enters the model, or use export"
        )


def _table(part, arrays, kind):
    """The manifest of a table; its rows go to `arrays`."""
    rows, weights = getattr(part.source, "embeddings", None), part.source.w
    if rows is None:  # a first order alone is a table of one column
        rows, weights = weights, None
    name = part.source.name
    found = {"table": f"{name}_rows", "weights": None, "encoder": part.encoder, "spans": part.spans}
    found["field_sizes"] = part.field_sizes
    rows, weights = _array(rows), None if weights is None else _array(weights)
    if kind == "int8" and rows.shape[1] > 1:
        arrays[found["table"]] = quantized(rows, weights)
        return found
    narrow = (lambda x: x) if kind == "float32" else bfloat16
    arrays[found["table"]] = narrow(rows)
    if weights is not None:
        found["weights"] = f"{name}_weights"
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
