"""A trained model to the scorer's file."""

import keras
import numpy as np

from deepfm_ops.container import Rows
from deepfm_ops.features import columns_tensorflow as encoding
from deepfm_ops.features.columns import DenseFeat
from deepfm_ops.models.base import ConfiguredModel, fitting
from deepfm_ops.scorer import file
from deepfm_ops.scorer.content import TABLES
from deepfm_ops.scorer.rows import quantized, stored
from deepfm_ops.scorer.scoring import ACTIVATIONS


def export_scorer(model, path, table="float32", *, features=None, shards=None):
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
        shards: how many files beside it hold the tables, row r in shard r % shards; they are called after `path`, and
            those of the file that was there are removed. None: the file holds them itself.

    Raises:
        TypeError: a model that is none of these.
        ValueError: an activation or a transform_fn, which the scorer does not have, a dictionary that does not fit,
            rows that int8 cannot hold, or a number of shards that cannot be.

    """
    if not isinstance(model, ConfiguredModel):
        raise TypeError(f"model must be a deepfm_ops.DeepFM, got {type(model).__name__}")
    model.show_averages()
    write_scorer(model, path, table, features, shards=shards)


def write_scorer(model, path, table="float32", features=None, rows=None, shards=None):
    """What `export_scorer` does, also for a model whose table no process holds.

    Args:
        model: a DeepFM; with `rows`, over matrices, and any number of rows.
        path: of the file.
        table: as for `export_scorer`.
        features: as for `export_scorer`.
        rows: {"embeddings": [V, K], "w": [V, 1]}, those of them that the model has, arrays or `container.Rows`, in
            place of the model's own. They are read once, or once for each shard, block by block.
        shards: as for `export_scorer`.

    Raises:
        ValueError: what `export_scorer` raises, or rows that are not those of such a model.

    """
    if shards is not None and not (type(shards) is int and 1 <= shards <= file.MOST_SHARDS):
        raise ValueError(f"shards must be None or an integer from 1 to {file.MOST_SHARDS:,}, got {shards!r}")
    num_features, sources = None, _sources(model.plan)
    if rows is not None:
        num_features, sources = _replaced(model.plan, sources, rows)
    manifest, arrays = described(model, table, features, num_features)
    sources = {
        name: [None if x is None else Rows.of(x if rows else _array(x)) for x in parts]
        for name, parts in sources.items()
    }

    def tables(index, count):
        found = {}
        for name, parts in sources.items():
            parts = [None if x is None else x.shard(index, count) for x in parts]
            found |= stored(name, *parts, table, index, count)
        return found

    if shards is None:
        file.write(path, manifest, arrays | tables(0, 1))
        return
    digests = []
    try:
        for index in range(shards):
            digests.append(file.write_shard(path, index, shards, tables(index, shards)))
        file.write(path, manifest, arrays, digests)
    except BaseException:
        file.discard_shards(path, shards, digests)
        raise


def write_main(model, path, digests, table="float32", features=None, num_features=None):
    """Writes the file whose shards are there, and makes it the one at `path`.

    Args:
        model: a DeepFM, of whose tables only names and widths are read.
        path: of the file.
        digests: what `file.write_shard` returned for each shard, by index, for the arrays that
            `rows.stored(part.source.name, ...)` made of each `part` of `model.plan.tables`.
        table: as for `export_scorer`, and as for `rows.stored`.
        features: as for `export_scorer`.
        num_features: V of a model over matrices, if its own table has another number of rows.

    """
    manifest, arrays = described(model, table, features, num_features)
    file.write(path, manifest, arrays, digests)


def described(model, table, features=None, num_features=None):
    """(manifest, arrays) of a model without its tables; the arguments are those of `write_main`."""
    if table not in TABLES:
        raise ValueError(f"table must be one of {', '.join(TABLES)}, got {table!r}")
    features = getattr(model, "features", None) if features is None else fitting(model, features, num_features)
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
    arrays |= {f"second_order_{number}": _kernel(layer) for number, layer in enumerate(plan.projections)}
    arrays |= {
        f"field_weights_{number}": _array(layer.field_weights) for number, layer in enumerate(plan.field_weights)
    }
    arrays["bias"] = _array(plan.head.bias)
    names = {name: stored(name, *parts, table) for name, parts in _sources(plan).items()}
    content = {
        "encoders": [_plain(columns) for columns in plan.encoders],
        "first_orders": [_table(part, names) for part in plan.first_orders],
        "lookups": [_table(part, names) for part in plan.lookups],
        "second_order": plan.second_order,
        "order": plan.order,
        "field_weights": bool(plan.field_weights),
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
    if matrix and num_features is None:
        num_features = plan.tables[0].source.num_features
    info = {
        "task": plan.task,
        "table": table,
        "inputs": inputs,
        "kinds": kinds,
        "num_features": num_features,
        "num_columns": sum(plan.tables[0].field_sizes) if matrix else None,
    }
    manifest = {"info": info, "plan": content, "features": None}
    if features is not None:
        manifest["features"], vocabulary = features.state(texts=False)
        arrays |= {f"features_{name}": array for name, array in vocabulary.items()}
    return manifest, arrays


def _replaced(plan, sources, rows):
    """(V, sources) with other rows, which must be of the widths that the model's own have."""
    if plan.inputs is not None:
        raise ValueError("rows are for a model over matrices, this one is of feature columns")
    ((name, own),) = sources.items()
    rows = {"embeddings": None, "w": None} | rows
    width = lambda x: None if x is None else x.shape[1]  # noqa: E731
    want = dict(zip(("embeddings", "w"), map(width, own), strict=True))
    got = {key: width(x) for key, x in rows.items()}
    if got != want:
        raise ValueError(f"rows must have the columns {want}, got {got}")
    (num_features, *others) = {x.shape[0] for x in rows.values() if x is not None}
    if others:
        raise ValueError(f"embeddings and w must have equally many rows, got {num_features} and {others[0]}")
    return num_features, {name: [rows["embeddings"], rows["w"]]}


def _sources(plan):
    """{name: (embeddings or None, first-order weights or None)} of the plan's tables, Keras's variables."""
    sources = [part.source for part in plan.tables]
    return {source.name: (getattr(source, "embeddings", None), source.w) for source in sources}


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


def _table(part, names):
    """The manifest of a table."""
    name = part.source.name
    weights = f"{name}_weights" if f"{name}_weights" in names[name] else None
    found = {"table": f"{name}_rows", "weights": weights, "encoder": part.encoder, "spans": part.spans}
    return found | {"field_sizes": part.field_sizes}


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
