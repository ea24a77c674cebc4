"""Several heads, and classes, without Keras: the SavedModel, the scorer and the server say what the model says."""

import json
import zipfile

import numpy as np
import pytest
import tensorflow as tf

import deepfm_ops
from deepfm_ops import (
    DeepFM,
    DenseFeat,
    FeatureDictionary,
    SparseFeat,
    VarLenSparseFeat,
    export,
    export_scorer,
)
from deepfm_ops.scorer import Scorer, ScorerFileError

TASK = {"dwell": "regression", "click": "binary", "genre": ("multiclass", 3)}
FM = {"use_deep": False}
TASKS = {"heads": TASK, "classes": ("multiclass", 4), "one": {"click": "binary"}}
COLUMNS = [
    SparseFeat("user", 20, embedding_dim=4),
    SparseFeat("item", 30, embedding_dim=4, group_name="other"),
    VarLenSparseFeat(SparseFeat("tags", 9, embedding_dim=2, group_name="other2"), maxlen=3, combiner="max"),
    SparseFeat("place", 7, embedding_dim=2, group_name="other2"),
    DenseFeat("price", 2),
]
TABLE = {"city": ["Rome", "Oslo", "Bonn", "Rome"], "age": [0.1, 0.2, 0.3, 0.4], "tags": ["a|b", "b", "", "c"]}


def randomized(model, rng):
    for weight in model.trainable_weights:
        weight.assign(rng.normal(size=weight.shape, scale=0.3))
    return model


@pytest.fixture(scope="module", params=TASKS)
def task(request):
    return TASKS[request.param]


@pytest.fixture(scope="module", params=["matrices", "features", "columns"])
def trained(request, task):
    """(model, what it scores, the raw form of it)."""
    rng = np.random.default_rng(2010)
    options = {"task": task, "seed": 1}
    if request.param == "columns":
        groups = ["default_group", "other", "other2"]
        model = DeepFM.from_columns(COLUMNS, COLUMNS, groups, dnn_hidden_units=(8,), **options)
        sizes = {"user": 20, "item": 30, "place": 7}
        inputs = {name: rng.integers(0, size, 9) for name, size in sizes.items()}
        inputs |= {"tags": rng.integers(0, 9, (9, 3)), "price": rng.normal(size=(9, 2)).astype("f")}
        raw = inputs
    elif request.param == "features":
        lists = {"categorical": ["city"], "numeric": ["age"], "multivalued": ["tags"]}
        features = FeatureDictionary().fit(TABLE, **lists)
        model = DeepFM.from_features(features, embedding_dim=4, hidden_units=(8,), **options)
        inputs, raw = features.transform(TABLE), TABLE
    else:
        model = DeepFM(40, 3, 4, (8,), **options)
        inputs = rng.integers(0, 40, (9, 3)), rng.normal(size=(9, 3)).astype("f")
        raw = None
    return randomized(model, rng), inputs, raw


def by_head(scores, task):
    """{name, or None of a single one: [n, width]}."""
    scores = scores if isinstance(task, dict) else {None: scores}
    return {name: np.reshape(x, (len(x), -1)) for name, x in scores.items()}


def assert_alike(found, wanted, task, tolerance=1e-5):
    found, wanted = by_head(found, task), by_head(wanted, task)
    assert list(found) == list(wanted)
    for name, scores in wanted.items():
        np.testing.assert_allclose(found[name], scores, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("portable", [True, False])
def test_the_saved_model(trained, task, portable, tmp_path):
    model, inputs, raw = trained
    if not portable and deepfm_ops.native_info()["reason"]:
        pytest.skip("no native op")
    export(model, tmp_path, portable)
    served = tf.saved_model.load(str(tmp_path)).signatures["serving_default"]
    if raw is None:
        given = {"indices": tf.constant(inputs[0]), "values": tf.constant(inputs[1])}
    else:
        specs = served.structured_input_signature[1]
        given = {name: tf.constant(raw[name], spec.dtype) for name, spec in specs.items()}
        given = {name: tf.reshape(x, [-1, *specs[name].shape[1:]]) for name, x in given.items()}
    scores = {name: x.numpy() for name, x in served(**given).items()}
    wanted = model.predict(inputs, verbose=0)
    assert set(scores) == (set(task) if isinstance(task, dict) else {"score"})
    assert_alike({name: scores[name] for name in wanted} if isinstance(task, dict) else scores["score"], wanted, task)


@pytest.mark.parametrize("shards", [None, 2])
@pytest.mark.parametrize(("table", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.02), ("int8", 0.03)])
def test_the_scorer(trained, task, table, tolerance, shards, tmp_path):
    model, inputs, raw = trained
    export_scorer(model, tmp_path / "m.scorer", table, shards=shards)
    scorer = Scorer.load(tmp_path / "m.scorer")
    scores = scorer.score(*inputs) if raw is None else scorer.score(raw)
    shapes = {name: (len(x), *([x.shape[1]] if x.shape[1] > 1 else [])) for name, x in by_head(scores, task).items()}
    assert {name: np.shape(x) for name, x in (scores if isinstance(task, dict) else {None: scores}).items()} == shapes
    assert_alike(scores, model.predict(inputs, verbose=0), task, tolerance)


def test_ragged_samples(rng, tmp_path):
    """Bags of pairs for a deep part, pairs alone without one."""
    indices, values = rng.integers(0, 40, (9, 3)), rng.normal(size=(9, 3)).astype("f")
    for parts, splits in (
        ({}, {"bag_splits": np.arange(28)}),
        (FM, {"row_splits": np.arange(10) * 3}),
    ):
        model = randomized(DeepFM(40, 3, 4, (8,), task=TASK, **parts), rng)
        export_scorer(model, tmp_path / "m.scorer")
        scores = Scorer.load(tmp_path / "m.scorer").score(indices.reshape(-1), values.reshape(-1), **splits)
        assert_alike(scores, model.predict((indices, values), verbose=0), TASK)


def test_a_probability_of_classes_at_extremes(rng, tmp_path):
    model = DeepFM(40, 3, 4, use_deep=False, use_fm=False, task=("multiclass", 3))
    model.get_layer("first_order").w.assign(np.tile([[200.0, 0.0, -200.0]], (40, 1)))
    export_scorer(model, tmp_path / "m.scorer")
    np.testing.assert_allclose(Scorer.load(tmp_path / "m.scorer").score(np.zeros((1, 3), int)), [[1, 0, 0]], atol=1e-6)


def test_a_file_that_says_other_heads_than_it_holds(rng, tmp_path):
    """By what does not fit; and of a format that older versions refuse by its number."""
    from deepfm_ops.scorer import file

    path = tmp_path / "m.scorer"
    export_scorer(DeepFM(40, 3, 4, (8,), task=TASK), path)
    with zipfile.ZipFile(path) as archive:
        assert archive.comment.startswith(b"deepfm_ops scorer 4 ")
    manifest, arrays, _ = file.read(path)
    arrays = {name: np.array(array) for name, array in arrays.items()}
    manifest = json.loads(json.dumps(manifest))
    for change, message in (
        ({"task": {"click": "binary"}}, "must be"),
        ({"task": ["multiclass", 5.5]}, "classes"),
        ({"task": ["multiclass", 6]}, r"must be .*6"),
        ({"task": "ranking"}, "task must be one of"),
    ):
        file.write(path, manifest | {"info": manifest["info"] | change}, arrays)
        with pytest.raises(ScorerFileError, match=message):
            Scorer.load(path)
    for name in ("second_order_0", "deep", "bias", "fm_weights"):
        file.write(path, manifest, arrays | {name: arrays[name][..., :-1].copy()})
        with pytest.raises(ScorerFileError, match="must be"):
            Scorer.load(path)
