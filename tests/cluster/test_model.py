"""ShardedDeepFM against DeepFM, its parts in one process: what does not depend on where they lie."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from deepfm_ops import DeepFM, cluster, export_scorer, optimizers
from deepfm_ops.features.dictionary import FeatureDictionary
from deepfm_ops.scorer import Scorer

V, P, B = 300, 4, 32
RNG = np.random.default_rng(0)
INDICES = np.minimum(RNG.zipf(1.3, (200, P)), V) - 1
VALUES = RNG.normal(1, 0.2, (200, P)).astype("float32")
Y = (RNG.random(200) < 0.4).astype("float32")
COUNTS = np.bincount(INDICES.reshape(-1), minlength=V)


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
    ("optimizer", "number"),
    [*(("recommended", number) for number in (1, 2, 4)), *((name, 3) for name in list(OPTIMIZERS)[1:])],
)
def test_bits_of_one_process(parts, optimizer, number):
    extra = {"feature_counts": COUNTS, "num_samples": 200} if optimizer in ("recommended", "adagrad") else {}
    sharded, single = pair(OPTIMIZERS[optimizer], parts, number, **extra)
    histories = []
    for model in (sharded, single):
        keras.utils.set_random_seed(1)
        more = {"validation_data": ((INDICES, VALUES), Y)} if optimizer == "recommended" else {}
        histories.append(model.fit((INDICES, VALUES), Y, B, epochs=2, verbose=0, **more).history)
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
    counted = {"feature_counts": COUNTS, "num_samples": 200, "field_weights": shards}
    sharded, single = pair(lambda: None, parts, 3, **counted)
    for model in (sharded, single):
        keras.utils.set_random_seed(1)
        model.fit((INDICES, VALUES), Y, B, verbose=0)
    sharded.export_scorer(tmp_path / "parts.scorer", table, shards=shards)
    export_scorer(single, tmp_path / "one.scorer", table)
    found, wanted = (Scorer.load(tmp_path / name).score(INDICES, VALUES) for name in ("parts.scorer", "one.scorer"))
    np.testing.assert_array_equal(found, wanted)
    assert len(list(tmp_path.iterdir())) == (5 if shards else 2)
    with pytest.raises((ValueError, OSError), match="no folder"):
        sharded.export_scorer(tmp_path / "no folder" / "parts.scorer", table, shards=shards)


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


def test_a_model_that_was_resized_goes_on_from_its_checkpoint(parts, tmp_path):
    table = {"a": ["x", "y", "z", "x"], "label": [1, 0, 1, 0]}
    more = {"a": ["p", "q", "r", "s"], "label": [0, 0, 1, 1]}
    parts(3)

    def run(epochs):
        features = FeatureDictionary().fit(table, categorical=["a"], label="label")
        model = cluster.ShardedDeepFM.from_features(features, embedding_dim=4, hidden_units=(8,), seed=3)
        model.compile(optimizers.LazyAdam(0.1, use_ema=True))
        features.update(more)
        model.resize(features)
        keras.utils.set_random_seed(1)
        callbacks = [cluster.Checkpoint(tmp_path / "checkpoints")]
        model.fit(features.transform(more), np.array(more["label"]), 2, epochs=epochs, verbose=0, callbacks=callbacks)
        return model

    run(1)
    resumed = run(3)
    (tmp_path / "checkpoints").rename(tmp_path / "others")
    a, b = (everything(model.to_single()) for model in (resumed, run(3)))
    for name, x in a.items():
        np.testing.assert_array_equal(x, b[name], err_msg=name)


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


KINDS = {
    "first order alone": {"use_fm": False, "use_deep": False},
    "no first order": {"use_linear": False, "use_deep": False},
    "deep alone": {"use_fm": False, "use_linear": False},
    "several values": {"num_fields": 2, "field_sizes": [1, 3]},
    "several values, no deep": {"num_fields": 2, "field_sizes": [1, 3], "use_deep": False},
    "regression": {"task": "regression"},
    "dropout, penalties": {"dropout": 0.3, "batch_norm": True, "l2_linear": 0.1, "l2_embedding": 0.1, "l2_deep": 0.1},
    "float64": {"dtype": "float64"},
    "bfloat16": {"dtype": "bfloat16"},
    "mixed": {"dtype": "mixed_bfloat16"},
    "order 3, no deep": {"order": 3, "use_deep": False},
    "field weights, no deep": {"field_weights": True, "use_deep": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_every_kind(parts, kind):
    sharded, single = pair(lambda: optimizers.LazyAdam(0.01), parts, 3, **KINDS[kind])
    for model in (sharded, single):
        keras.utils.set_random_seed(1)
        model.fit((INDICES, VALUES), Y, B, epochs=2, verbose=0)
    assert_equal(sharded, single)
    np.testing.assert_allclose(
        sharded.evaluate((INDICES, VALUES), Y), single.evaluate((INDICES, VALUES), Y, verbose=0), rtol=1e-3
    )


@pytest.mark.parametrize("kind", ["no first order", "regression", "float64", "bfloat16", "mixed"])
def test_factorization_machines_of_every_kind_side_by_side(parts, kind):
    extra = {**KINDS[kind], "use_deep": False}
    sharded, single = pair(lambda: optimizers.LazyAdam(0.01), parts, 3, workers=2, **extra)
    assert sharded._steps.can_sum == ("dtype" not in extra)
    for model, more in ((sharded, {"in_flight": 2}), (single, {})):
        keras.utils.set_random_seed(1)
        model.fit((INDICES, VALUES), Y, B, epochs=2, verbose=0, **more)
    a, b = everything(sharded.to_single()), everything(single)
    for name, x in a.items():
        atol = 2e-2 if "bfloat16" in str(x.dtype) or kind == "mixed" else 2e-6
        np.testing.assert_allclose(x.astype(float), b[name].astype(float), rtol=2e-4, atol=atol, err_msg=name)


@pytest.mark.parametrize(
    "make",
    [
        lambda: optimizers.LazyAdam(0.01, clipnorm=0.01),
        lambda: optimizers.LazyAdam(0.01, global_clipnorm=0.01),
        lambda: optimizers.LazyAdam(0.01, clipvalue=1e-4),
        lambda: optimizers.LazyAdam(0.01, weight_decay=0.1),
        lambda: optimizers.LazyAdam(keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5)),
        lambda: optimizers.CombinedOptimizer(
            optimizers.LazyAdam(0.01, clipnorm=0.01), keras.optimizers.Adam(0.01, weight_decay=0.1)
        ),
        lambda: optimizers.LazyAdam(0.01, use_ema=True, ema_momentum=0.5),
    ],
    ids=["clipnorm", "global_clipnorm", "clipvalue", "decay", "schedule", "combined", "averages"],
)
def test_what_optimizers_are_told(parts, make):
    sharded, single = pair(make, parts, 3)
    for model in (sharded, single):
        keras.utils.set_random_seed(1)
        model.fit((INDICES, VALUES), Y, B, verbose=0)
        model.evaluate((INDICES, VALUES), Y, verbose=0)
        model.fit((INDICES, VALUES), Y, B, verbose=0)
    a, b = sharded.to_single(), single
    a.show_averages()
    b.show_averages()
    for name, x in everything(a).items():
        np.testing.assert_allclose(x, everything(b)[name], rtol=1e-4, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_fewer_rows_than_servers(parts, tmp_path, rows):
    sharded, single = pair(lambda: optimizers.LazyAdam(0.01), parts, 4, num_features=rows)
    inputs = INDICES % rows, VALUES
    for model in (sharded, single):
        keras.utils.set_random_seed(1)
        model.fit(inputs, Y, 1, verbose=0, callbacks=[cluster.Checkpoint(tmp_path / "c")] if model is sharded else [])
    assert_equal(sharded, single)
    for shards in (False, True):
        sharded.export_scorer(tmp_path / "scorer", shards=shards)
        np.testing.assert_allclose(
            Scorer.load(tmp_path / "scorer").score(*inputs), single.predict(inputs, verbose=0)[:, 0], rtol=1e-5
        )


def test_inputs_of_other_forms(parts):
    sharded, _ = pair(lambda: optimizers.LazyAdam(0.01), parts, 2)
    wanted = sharded.predict((INDICES, VALUES))
    for x in (  # sizes of products change their last bits
        {"indices": INDICES, "values": VALUES},
        [INDICES.tolist(), VALUES.tolist()],
        (INDICES.astype("int32"), VALUES.astype("float64")),
        (tf.constant(INDICES), tf.constant(VALUES)),
        lambda: (INDICES, VALUES),
    ):
        np.testing.assert_allclose(sharded.predict(x, 7), wanted, rtol=1e-5)
        assert len(sharded.fit(x, Y.tolist(), 64, verbose=0).history["loss"]) == 1
        wanted = sharded.predict((INDICES, VALUES))
    assert sharded.predict((INDICES[:0], VALUES[:0])).shape == (0, 1)
    assert sharded.predict((INDICES[:1], VALUES[:1])).shape == (1, 1)


def test_callbacks_of_keras(parts, tmp_path):
    sharded, single = pair(
        lambda: optimizers.CombinedOptimizer(optimizers.LazyAdam(0.1), optimizers.LazyAdam(0.01)),
        parts,
        2,
    )
    rates = []
    for model in (sharded, single):
        keras.utils.set_random_seed(1)
        callbacks = [
            keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=1.0),
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.9),
            keras.callbacks.CSVLogger(tmp_path / "log.csv"),
            keras.callbacks.TerminateOnNaN(),
            keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", "loss", save_best_only=True),
            keras.callbacks.ModelCheckpoint(tmp_path / "last.weights.h5", save_weights_only=True),
        ]
        model.fit((INDICES, VALUES), Y, B, epochs=4, verbose=0, callbacks=callbacks)
        rates.append([float(part.learning_rate) for part in model.optimizer._parts])
    assert rates[0] == rates[1]
    assert_equal(sharded, single)
    best = keras.models.load_model(tmp_path / "best.keras")
    assert best.predict((INDICES, VALUES), verbose=0).shape == (200, 1)


def test_weights_of_classes_are_of_training_alone(parts):
    sharded, single = pair(lambda: optimizers.SGD(0.1), parts, 2)
    found = []
    for model in (sharded, single):
        keras.utils.set_random_seed(1)
        more = {"class_weight": {0: 1.0, 1: 30.0}, "validation_split": 0.2}
        found.append(model.fit((INDICES, VALUES), Y, B, verbose=0, **more).history["val_loss"])
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_another_compile_goes_on_from_averages(parts):
    sharded, single = pair(lambda: optimizers.LazyAdam(0.1, use_ema=True, ema_momentum=0.9), parts, 3)
    for model in (sharded, single):
        keras.utils.set_random_seed(1)
        model.fit((INDICES, VALUES), Y, B, verbose=0)
        model.compile(optimizers.SGD(0.1))
        model.fit((INDICES, VALUES), Y, B, verbose=0)
    assert_equal(sharded, single)


def test_a_copy_of_a_model_that_was_not_compiled(parts, tmp_path):
    parts(3)
    sharded = cluster.ShardedDeepFM(V, P, embedding_dim=5, hidden_units=(8,), seed=3)
    single = DeepFM(V, P, 5, (8,), seed=3, embeddings_initializer=cluster.RowNormal(0.01, 3))
    np.testing.assert_array_equal(
        sharded.to_single().predict((INDICES, VALUES), verbose=0), sharded.predict((INDICES, VALUES))
    )
    np.testing.assert_array_equal(single.predict((INDICES, VALUES), verbose=0), sharded.predict((INDICES, VALUES)))
    sharded.save(tmp_path / "model.keras")
    found = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(found.predict((INDICES, VALUES), verbose=0), sharded.predict((INDICES, VALUES)))
