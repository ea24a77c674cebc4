"""Several heads, and classes, whose tables lie in parts: what one process says, in its parts."""

import keras
import numpy as np
import pandas as pd
import pytest

from deepfm_ops import DeepFM, FeatureDictionary, cluster, export_scorer
from deepfm_ops.scorer import Scorer

TASK = {"dwell": "regression", "click": "binary", "genre": ("multiclass", 3)}
NAMES = sorted(TASK)
V, P, N = 60, 3, 96
RNG = np.random.default_rng(0)
INPUTS = RNG.integers(0, V, (N, P)), RNG.normal(1, 0.2, (N, P)).astype("f")
Y = {
    "click": np.where(np.arange(N) % 3, RNG.integers(0, 2, N), np.nan),
    "dwell": np.where(np.arange(N) % 4, RNG.normal(size=N), np.nan),
    "genre": np.where(np.arange(N) % 5, RNG.integers(0, 3, N), -1),
}
COUNTS = {"feature_counts": np.bincount(INPUTS[0].reshape(-1), minlength=V), "num_samples": N}


def pair(parts, number, workers=1, **arguments):
    """(a model in parts, one of this process, which start alike), compiled."""
    parts(number, workers)
    arguments = {"num_features": V, "num_fields": P, "embedding_dim": 4, "hidden_units": (8,), "seed": 3, **arguments}
    arguments = {"task": TASK, **arguments}
    sharded = cluster.ShardedDeepFM(**arguments)
    single = DeepFM(**arguments, embeddings_initializer=cluster.RowNormal(0.01, 3))
    several = {"metrics": {"click": ["AUC"]}, "loss_weights": {"dwell": 0.5}} if arguments["task"] is TASK else {}
    for model in (sharded, single):
        model.compile(**several)
    return sharded, single


def assert_equal(sharded, single, tolerance=0.0):
    for a, b in zip(sharded.to_single().get_weights(), single.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=0)


def assert_alike(found, wanted):
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("task", [TASK, ("multiclass", 3), {"click": "binary"}], ids=["heads", "classes", "one"])
def test_bits_of_one_process(parts, task):
    sharded, single = pair(parts, 2, task=task, **COUNTS)
    y = Y if isinstance(task, dict) else np.maximum(Y["genre"], 0)
    weights = RNG.random(N).astype("f")
    histories = []
    for model in (sharded, single):
        keras.utils.set_random_seed(1)
        options = {"sample_weight": weights, "epochs": 2, "validation_data": (INPUTS, y)}
        histories.append(model.fit(INPUTS, y, 16, validation_batch_size=16, verbose=0, **options).history)
    assert_alike(*histories)
    assert_equal(sharded, single)
    found, wanted = sharded.predict(INPUTS), single.predict(INPUTS, verbose=0)
    for a, b in zip(keras.tree.flatten(found), keras.tree.flatten(wanted), strict=True):
        np.testing.assert_array_equal(a, b)
    assert type(found) is type(wanted)
    assert_alike(*(m.evaluate(INPUTS, y, batch_size=16, verbose=0, return_dict=True) for m in (sharded, single)))
    empty = sharded.predict((INPUTS[0][:0], INPUTS[1][:0]))
    assert [x.shape for x in keras.tree.flatten(empty)] == [(0, x.shape[1]) for x in keras.tree.flatten(wanted)]


def test_factorization_machines_of_several_workers(parts):
    """Rows cross the network, as sums are of one number."""
    sharded, single = pair(parts, 2, workers=2, use_deep=False)
    for model, more in ((sharded, {"in_flight": 2}), (single, {})):
        keras.utils.set_random_seed(1)
        model.fit(INPUTS, Y, 16, verbose=0, **more)
    assert_equal(sharded, single, 2e-3)


def test_a_stream_of_files(parts, tmp_path):
    table = pd.DataFrame({"city": RNG.choice(["Rome", "Oslo", "Bonn"], N), **Y})
    table.to_csv(tmp_path / "data.csv", index=False)
    features = FeatureDictionary().fit(tmp_path / "data.csv", categorical=["city"], label=["genre", "dwell", "click"])
    parts(2)
    options = {"task": TASK, "embedding_dim": 4, "hidden_units": (8,), "seed": 3}
    sharded = cluster.ShardedDeepFM.from_features(features, **options)
    single = DeepFM.from_features(features, **options, embeddings_initializer=cluster.RowNormal(0.01, 3))
    histories = []
    for model in (sharded, single):
        model.compile()
        histories.append(model.fit(features.stream(tmp_path / "data.csv", 16), epochs=2, verbose=0).history)
    assert_equal(sharded, single)
    assert_alike(*({name: h[name] for name in ("loss", "click_loss", "dwell_loss", "genre_loss")} for h in histories))
    found = sharded.predict(features.stream(tmp_path / "data.csv", 16))
    wanted = single.predict(features.transform(tmp_path / "data.csv"), verbose=0)
    for name in NAMES:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5)
    table.loc[3, "genre"] = 7
    table.to_csv(tmp_path / "bad.csv", index=False)
    with pytest.raises(Exception, match="line 5, column 'genre': '7.*' is no label: it is no class of"):
        sharded.fit(features.stream(tmp_path / "bad.csv", 16), verbose=0)


@pytest.mark.parametrize("table", ["float32", "int8"])
@pytest.mark.parametrize("shards", [False, True])
def test_a_scorer_of_parts(parts, tmp_path, table, shards):
    sharded, single = pair(parts, 2)
    for model in (sharded, single):
        keras.utils.set_random_seed(1)
        model.fit(INPUTS, Y, 16, verbose=0)
    sharded.export_scorer(tmp_path / "parts.scorer", table, shards=shards)
    export_scorer(single, tmp_path / "one.scorer", table)
    found, wanted = (Scorer.load(tmp_path / name).score(*INPUTS) for name in ("parts.scorer", "one.scorer"))
    for name in NAMES:
        np.testing.assert_array_equal(found[name], wanted[name])


def test_bad_labels(parts):
    sharded, _ = pair(parts, 1)
    for change, message in (
        ({"click": np.full(N, 2)}, r"labels\['click'\]\[0\] = 2 is not in"),
        ({"click": np.zeros(N - 1)}, r"y\['click'\] must have 96 samples, as x has, got 95"),
    ):
        with pytest.raises(ValueError, match=message):
            sharded.fit(INPUTS, Y | change, verbose=0)
    with pytest.raises(ValueError, match="labels must have 'dwell', a head of the model"):
        sharded.fit(INPUTS, {"click": Y["click"], "genre": Y["genre"]}, verbose=0)
    with pytest.raises(ValueError, match="class_weight is for one head"):
        sharded.fit(INPUTS, Y, class_weight={0: 2.0}, verbose=0)
