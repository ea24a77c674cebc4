"""ShardedDeepFM against DeepFM, its parts in one process: what does not depend on where they lie."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from deepfm_ops import DeepFM, cluster, export_scorer, optimizers
from deepfm_ops.cluster import coordinator
from deepfm_ops.features.dictionary import FeatureDictionary
from deepfm_ops.scorer import Scorer

V, P, B = 300, 4, 32
RNG = np.random.default_rng(0)
INDICES = np.minimum(RNG.zipf(1.3, (200, P)), V) - 1
VALUES = RNG.normal(1, 0.2, (200, P)).astype("float32")
Y = (RNG.random(200) < 0.4).astype("float32")
COUNTS = np.bincount(INDICES.reshape(-1), minlength=V)


@pytest.fixture
def parts(monkeypatch):
    """Sets how many parts the tables have, all of them here."""

    def choose(number, workers=1):
        chief = coordinator.Chief()
        chief.servers, chief.workers = chief.servers * number, chief.workers * workers
        monkeypatch.setattr("deepfm_ops.cluster.model.connect", lambda wait: chief)

    return choose


def pair(make, parts, number, workers=1, **arguments):
    """(a model in parts, one of this process, which start alike), compiled."""
    parts(number, workers)
    arguments = {"num_features": V, "num_fields": P, "embedding_dim": 5, "hidden_units": (8,), "seed": 3, **arguments}
    sharded = cluster.ShardedDeepFM(**arguments)
    single = DeepFM(**arguments, embeddings_initializer=cluster.RowNormal(0.01, 3))
    for model in (sharded, single):
        model.compile(make(), metrics=["AUC"])
    return sharded, single


def everything(single):
    """{name: array} of the weights, and of what the optimizer keeps."""
    found = {v.path: v.numpy() for v in single.weights}
    return found | {f"optimizer {n} {v.name}": v.numpy() for n, v in enumerate(single.optimizer.variables)}


def assert_equal(sharded, single):
    a, b = sharded.to_single(), single
    a.show_averages()
    b.show_averages()
    a, b = everything(a), everything(b)
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert np.array_equal(x, b[name]), (name, np.abs(x - b[name]).max())


OPTIMIZERS = {
    "recommended": lambda: None,
    "sgd": lambda: optimizers.SGD(0.1),
    "adagrad": lambda: optimizers.Adagrad(0.1),
    "row-wise": lambda: optimizers.CombinedOptimizer(optimizers.RowWiseAdagrad(0.1), keras.optimizers.Adam(0.01)),
    "lazy adam": lambda: optimizers.LazyAdam(0.01),
    "ftrl": lambda: optimizers.Ftrl(0.1),
}


@pytest.mark.parametrize(
    ("optimizer", "number"), [*(("recommended", number) for number in (1, 2, 4)), *((name, 3) for name in OPTIMIZERS)]
)
def test_bits_of_one_process(parts, optimizer, number):
    extra = {"feature_counts": COUNTS, "num_samples": 200} if optimizer in ("recommended", "adagrad") else {}
    sharded, single = pair(OPTIMIZERS[optimizer], parts, number, **extra)
    histories = []
    for model in (sharded, single):
        keras.utils.set_random_seed(1)
        history = model.fit((INDICES, VALUES), Y, B, epochs=2, verbose=0, validation_data=((INDICES, VALUES), Y))
        histories.append(history.history)
    assert_equal(sharded, single)
    for name, values in histories[1].items():
        np.testing.assert_allclose(histories[0][name], values, rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(sharded.predict((INDICES, VALUES)), single.predict((INDICES, VALUES), verbose=0))


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("ones", [True, False])
def test_sums_instead_of_rows(parts, monkeypatch, linear, ones):
    extra = {"use_deep": False, "use_linear": linear, "feature_counts": COUNTS, "num_samples": 200}
    sharded, single = pair(lambda: optimizers.LazyAdam(0.01), parts, 3, workers=2, **extra)
    used = []
    make = sharded._steps._make_pull
    monkeypatch.setattr(sharded._steps, "_make_pull", lambda *options: used.append(options[-1]) or make(*options))
    sharded.prefetch = False
    values = np.ones_like(VALUES) if ones else VALUES
    for model, more in ((sharded, {"in_flight": 2}), (single, {})):
        keras.utils.set_random_seed(1)
        model.fit((INDICES, values), Y, B, epochs=2, verbose=0, **more)
    assert set(used) == {"sums"}
    a, b = everything(sharded.to_single()), everything(single)
    for name, x in a.items():
        np.testing.assert_allclose(x, b[name], rtol=2e-4, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("table", ["float32", "int8"])
@pytest.mark.parametrize("shards", [False, True])
def test_a_scorer_of_parts(parts, tmp_path, table, shards):
    sharded, single = pair(lambda: None, parts, 3, feature_counts=COUNTS, num_samples=200)
    for model in (sharded, single):
        keras.utils.set_random_seed(1)
        model.fit((INDICES, VALUES), Y, B, verbose=0)
    sharded.export_scorer(tmp_path / "parts.scorer", table, shards=shards)
    export_scorer(single, tmp_path / "one.scorer", table)
    found, wanted = (Scorer.load(tmp_path / name).score(INDICES, VALUES) for name in ("parts.scorer", "one.scorer"))
    np.testing.assert_array_equal(found, wanted)
    assert len(list(tmp_path.iterdir())) == (5 if shards else 2)


def test_resize(parts):
    table = {"a": ["x", "y", "z", "x"], "label": [1, 0, 1, 0]}
    features = FeatureDictionary().fit(table, categorical=["a"], label="label")
    parts(3)
    sharded = cluster.ShardedDeepFM.from_features(features, embedding_dim=4, hidden_units=(8,), seed=3)
    single = DeepFM.from_features(
        features, embedding_dim=4, hidden_units=(8,), seed=3, embeddings_initializer=cluster.RowNormal(0.01, 3)
    )
    for model in (sharded, single):
        model.compile(optimizers.Adagrad(0.1))
        inputs = features.transform(table)
        model.fit(inputs, np.array(table["label"]), 2, shuffle=False, verbose=0)
    features.update({"a": ["p", "q", "r", "s"], "label": [0, 0, 1, 1]})
    for model in (sharded, single):
        model.resize(features)
        inputs = features.transform({"a": ["x", "p", "s", "q"]})
        model.fit(inputs, np.array([1, 0, 1, 1]), 2, shuffle=False, verbose=0)
    assert_equal(sharded, single)


def test_early_stopping_restores_the_best_weights(parts):
    sharded, single = pair(lambda: optimizers.LazyAdam(0.3), parts, 2)
    for model in (sharded, single):
        keras.utils.set_random_seed(1)
        stop = keras.callbacks.EarlyStopping("val_loss", patience=2, restore_best_weights=True)
        valid = (INDICES[150:], VALUES[150:]), Y[150:]
        history = model.fit(
            (INDICES[:150], VALUES[:150]), Y[:150], B, epochs=9, verbose=0, validation_data=valid, callbacks=[stop]
        )
        assert len(history.epoch) < 9
    assert_equal(sharded, single)


def test_weights_of_samples_and_classes(parts):
    weights = RNG.random(len(Y)).astype("float32")
    for more in ({"sample_weight": weights}, {"class_weight": {0: 1.0, 1: 3.0}}, {"validation_split": 0.2}):
        sharded, single = pair(lambda: optimizers.SGD(0.1), parts, 2)
        for model in (sharded, single):
            keras.utils.set_random_seed(1)
            model.fit((INDICES, VALUES), Y, B, verbose=0, **more)
        assert_equal(sharded, single)


def test_bad_arguments(parts):
    parts(2)
    sizes = {"num_features": V, "num_fields": P}
    for arguments, text in (
        ({"wire": "float16"}, "wire must be one of float32, bfloat16, got 'float16'"),
        ({"l2_scope": "table"}, "l2_scope must be 'batch'"),
        ({"backend": "reference"}, "parameter servers run the native ops"),
        ({"embeddings_initializer": "glorot_uniform"}, "each row for itself"),
        ({"num_fields": 0}, "num_fields"),
    ):
        with pytest.raises(ValueError, match=text):
            cluster.ShardedDeepFM(**{**sizes, **arguments})
    model = cluster.ShardedDeepFM(**sizes, embedding_dim=2, hidden_units=(3,))
    with pytest.raises(ValueError, match="call compile first"):
        model.fit((INDICES, VALUES), Y)
    for optimizer, text in (
        (keras.optimizers.Adam(), "got Adam of Keras: use LazyAdam"),
        (optimizers.SGD(0.1, momentum=0.9), "momentum"),
    ):
        with pytest.raises(ValueError, match=text):
            model.compile(optimizer)
    model.compile()
    for arguments, error, text in (
        ({"x": INDICES, "y": Y}, ValueError, r"x must be \(indices, values\)"),
        ({"x": (INDICES[:, :2], VALUES), "y": Y}, ValueError, r"indices must have shape \(200, 4\), got \(200, 2\)"),
        ({"x": (INDICES, VALUES), "y": Y[:5]}, ValueError, "y must have 200 samples, as x has, got 5"),
        ({"x": (INDICES, VALUES), "y": Y + 3}, ValueError, r"labels\[0\]"),
        ({"x": (INDICES.astype(float), VALUES), "y": Y}, TypeError, "indices must be int32 or int64"),
        ({"x": (INDICES + 100, VALUES), "y": Y, "shuffle": False}, tf.errors.InvalidArgumentError, "^batch 0: indices"),
        ({"x": (INDICES, VALUES), "y": Y, "in_flight": 0}, ValueError, "in_flight must be at least 1"),
    ):
        with pytest.raises(error, match=text):
            model.fit(**arguments, verbose=0)
