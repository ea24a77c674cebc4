"""An order of three and field weights in the scorer: it says what the model says."""

import numpy as np
import pytest

from deepfm_ops import DeepFM, DenseFeat, FeatureDictionary, SparseFeat, VarLenSparseFeat, export_scorer
from deepfm_ops.scorer import Scorer, ScorerFileError
from deepfm_ops.scorer import file as scorer_file

pytest.importorskip("deepfm_ops.kernels", reason="a pure-Python install has no kernels")
OPTIONS = {"order 3": {"order": 3}, "field weights": {"field_weights": True}}
TASKS = {"one": "binary", "heads": {"click": "binary", "kind": ("multiclass", 3)}}
GROUPS = {"user": "a", "item": "a", "shop": "a", "tags": "b", "place": "b", "hour": "b"}
COLUMNS = [
    *(SparseFeat(name, 9, embedding_dim=4, group_name=GROUPS[name]) for name in ("user", "item", "shop")),
    *(SparseFeat(name, 9, embedding_dim=2, group_name=GROUPS[name]) for name in ("place", "hour")),
    VarLenSparseFeat(SparseFeat("tags", 9, embedding_dim=2, group_name="b"), maxlen=3, combiner="max"),
    DenseFeat("price", 2),
]
TABLE = {"city": ["Rome", "Oslo", "Bonn"], "age": [0.1, 0.2, 0.3], "tags": ["a|b", "", "b"], "user": ["x", "y", "z"]}


def made(kind, rng, **options):
    """(model, its inputs, what the scorer takes)."""
    if kind == "columns":
        model = DeepFM.from_columns(COLUMNS, COLUMNS, ["a", "b"], dnn_hidden_units=(8,), **options)
        inputs = {name: rng.integers(0, 9, 7) for name in GROUPS}
        raw = inputs = inputs | {"tags": rng.integers(0, 9, (7, 3)), "price": rng.normal(size=(7, 2)).astype("f")}
    else:
        features = FeatureDictionary().fit(TABLE, ["city", "user"], ["age"], ["tags"])
        model = DeepFM.from_features(features, embedding_dim=4, hidden_units=(8,), **options)
        inputs, raw = features.transform(TABLE), TABLE
    for weight in model.trainable_weights:
        weight.assign(rng.normal(size=weight.shape, scale=0.4))
    return model, inputs, raw


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["features", "columns"])
def test_the_scorer(kind, options, task, rng, tmp_path):
    model, inputs, raw = made(kind, rng, task=task, **options)
    want = model.predict(inputs, verbose=0)
    want = want if isinstance(want, dict) else {None: want}
    for table, tolerance, shards in (("float32", 1e-5, None), ("bfloat16", 0.03, 2), ("int8", 0.05, None)):
        export_scorer(model, tmp_path / "m.scorer", table, shards=shards)
        found = Scorer.load(tmp_path / "m.scorer", threads=2).score(raw)
        for name, scores in (found if isinstance(found, dict) else {None: found}).items():
            np.testing.assert_allclose(scores.reshape(want[name].shape), want[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_ragged_samples(options, rng, tmp_path):
    indices, values = rng.integers(0, 40, (9, 3)), rng.normal(size=(9, 3)).astype("f")
    for deep, splits in ((True, {"bag_splits": np.arange(28)}), (False, {"row_splits": np.arange(10) * 3})):
        model = DeepFM(40, 3, 4, (8,), use_deep=deep, **options)
        for weight in model.trainable_weights:
            weight.assign(rng.normal(size=weight.shape, scale=0.4))
        export_scorer(model, tmp_path / "m.scorer")
        scorer, flat = Scorer.load(tmp_path / "m.scorer"), (indices.reshape(-1), values.reshape(-1))
        if not deep and "field_weights" in options:
            with pytest.raises(ValueError, match=r"field_weights need samples of equally many fields"):
                scorer.score(*flat, **splits)
            continue
        want = model.predict((indices, values), verbose=0)[:, 0]
        np.testing.assert_allclose(scorer.score(*flat, **splits), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "arrays", "message"),
    [
        ({"order": 4}, {}, "the plan has order 4 and field_weights True"),
        ({"order": 3}, {}, "the plan has order 3 and field_weights True"),
        ({"field_weights": 1}, {}, "the plan has order 2 and field_weights 1"),
        ({}, {"field_weights_0": np.ones(2, "f")}, r"array 'field_weights_0' must be float32 \(3,\)"),
        ({}, {"field_weights_0": np.ones(3)}, r"array 'field_weights_0' must be float32 \(3,\)"),
        ({}, {"field_weights_0": None}, r"array 'field_weights_0' must be float32 \(3,\), got none"),
    ],
)
def test_a_file_that_cannot_be(changes, arrays, message, tmp_path):
    path = tmp_path / "m.scorer"
    export_scorer(DeepFM(40, 3, 4, (8,), field_weights=True), path)
    assert b"deepfm_ops scorer 5 " in path.read_bytes()[-200:]  # which older versions refuse
    manifest, held, _ = scorer_file.read(path)
    manifest["plan"] |= changes
    held = {name: np.array(array) for name, array in (held | arrays).items() if array is not None}
    held = {name: array for name, array in held.items() if name not in arrays or arrays[name] is not None}
    path.unlink()
    scorer_file.write(path, manifest, held)
    with pytest.raises(ScorerFileError, match=message):
        Scorer.load(path)


def test_a_plain_model_keeps_the_format_that_older_versions_read(tmp_path):
    path = tmp_path / "m.scorer"
    export_scorer(DeepFM(40, 3, 4, (8,)), path)
    assert b"deepfm_ops scorer 2 " in path.read_bytes()[-200:]
    manifest, held, _ = scorer_file.read(path)
    for name in ("order", "field_weights"):  # as they wrote it
        del manifest["plan"][name]
    before = Scorer.load(path).score(np.array([[1, 2, 3]]))
    held = {name: np.array(array) for name, array in held.items()}
    scorer_file.write(path, manifest, held)
    np.testing.assert_array_equal(Scorer.load(path).score(np.array([[1, 2, 3]])), before)
