"""ShardedDeepFM against DeepFM, its parts in one process: what does not depend on where they lie."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from deepfm_ops import DeepFM, cluster, optimizers
from deepfm_ops.cluster import coordinator
from deepfm_ops.features.dictionary import FeatureDictionary

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


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
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
