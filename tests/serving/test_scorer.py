"""The scorer: its scores are the model's, its files are whole or refused, and it needs no TensorFlow."""

import concurrent.futures
import json
import os
import pathlib
import re
import zipfile

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from testing import run_python

import deepfm_ops
from deepfm_ops import (
    DeepFM,
    DenseFeat,
    FeatureDictionary,
    SparseFeat,
    VarLenSparseFeat,
    files,
    scorer,
)
from deepfm_ops.scorer import file as scorer_file
from deepfm_ops.scorer import rows as scorer_rows
from deepfm_ops.scorer.export import TABLES

pytest.importorskip("deepfm_ops.kernels", reason="a pure-Python install has no kernels")
Scorer, ScorerFileError = scorer.Scorer, scorer.ScorerFileError
KINDS = {
    "LR": {"use_fm": False, "use_deep": False},
    "FM": {"use_deep": False},
    "DNN": {"use_linear": False, "use_fm": False},
    "DeepFM": {},
    "batch_norm": {"batch_norm": True, "dropout": 0.5},
    "regression": {"task": "regression"},
    "no linear": {"use_linear": False, "use_deep": False},
    "penalized": {"l2_embedding": 1e-3, "l2_linear": 1e-3},
}


def shuffled(model, rng):
    """The model with weights that are nowhere zero or one."""
    for weight in model.weights:
        if weight.dtype in ("float32", "bfloat16", "float16"):
            noise = rng.normal(size=weight.shape) * (0.3 if len(weight.shape) > 1 else 0.1)
            weight.assign(np.abs(noise) + 0.5 if "variance" in weight.path else noise)
    return model


def matrices(rng, rows, columns, batch=33):
    return rng.integers(0, rows, (batch, columns)), rng.normal(size=(batch, columns)).astype("f")


def scored(model, path, inputs, table="float32", **options):
    deepfm_ops.export_scorer(model, path, table, **options)
    return Scorer.load(path).score(*inputs) if isinstance(inputs, tuple) else Scorer.load(path).score(inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field_sizes", [None, [1, 3, 1]], ids=["fields", "pooled"])
def test_scores_of_a_matrix_model(kind, field_sizes, rng, tmp_path):
    fields = 5 if field_sizes is None else 3
    model = shuffled(DeepFM(60, fields, 7, (9, 4), field_sizes=field_sizes, **KINDS[kind]), rng)
    inputs = matrices(rng, 60, 5)
    expected = np.ravel(model(inputs))
    got = scored(model, tmp_path / "m", inputs)
    assert got.dtype == np.float32 and got.shape == (33,)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    few = scored(model, tmp_path / "m", (inputs[0][:0], inputs[1][:0]))
    assert few.shape == (0,)
    np.testing.assert_allclose(Scorer.load(tmp_path / "m", threads=2).score(*inputs), got, rtol=0, atol=1e-6)


@pytest.mark.parametrize("activation", list(scorer.ACTIVATIONS))
def test_activations(activation, rng, tmp_path):
    model = shuffled(DeepFM(20, 3, 4, (6, 5), activation=activation, task="regression"), rng)
    inputs = matrices(rng, 20, 3)
    inputs[1][:4] *= 100
    expected = np.ravel(model(inputs))
    np.testing.assert_allclose(scored(model, tmp_path / "m", inputs), expected, rtol=1e-5, atol=1e-5)


def test_values_of_one_and_dtypes_of_inputs(rng, tmp_path):
    model = shuffled(DeepFM(20, 3, 4, (6,)), rng)
    indices, _ = matrices(rng, 20, 3)
    expected = np.ravel(model((indices, np.ones((33, 3), "f"))))
    deepfm_ops.export_scorer(model, tmp_path / "m")
    loaded = Scorer.load(tmp_path / "m")
    for i in (
        indices,
        indices.astype(np.int32),
        indices.astype(np.uint8),
        indices.tolist(),
        np.asfortranarray(indices),
    ):
        for x in (
            None,
            np.ones((33, 3)),
            np.ones((33, 3), np.int64),
            np.ones((33, 3), bool),
            np.ones((33, 3)).tolist(),
        ):
            np.testing.assert_allclose(loaded.score(i, x), expected, rtol=0, atol=1e-6)


def test_extreme_logits(tmp_path):
    model = DeepFM(4, 1, 2, use_fm=False, use_deep=False)
    model.get_layer("first_order").w.assign([[-1e30], [-80], [80], [1e30]])
    with np.errstate(all="raise"):
        got = scored(model, tmp_path / "m", (np.arange(4)[:, np.newaxis],))
    np.testing.assert_allclose(got, [0, np.exp(-80.0), 1, 1], rtol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "float64"])
def test_other_precisions(policy, rng, tmp_path):
    model = shuffled(DeepFM(20, 3, 4, (6,), dtype=policy), rng)
    inputs = matrices(rng, 20, 3)
    bound = 1e-5 if policy == "float64" else 0.03  # the model itself computes in fewer bits
    expected = np.ravel(model(inputs)).astype("f")
    np.testing.assert_allclose(scored(model, tmp_path / "m", inputs), expected, rtol=0, atol=bound)


# Narrow tables.


def test_bfloat16_rounds_to_nearest(rng, tmp_path):
    x = np.concatenate(
        [rng.normal(size=1000), [0, -0.0, 1e-40, 3e38, np.inf, -np.inf, 1 + 2**-8, 1 + 3 * 2**-8]]
    ).astype("f")
    np.testing.assert_array_equal(scorer_rows.bfloat16(x), tf.bitcast(tf.cast(x, tf.bfloat16), tf.uint16).numpy())
    assert np.isnan(tf.bitcast(scorer_rows.bfloat16(np.float32([np.nan])), tf.bfloat16).numpy().astype("f"))
    model = shuffled(DeepFM(40, 3, 5, (6,)), rng)
    inputs = matrices(rng, 40, 3)
    exact = scored(model, tmp_path / "m", inputs)
    for name in ("embeddings", "w"):
        variable = getattr(model.get_layer("fm"), name)
        variable.assign(tf.cast(tf.cast(variable.value, tf.bfloat16), tf.float32))
    rounded = scored(model, tmp_path / "m", inputs)
    assert np.abs(rounded - exact).max() > 1e-5
    np.testing.assert_allclose(scored(model, tmp_path / "b", inputs, "bfloat16"), rounded, rtol=0, atol=1e-6)


def decoded(rows):
    """(float rows, weights) of quantized ones."""
    header = (rows[:, :6].copy().view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return header[:, 1:2] + header[:, :1] * rows[:, 6:].astype("f"), header[:, 2:]


def test_int8_rows(rng):
    rows = (rng.normal(size=(3000, 16)) * 10.0 ** rng.integers(-8, 8, (3000, 1))).astype("f")
    rows[0], rows[1], rows[2] = 0, 3.3, np.arange(16) == 5
    rows[3] += 1e6
    weights = rng.normal(size=(3000, 1)).astype("f")
    got, got_weights = decoded(scorer_rows.quantized(rows, weights))
    spread = rows.max(1) - rows.min(1)
    # Half a step, of a scale and an offset that are rounded outward to 8 bits.
    bound = (spread * (1 + 2**-6) + np.abs(rows.min(1)) * 2**-7) / 510 * 1.02 + 1e-30
    assert (np.abs(got - rows).max(1) <= bound + 1e-6 * np.abs(rows).max(1)).all()
    np.testing.assert_array_equal(got[0], 0)
    np.testing.assert_allclose(got_weights, weights, rtol=2**-8)
    rows[1233] = -3.4e38
    with pytest.raises(ValueError, match="row 1233 of a table is too large for int8"):
        scorer_rows.quantized(rows)
    for bad in (np.nan, np.inf):
        rows[1234, 5] = bad
        with pytest.raises(ValueError, match="row 1234 of a table holds NaN or infinity"):
            scorer_rows.quantized(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_int8_scores_are_those_of_its_rows(kind, rng, tmp_path):
    model = shuffled(DeepFM(60, 5, 7, (9, 4), **KINDS[kind]), rng)
    inputs = matrices(rng, 60, 5)
    got = scored(model, tmp_path / "m", inputs, "int8")
    layer = model.layers[2]
    if hasattr(layer, "embeddings"):
        w = None if layer.w is None else layer.w.numpy()
        rows, weights = decoded(scorer_rows.quantized(layer.embeddings.numpy(), w))
        layer.embeddings.assign(rows)
        if w is not None:
            layer.w.assign(weights)
    else:
        layer.w.assign(tf.cast(tf.cast(layer.w.value, tf.bfloat16), tf.float32))
    for layer in model.layers:
        if layer.name.startswith("hidden_") and not KINDS[kind].get("batch_norm"):
            layer.kernel.assign(decoded(scorer_rows.quantized(layer.kernel.numpy()))[0])
    # The kernels of a batch norm's model are rounded after it was folded into them.
    bound = 0.05 if KINDS[kind].get("batch_norm") else 1e-5
    np.testing.assert_allclose(got, np.ravel(model(inputs)), rtol=1e-5, atol=bound)


@pytest.mark.parametrize("kind", ["FM", "DeepFM"])
def test_int8_file_is_small(kind, tmp_path):
    model = DeepFM(100_000, 39, 16, **KINDS[kind])
    sizes = {}
    for table in TABLES:
        deepfm_ops.export_scorer(model, tmp_path / table, table)
        sizes[table] = (tmp_path / table).stat().st_size
    assert sizes["int8"] <= 0.35 * sizes["float32"] and sizes["bfloat16"] <= 0.64 * sizes["float32"]


# Ragged inputs.


def test_samples_of_any_length(rng, tmp_path):
    for kind in ("LR", "FM", "no linear"):
        model = shuffled(DeepFM(60, 5, 7, **KINDS[kind]), rng)
        deepfm_ops.export_scorer(model, tmp_path / "m")
        loaded = Scorer.load(tmp_path / "m")
        indices, values = matrices(rng, 60, 5)
        lengths = rng.integers(0, 6, 33)
        present = np.arange(5) < lengths[:, np.newaxis]
        splits = np.concatenate([[0], np.cumsum(lengths)])
        expected = loaded.score(indices, np.where(present, values, 0))
        got = loaded.score(indices[present], values[present], row_splits=splits)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        none = loaded.score([], [], row_splits=[0, 0, 0])
        np.testing.assert_allclose(none, loaded.score([[0] * 5] * 2, [[0] * 5] * 2), atol=1e-6)
        got = loaded.score(indices[present], row_splits=splits.tolist())
        np.testing.assert_allclose(got, loaded.score(indices, present.astype("f")), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("table", TABLES)
def test_bags_of_any_length(kind, table, rng, tmp_path):
    model = shuffled(DeepFM(60, 3, 7, (5,), field_sizes=[1, 3, 2], **KINDS[kind]), rng)
    deepfm_ops.export_scorer(model, tmp_path / "m", table)
    loaded = Scorer.load(tmp_path / "m")
    indices, values = matrices(rng, 60, 6)
    sizes = [1, 3, 2]
    starts = np.repeat([0, 1, 4], sizes)
    lengths = np.stack([rng.integers(0, size + 1, 33) for size in sizes], axis=1)
    present = np.arange(6) - starts < np.repeat(lengths, sizes, axis=1)
    splits = np.concatenate([[0], np.cumsum(lengths.ravel())])
    expected = loaded.score(indices, np.where(present, values, 0))
    got = loaded.score(indices[present], values[present], bag_splits=splits)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


# Wrong inputs.


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([[0, 1]],), {}, ValueError, r"indices must have shape \[B, 3\], got \(1, 2\)"),
        (([0, 1, 2],), {}, ValueError, r"indices must have shape \[B, 3\], got \(3,\)"),
        (([[0.0, 1, 2]],), {}, TypeError, "indices must be integers, got dtype float64"),
        (([["a", "b", "c"]],), {}, TypeError, "indices must be integers"),
        (([[0, 1, 20]],), {}, IndexError, r"indices\[0,2\] = 20 is not in \[0, 20\)"),
        (([[0, 1, -1]],), {}, IndexError, r"indices\[0,2\] = -1 is not in"),
        (([[0, 1, 2]], [[1, 2]]), {}, ValueError, r"values must have the shape of indices, \(1, 3\), got \(1, 2\)"),
        (([[0, 1, 2]], [["x", "y", "z"]]), {}, TypeError, "values must be numbers"),
        (({"a": [1]},), {}, ValueError, "this model was exported without its FeatureDictionary"),
        (({"a": [1]}, [1.0]), {}, ValueError, "raw features come alone"),
        (([0, 1],), {"row_splits": [0, 2]}, ValueError, "row_splits need a model without a deep part"),
        (([0, 1],), {"bag_splits": [0, 2]}, ValueError, r"bag_splits must have B \* 3 \+ 1 entries, got shape \(2,\)"),
        (([0, 1],), {"bag_splits": [0, 2, 1, 2]}, ValueError, "row_splits must not decrease"),
        (([0, 1],), {"bag_splits": [0, 1, 1, 9]}, ValueError, "row_splits must end at nnz = 2"),
        (([0, 1],), {"bag_splits": [0, 1, 1, 2], "row_splits": [0]}, ValueError, "exclude each other"),
        (([0, 1],), {"bag_splits": [0, 0.5, 1, 2]}, TypeError, "splits must be integers, got dtype float64"),
    ],
)
def test_inputs_that_are_refused(arguments, options, error, message, tmp_path):
    deepfm_ops.export_scorer(DeepFM(20, 3, 4, (6,)), tmp_path / "m")
    with pytest.raises(error, match=message):
        Scorer.load(tmp_path / "m").score(*arguments, **options)


def test_models_that_are_refused(tmp_path):
    path = tmp_path / "m"
    with pytest.raises(TypeError, match="model must be a deepfm_ops.DeepFM, got Sequential"):
        deepfm_ops.export_scorer(keras.Sequential([keras.layers.Dense(1)]), path)
    with pytest.raises(ValueError, match="table must be one of float32, bfloat16, int8, got 'int4'"):
        deepfm_ops.export_scorer(DeepFM(20, 3, 4, (6,)), path, "int4")
    with pytest.raises(ValueError, match="the scorer has the activations .*; this model has 'gelu'"):
        deepfm_ops.export_scorer(DeepFM(20, 3, 4, (6,), activation="gelu"), path)
    with pytest.raises(ValueError, match="the scorer has the activations"):
        deepfm_ops.export_scorer(DeepFM(20, 3, 4, (6,), activation=keras.layers.LeakyReLU(0.3)), path)
    quantized = DeepFM(20, 3, 4, (6,))
    quantized.quantize("int8")
    with pytest.raises(ValueError, match="layer 'hidden_0' was quantized by Keras"):
        deepfm_ops.export_scorer(quantized, path)
    named = FeatureDictionary().fit({("a", 1): ["x", "y"]}, categorical=[("a", 1)])
    with pytest.raises(ValueError, match=r"column \('a', 1\): a name must be text to be saved"):
        deepfm_ops.export_scorer(DeepFM(3, 1, 4, (6,)), path, features=named)
    with pytest.raises(ValueError, match="the scorer has no inputs of bfloat16"):
        half = DenseFeat("age", dtype="bfloat16")
        deepfm_ops.export_scorer(DeepFM.from_columns([half], [half]), path)
    fitted = FeatureDictionary().fit({"a": ["x", "y"]}, categorical=["a"])
    with pytest.raises(ValueError, match="features have 1 columns, but the inputs of the model have shapes"):
        deepfm_ops.export_scorer(DeepFM(3, 3, 4, (6,)), path, features=fitted)
    with pytest.raises(ValueError, match="features number 3 features, but the model has 4"):
        deepfm_ops.export_scorer(DeepFM(4, 1, 4, (6,)), path, features=fitted)
    with pytest.raises(ValueError, match="features must be fitted"):
        deepfm_ops.export_scorer(DeepFM(4, 1, 4, (6,)), path, features=FeatureDictionary())
    square = DenseFeat("age", transform_fn=lambda x: x * x)
    for linear, dnn in (([square], [SparseFeat("a", 3)]), ([], [square])):
        with pytest.raises(ValueError, match="column 'age' has a transform_fn, which the scorer cannot run"):
            deepfm_ops.export_scorer(DeepFM.from_columns(linear, dnn), path)
    assert not list(tmp_path.iterdir())


# Raw features.


def test_a_feature_dictionary_inside(rng, tmp_path):
    df = pd.DataFrame(
        {"user": ["ann", "bob", None, "cid"], "age": [0.3, np.nan, -2, 0.5], "tags": ["a|b", "b", "", "c|a|b"]}
    )
    features = FeatureDictionary().fit(df, categorical=["user"], numeric=["age"], multivalued=["tags"])
    model = DeepFM(features.num_features, 3, 4, (6,), field_sizes=features.field_sizes)
    shuffled(model, rng)
    deepfm_ops.export_scorer(model, tmp_path / "m", features=features)
    loaded = Scorer.load(tmp_path / "m")
    expected = model.predict(features.transform(df), verbose=0).ravel()
    np.testing.assert_allclose(loaded.score(df), expected, atol=1e-6)
    np.testing.assert_allclose(loaded.score(df.to_dict("list")), expected, atol=1e-6)
    np.testing.assert_allclose(loaded.score(*features.transform(df)), expected, atol=1e-6)
    assert loaded.info["inputs"] == "features" and list(loaded.info["kinds"]) == ["user", "age", "tags"]
    unseen = {"user": ["dan", 3], "age": [None, 1], "tags": [["z", "a"], []]}
    np.testing.assert_allclose(
        loaded.score(unseen), model.predict(features.transform(unseen), verbose=0).ravel(), atol=1e-6
    )
    with pytest.raises(KeyError, match="column 'age' is missing"):
        loaded.score({"user": ["ann"], "tags": ["a"]})
    with pytest.raises(TypeError, match="column 'age' must hold numbers"):
        loaded.score({"user": ["ann"], "age": ["old"], "tags": ["a"]})


COLUMNS = {
    "plain": [SparseFeat("user", 50, 4), SparseFeat("item", 30, 4), DenseFeat("age", 2)],
    "hashed": [
        SparseFeat("city", 17, 4, use_hash=True, dtype="string"),
        SparseFeat("user", 50, 4, use_hash=True),
        VarLenSparseFeat(SparseFeat("words", 12, 4, use_hash=True, dtype="string"), 3),
    ],
    "vocabulary": [
        SparseFeat("city", 5, 4, dtype="string", vocabulary={"Rome": 1, "Ölo": 2}),
        SparseFeat("user", 50, 4, vocabulary={"3": 7}),
    ],
    "sequences": [
        VarLenSparseFeat(SparseFeat("genres", 20, 4), 3, combiner=combiner, **more)
        for combiner, more in (("mean", {}),)
    ]
    + [
        VarLenSparseFeat(SparseFeat("seen", 30, 4), 4, combiner="sum", length_name="seen_length"),
        VarLenSparseFeat(SparseFeat("rated", 30, 4), 4, "mean", weight_name="ratings"),
        VarLenSparseFeat(SparseFeat("liked", 30, 4), 4, "sum", "liked_length", "likes", False),
    ],
    "max": [
        VarLenSparseFeat(SparseFeat("genres", 20, 4), 3, combiner="max"),
        VarLenSparseFeat(SparseFeat("seen", 30, 4), 4, combiner="max", length_name="seen_length"),
        SparseFeat("user", 50, 4),
        DenseFeat("age", 2, embedding_dim=4),
    ],
    "groups": [
        SparseFeat("user", 50, 4, group_name="a"),
        SparseFeat("item", 30, 4, group_name="a", trainable=False),
        SparseFeat("city_id", 9, 6, group_name="b"),
        SparseFeat("shop", 30, 6, group_name="b", embedding_name="other"),
        DenseFeat("age", 2),
    ],
}


def raw(rng, batch=41):
    def text(choices):
        return np.array([choices[i] for i in rng.integers(0, len(choices), batch)], object)

    cities = ["Rome", "Ölo", "", "a city with a name of more than thirty-two bytes", "x" * 70, "0", "Bern"]
    return {
        "user": rng.integers(0, 50, batch),
        "item": rng.integers(0, 30, (batch, 1)),
        "shop": rng.integers(0, 30, batch),
        "city_id": rng.integers(0, 9, batch),
        "city": text(cities),
        "words": np.stack([text(["sun", "rain", "", "0", "naïve"]) for _ in range(3)], axis=1),
        "age": rng.normal(size=(batch, 2)),
        "genres": rng.integers(0, 20, (batch, 3)) * (rng.random((batch, 3)) < 0.6),
        "seen": rng.integers(0, 30, (batch, 4)),
        "seen_length": rng.integers(0, 6, batch),
        "rated": rng.integers(0, 30, (batch, 4)) * (rng.random((batch, 4)) < 0.6),
        "ratings": rng.normal(size=(batch, 4)),
        "liked": rng.integers(0, 30, (batch, 4)),
        "liked_length": rng.integers(0, 6, (batch, 1)),
        "likes": rng.normal(size=(batch, 4, 1)),
    }


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("linear", ["same", "fewer", "none"])
def test_scores_of_a_column_model(kind, linear, rng, tmp_path):
    columns, inputs = COLUMNS[kind], raw(rng)
    groups = sorted({getattr(column, "group_name", "") for column in columns if not isinstance(column, DenseFeat)})
    first = {"same": columns, "fewer": columns[:2], "none": []}[linear]
    model = DeepFM.from_columns(first, columns, fm_group=groups, dnn_hidden_units=(6, 5), dnn_use_bn=kind == "max")
    shuffled(model, rng)
    expected = np.ravel(model(inputs))
    assert expected.std() > 1e-3
    np.testing.assert_allclose(scored(model, tmp_path / "m", inputs), expected, rtol=0, atol=1e-5)
    assert np.abs(scored(model, tmp_path / "b", inputs, "bfloat16") - expected).max() < 0.1
    assert np.abs(scored(model, tmp_path / "i", inputs, "int8") - expected).max() < 0.2
    loaded = Scorer.load(tmp_path / "m")
    np.testing.assert_array_equal(loaded.score({k: list(v) for k, v in inputs.items()}), loaded.score(inputs))
    assert loaded.score({name: x[:0] for name, x in inputs.items()}).shape == (0,)


def test_column_inputs_that_are_refused(rng, tmp_path):
    columns = [SparseFeat("user", 50, 4), DenseFeat("age", 2), SparseFeat("city", 9, 4, use_hash=True, dtype="string")]
    deepfm_ops.export_scorer(DeepFM.from_columns(columns, columns), tmp_path / "m")
    score, good = Scorer.load(tmp_path / "m").score, {"user": [1], "age": [[1, 2]], "city": ["Rome"]}
    assert score(good).shape == (1,)
    for change, error, message in [
        ({"user": [50]}, IndexError, r"column user: index in row 0 = 50 is not in \[0, 50\)"),
        ({"user": [1.5]}, TypeError, "input 'user' must hold integers"),
        ({"user": ["x"]}, TypeError, "input 'user' must hold numbers, got dtype"),
        ({"user": [2**63]}, TypeError, "input 'user' must hold integers of at most 64 bits"),
        ({"user": [1e300]}, TypeError, "input 'user' must hold integers of at most 64 bits"),
        ({"user": 1}, ValueError, "input 'user' must be a list or an array"),
        ({"user": [1, 2]}, ValueError, "inputs must be equally long"),
        ({"age": [[1]]}, ValueError, r"input 'age' must have shape \('B', 2\), got \(1, 1\)"),
        ({"age": [["a", "b"]]}, TypeError, "input 'age' must hold numbers"),
        (
            {"user": [1, 2], "age": [[1, 2], [3]], "city": ["a", "b"]},
            ValueError,
            "input 'age' must hold equally long lists",
        ),
        (
            {"user": [1, 2], "age": [[1, 2]] * 2, "city": ["a", ["b"]]},
            ValueError,
            "input 'city' must hold equally long",
        ),
    ]:
        with pytest.raises(error, match=message):
            score({**good, **change})
    with pytest.raises(KeyError, match=r"inputs are missing \['city'\]"):
        score({"user": [1], "age": [[1, 2]]})
    with pytest.raises(ValueError, match="this model takes raw inputs: a dict of"):
        score(np.array([[1]]))


@pytest.mark.parametrize(
    "cities",
    [
        ["Rome", float("nan"), "Oslo"],
        [1, 2.5],
        [1, float("nan")],
        [True, 7],
        ["a\0", "b"],
        [None, b"Rome", np.str_("Rome"), np.float32("nan")],
        pd.Series([1, None, 3], dtype="Int64"),
        pd.Series(["Rome", None], dtype="category"),
        np.array(["Rome", "Oslo"]),
    ],
    ids=str,
)
def test_text_is_that_of_the_model(cities, rng, tmp_path):
    """Whatever the cells are, the scorer writes them out as the model does."""
    columns = [SparseFeat("city", 50, 4, use_hash=True, dtype="string"), SparseFeat("user", 5, 4)]
    model = shuffled(DeepFM.from_columns(columns, columns, dnn_hidden_units=(6,)), rng)
    inputs = {"city": cities, "user": np.arange(len(cities))}
    got = scored(model, tmp_path / "m", inputs)
    np.testing.assert_allclose(got, np.ravel(model(inputs)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32"])
def test_dense_columns_of_other_dtypes(dtype, rng, tmp_path):
    columns = [DenseFeat("age", 2, dtype=dtype), SparseFeat("user", 5, 4)]
    model = shuffled(DeepFM.from_columns(columns, columns, dnn_hidden_units=(6,), task="regression"), rng)
    ages = rng.normal(size=(9, 2)) * 1000
    inputs = {"age": ages.round() if dtype == "int32" else ages, "user": np.arange(9) % 5}
    got = scored(model, tmp_path / "m", inputs)
    np.testing.assert_allclose(got, np.ravel(model(inputs)), rtol=1e-5, atol=1e-4)
    if dtype == "int32":
        with pytest.raises(TypeError, match="input 'age' must hold integers"):
            Scorer.load(tmp_path / "m").score({**inputs, "age": ages})


@pytest.mark.parametrize(
    ("dnn", "options"),
    [
        ([VarLenSparseFeat(SparseFeat("x", 5), 3, "max")], {}),
        ([SparseFeat("x", 5, group_name="a"), SparseFeat("y", 5, group_name="b")], {"fm_group": ["a", "b"]}),
        ([SparseFeat("x", 5), SparseFeat("y", 5), SparseFeat("z", 5, 8, group_name="b")], {}),
        ([SparseFeat("deep", 5), SparseFeat("hidden_0", 5), DenseFeat("deep_dense"), DenseFeat("linear_kernel")], {}),
    ],
    ids=["max", "groups", "outside", "names"],
)
def test_parts_that_nothing_uses_and_columns_named_like_layers(dnn, options, rng, tmp_path):
    model = shuffled(DeepFM.from_columns([SparseFeat("u", 5)], dnn, use_deep=False, **options), rng)
    inputs = {"u": rng.integers(0, 5, 20)}
    for column in dnn:
        inputs[column.name] = rng.integers(0, 5, (20, getattr(column, "maxlen", 1)))
    expected = np.ravel(model(inputs))
    np.testing.assert_allclose(scored(model, tmp_path / "m", inputs), expected, rtol=0, atol=1e-5)


# The file.


@pytest.fixture
def small_file(tmp_path):
    path = tmp_path / "model.scorer"
    deepfm_ops.export_scorer(DeepFM(20, 3, 4, (6,), seed=1), path)
    return path


def test_every_changed_byte_is_seen(small_file):
    content = small_file.read_bytes()
    for place in range(len(content)):
        small_file.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
        with pytest.raises(ScorerFileError, match="is damaged|not a scorer file|is of format"):
            Scorer.load(small_file)
    small_file.write_bytes(content)
    Scorer.load(small_file)


def test_truncated_and_foreign_files(small_file, tmp_path):
    content = small_file.read_bytes()
    for size in [1, 4, 29, 100, len(content) // 2, len(content) - 90, len(content) - 1]:
        small_file.write_bytes(content[:size])
        with pytest.raises(ScorerFileError, match="is damaged: it was cut off|not a scorer file"):
            Scorer.load(small_file)
    small_file.write_bytes(b"")
    with pytest.raises(ScorerFileError, match="is empty"):
        Scorer.load(small_file)
    small_file.write_bytes(content + b"x")
    with pytest.raises(ScorerFileError, match="is damaged"):
        Scorer.load(small_file)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("hello.txt", "hello")
    (tmp_path / "text").write_text("user,item\n" * 100)
    for other in ("other.zip", "text"):
        with pytest.raises(ScorerFileError, match="is not a scorer file; deepfm_ops.export_scorer writes them"):
            Scorer.load(tmp_path / other)
    with pytest.raises(FileNotFoundError):
        Scorer.load(tmp_path / "nowhere")


def test_a_newer_format(small_file, monkeypatch):
    manifest, arrays, _ = scorer_file.read(small_file)
    with monkeypatch.context() as patch:
        patch.setattr(scorer_file, "FORMAT", 7)
        scorer_file.write(small_file, manifest, arrays)
    with pytest.raises(ScorerFileError, match="is of format 7, this version of deepfm_ops reads 5: upgrade deepfm_ops"):
        Scorer.load(small_file)


def test_a_whole_file_of_another_writer(small_file):
    manifest, arrays, _ = scorer_file.read(small_file)
    for wrong in ({}, {**manifest, "plan": {}}, {**manifest, "features": {"format": 99}}):
        scorer_file.write(small_file, wrong, arrays)
        with pytest.raises(ScorerFileError, match="does not hold a model"):
            Scorer.load(small_file)


def test_the_file_is_a_zip_of_aligned_arrays(small_file):
    with zipfile.ZipFile(small_file) as archive:
        assert archive.testzip() is None
        assert json.loads(archive.read("manifest.json"))["info"]["table"] == "float32"
    arrays = np.load(small_file)
    assert arrays["fm_rows"].shape == (20, 4) and arrays["kernel_0"].shape == (12, 6)
    for array in scorer_file.read(small_file)[1].values():
        assert array.ctypes.data % 64 == 0 and not array.flags.writeable


def test_large_files_are_checksummed_in_pieces(tmp_path, monkeypatch, rng):
    monkeypatch.setattr(scorer_file, "_PIECE", 1000)
    array = rng.normal(size=(100, 13))
    scorer_file.write(tmp_path / "f", {}, {"a": array, "none": np.zeros((0, 3), "f")})
    _, arrays, _ = scorer_file.read(tmp_path / "f")
    np.testing.assert_array_equal(arrays["a"], array)
    assert arrays["none"].shape == (0, 3)


def test_a_file_keeps_its_mode_and_a_link_stays_a_link(small_file):
    small_file.chmod(0o640)
    link = small_file.with_name("current")
    link.symlink_to(small_file)
    deepfm_ops.export_scorer(DeepFM(20, 3, 4, (6,)), link)
    assert link.is_symlink() and small_file.stat().st_mode & 0o777 == 0o640
    umask = os.umask(0o077)
    try:
        deepfm_ops.export_scorer(DeepFM(20, 3, 4, (6,)), small_file.with_name("private"))
    finally:
        os.umask(umask)
    assert small_file.with_name("private").stat().st_mode & 0o777 == 0o600


def test_a_write_that_fails_leaves_the_old_file(small_file, monkeypatch):
    before = small_file.read_bytes()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        deepfm_ops.export_scorer(DeepFM(20, 3, 4, (6,)), small_file)
    assert small_file.read_bytes() == before and list(small_file.parent.iterdir()) == [small_file]


def test_the_table_is_mapped_and_shared(small_file):
    Scorer.load(small_file)
    loaded = Scorer.load(small_file)
    here = [line for line in pathlib.Path("/proc/self/maps").read_text().splitlines() if str(small_file) in line]
    assert here and all(" r--s " in line for line in here)
    rows = loaded._model.lookups[0].table
    start, end = (int(x, 16) for x in re.match(r"(\w+)-(\w+) ", here[-1]).groups())
    spans = [tuple(int(x, 16) for x in re.match(r"(\w+)-(\w+) ", line).groups()) for line in here]
    assert any(start <= rows.ctypes.data < end for start, end in spans)


# Reload and threads.


def constant(path, value):
    """A file whose scores are all `value`."""
    model = DeepFM(20, 3, 4, use_fm=False, use_deep=False, task="regression")
    model.get_layer("head").bias.assign([value])
    deepfm_ops.export_scorer(model, path)


def test_reload(tmp_path):
    path = tmp_path / "m"
    constant(path, 1)
    loaded = Scorer.load(path)
    first = loaded.digest
    assert not loaded.reload()
    constant(path, 2)
    assert loaded.score([[0, 0, 0]]) == 1 and loaded.digest == first
    assert loaded.reload() and loaded.score([[0, 0, 0]]) == 2 and loaded.digest != first
    path.write_bytes(b"half a fi")
    with pytest.raises(ScorerFileError):
        loaded.reload()
    assert loaded.score([[0, 0, 0]]) == 2
    constant(tmp_path / "other", 3)
    assert loaded.reload(tmp_path / "other") and loaded.score([[0, 0, 0]]) == 3 and loaded.path == tmp_path / "other"


def test_reload_while_requests_run(tmp_path):
    path = tmp_path / "m"
    constant(path, 1)
    loaded, done, batch = Scorer.load(path), [], np.zeros((300, 3), np.int64)

    def request(_):
        scores = loaded.score(batch)
        assert (scores == scores[0]).all()  # one model per request
        return scores[0]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(request, i) for i in range(2000)]
        for value in range(2, 12):
            constant(path, value)
            loaded.reload()
        done = [future.result() for future in futures]
    assert set(done) <= set(range(1, 12)) and loaded.score(batch)[0] == 11


def test_many_threads_score_alike(rng, tmp_path):
    model = shuffled(DeepFM(1000, 10, 16, (32,)), rng)
    deepfm_ops.export_scorer(model, tmp_path / "m")
    loaded = Scorer.load(tmp_path / "m")
    batches = [matrices(rng, 1000, 10, batch=1 + i * 7) for i in range(24)]
    expected = [loaded.score(*batch) for batch in batches]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            for got, want in zip(pool.map(lambda b: loaded.score(*b), batches), expected, strict=True):
                np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


# Without TensorFlow.


def test_import_without_tensorflow(small_file):
    code = f"""
import sys
sys.modules["tensorflow"] = sys.modules["keras"] = sys.modules["pandas"] = None  # an import of them fails
import deepfm_ops.scorer
print(deepfm_ops.scorer.Scorer.load({str(small_file)!r}).score([[0, 1, 2]]).shape)
"""
    assert run_python(code).strip() == "(1,)"


def test_hash_buckets(rng):
    from deepfm_ops import kernels

    texts = [rng.bytes(n) for n in range(300)] + ["", "0", "Zürich", "東京" * 30]
    for buckets in (1, 7, 10**6, 2**62 + 1):
        expected = [int(tf.strings.to_hash_bucket_fast(text, buckets)) for text in texts]
        assert kernels.hash_buckets(texts, buckets).tolist() == expected
    with pytest.raises(TypeError, match=r"texts\[1\] must be str or bytes, got int"):
        kernels.hash_buckets(["a", 1], 3)
    with pytest.raises(ValueError, match="buckets must be at least 1, got 0"):
        kernels.hash_buckets(["a"], 0)
    made = [f"text {i}" * 9 for i in range(2000)]
    assert kernels.hash_buckets((text for text in made), 9).tolist() == kernels.hash_buckets(made, 9).tolist()
    with pytest.raises(UnicodeEncodeError):
        kernels.hash_buckets(["\ud800"], 3)
