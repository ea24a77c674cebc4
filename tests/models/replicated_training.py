"""Trains small models and writes what became of them to a folder, for test_distributed.py.

By itself: in this process, one.npz, and on two replicas in it, mirrored.npz. As one of the workers of a TF_CONFIG:
worker_I.npz. Every function below trains on the same batches, whatever takes the steps, and returns arrays by name.
"""

import contextlib
import json
import os
import pathlib
import sys

import keras
import numpy as np
import tensorflow as tf

from deepfm_ops import DeepFM, FeatureDictionary, optimizers
from deepfm_ops.features.columns import DenseFeat, SparseFeat, VarLenSparseFeat

OUT = pathlib.Path(sys.argv[1])
WORKER = json.loads(os.environ["TF_CONFIG"])["task"]["index"] if "TF_CONFIG" in os.environ else None
ROWS, BATCH = 101, 20  # a last batch of one sample: of two replicas, one has none
r = np.random.default_rng(2010)
TABLE = {
    "city": np.minimum(r.zipf(1.4, ROWS), 30),
    "user": np.minimum(r.zipf(1.2, ROWS), 50),
    "age": r.normal(size=ROWS).astype("f"),
    "label": r.integers(0, 2, ROWS).astype("f"),
}
LABELS = TABLE["label"]
WEIGHTS = r.random(ROWS).astype("f")
FEATURES = FeatureDictionary().fit(TABLE, categorical=["city", "user"], numeric="age", label="label")
MATRICES = FEATURES.transform(TABLE)
FM = {"num_features": FEATURES.num_features, "num_fields": FEATURES.num_fields, "embedding_dim": 4, "seed": 1}
FIT = {"batch_size": BATCH, "verbose": 0}


def of(model, history=None, **more):
    """Weights, what the optimizer keeps of them, losses and metrics, scores."""
    found = {f"weight {number} {v.name}": v for number, v in enumerate(model.weights)}
    found |= {f"slot {number} {v.name}": v for number, v in enumerate(model.optimizer.variables)}
    found |= {f"history {name}": values for name, values in (history.history if history else {}).items()}
    return {name: np.asarray(value) for name, value in found.items()} | more


def recommended(scope):
    """Priors that count, two optimizers, rare rates and averages; arrays in an order of their own each epoch."""
    keras.utils.set_random_seed(7 + (WORKER or 0))  # the order is that of process 0
    with scope():
        model = DeepFM.from_features(FEATURES, embedding_dim=4, hidden_units=(8,), seed=1)
    model.compile(metrics=["AUC"])
    history = model.fit(MATRICES, LABELS, epochs=2, validation_data=(MATRICES, LABELS, WEIGHTS), **FIT)
    evaluated = model.evaluate(MATRICES, LABELS, verbose=0, sample_weight=WEIGHTS, batch_size=33)
    scores = model.predict(MATRICES, verbose=0, batch_size=30)
    if WORKER == 0:  # alone
        model.save(OUT / "model.keras")
        model.predict_on_batch(MATRICES)
    return of(model, history, evaluated=np.asarray(evaluated), scores=scores)


def penalized(scope):
    """l2 of rows that one replica uses, or both, and of dense weights; batch norm; weights of samples; tf.data."""
    penalties = {"l2_embedding": 0.3, "l2_linear": 0.2, "l2_deep": 0.1}
    with scope():
        model = DeepFM(hidden_units=(8,), batch_norm=True, **penalties, **FM)
        model.compile(optimizers.SGD(0.1), weighted_metrics=["accuracy"], steps_per_execution=2)
    samples = MATRICES, LABELS, WEIGHTS
    data = tf.data.Dataset.from_tensor_slices(samples).batch(BATCH).prefetch(1)
    unknown = tf.data.Dataset.range(
        0, ROWS, BATCH
    ).map(  # whose batches TensorFlow cannot tell the size of
        lambda i: tf.nest.map_structure(lambda x: tf.constant(x)[i : i + BATCH], samples)
    )
    return of(model, model.fit(data, epochs=2, verbose=0, validation_data=unknown))


def optimized(scope):
    """The other optimizers, on rows that repeat in a batch and in both replicas; epochs that end before the arrays."""
    keras.utils.set_random_seed(8)
    found = {}
    for make in (
        lambda: optimizers.CombinedOptimizer(optimizers.RowWiseAdagrad(0.1), optimizers.Adagrad(0.1)),
        lambda: optimizers.Ftrl(0.1, l1_regularization_strength=0.01),
        lambda: optimizers.Adagrad(0.1, weight_decay=0.1),
    ):
        with scope():
            model = DeepFM(use_deep=False, **FM)
            model.compile(make())
        history = model.fit(MATRICES, LABELS, steps_per_epoch=3, epochs=2, batch_size=15, verbose=0)
        found |= {f"{type(model.optimizer).__name__} {k}": v for k, v in of(model, history).items()}
    return found


def columns(scope):
    """Feature columns, text among them, whose features the first fit counts; classes that weigh; single batches."""
    city = SparseFeat("city", 40, embedding_dim=4, vocabulary={str(i): i for i in range(39)}, dtype="string")
    tags = VarLenSparseFeat(SparseFeat("user", 60, embedding_dim=4), maxlen=2, combiner="mean")
    used = [city, tags, DenseFeat("age", 1)]
    with scope():
        model = DeepFM.from_columns(used, used, dnn_hidden_units=(8,), l2_reg_embedding=0.1, count_features=True)
        model.compile(optimizers.LazyAdam(0.01))
    inputs = {"city": TABLE["city"].astype(str), "user": np.stack([TABLE["user"]] * 2, 1), "age": TABLE["age"]}
    model.fit(inputs, LABELS, shuffle=False, class_weight={0: 1.0, 1: 3.0}, **FIT)
    batch, labels = {name: x[:BATCH] for name, x in inputs.items()}, LABELS[:BATCH]
    trained = model.train_on_batch(batch, labels, class_weight={0: 1.0, 1: 2.0})
    more = {"trained": trained, "tested": model.test_on_batch(batch, labels)}
    more |= {"scores": model.predict_on_batch(batch), "called": model({k: tf.constant(x) for k, x in batch.items()})}
    return of(model, **{name: np.asarray(x) for name, x in more.items()})


def streamed(scope):
    """A stream, or one of two that have every other row: the second is at its end first. l2 of whole tables."""
    shard = {} if WORKER is None else {"shard": (WORKER, 2)}
    size = BATCH if WORKER is None else BATCH // 2
    stream, validation = (FEATURES.stream(TABLE, size, **shard) for _ in range(2))
    with scope():
        model = DeepFM(hidden_units=(8,), l2_embedding=0.01, l2_linear=0.01, l2_scope="table", **FM)
        model.compile(optimizers.LazyAdam(0.01), metrics=["mse"])
    history = model.fit(stream, epochs=2, verbose=0, validation_data=validation)
    assert stream.state()["epoch"] == 2 and stream.rows == 0
    mine = slice(WORKER, None, 2 if WORKER is not None else None)
    scores = np.zeros((ROWS, 1))
    scores[mine] = model.predict(FEATURES.stream(TABLE, 7, **shard), verbose=0)
    assert ((scores > 0).sum() == ROWS) == (WORKER is None)
    history.history = {name: values for name, values in history.history.items() if not name.startswith("rows")}
    return of(model, history)


def headed(scope):
    """Heads whose labels one replica has none of, or another number of than the other; samples that weigh."""
    labels = {"click": np.where(np.arange(ROWS) % 7, LABELS, np.nan), "kind": np.arange(ROWS) % 4 - 1}
    labels["click"][10:20] = np.nan  # of a batch's second half
    with scope():
        model = DeepFM(hidden_units=(8,), task={"kind": ("multiclass", 3), "click": "binary"}, **FM)
        model.compile(optimizers.LazyAdam(0.01), metrics={"click": ["AUC"]}, loss_weights={"click": 2.0})
    model.fit(
        MATRICES, labels, sample_weight=WEIGHTS, shuffle=False, epochs=2, validation_data=(MATRICES, labels), **FIT
    )
    return of(model, **model.predict(MATRICES, verbose=0))


def refused(strategy):
    """What is an error, and ends in each process."""
    found = {}

    def expect(name, function):
        try:
            function()
        except (ValueError, tf.errors.OpError) as error:
            found[name] = np.asarray(str(error))

    with strategy.scope():
        model = DeepFM(use_deep=False, **FM)
    optimizer = optimizers.LazyAdam() if WORKER is None else None
    metric = keras.metrics.AUC()
    expect("optimizer", lambda: model.compile(optimizer))
    expect("metric", lambda: model.compile(metrics=[metric]))
    model.compile()
    if WORKER is not None:
        with strategy.scope():
            expect("predict", lambda: model.predict(MATRICES, verbose=0))
    rows = slice(0, 50 + (WORKER or 0))
    expect("lengths", lambda: model.fit(tuple(x[rows] for x in MATRICES), LABELS[rows], verbose=0))
    data = tf.data.Dataset.from_tensor_slices((MATRICES, LABELS)).batch(50 * (1 + (WORKER or 0)))
    expect("batches", lambda: model.evaluate(data, verbose=0))
    bad = MATRICES[0].copy()
    bad[0, 0] = 10**6  # in the part of one replica
    expect("index", lambda: model.fit((bad, MATRICES[1]), LABELS, batch_size=ROWS, verbose=0, shuffle=False))
    return found


def run(strategy=None):
    scope, found = contextlib.nullcontext if strategy is None else strategy.scope, {}
    for train in (recommended, penalized, optimized, columns, streamed, headed):
        found |= {f"{train.__name__}: {name}": array for name, array in train(scope).items()}
    return found | ({} if strategy is None else {f"refused: {k}": v for k, v in refused(strategy).items()})


if WORKER is None:
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    np.savez(OUT / "one.npz", **run())
    np.savez(OUT / "mirrored.npz", **run(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])))
else:
    np.savez(OUT / f"worker_{WORKER}.npz", **run(tf.distribute.MultiWorkerMirroredStrategy()))
