"""What the processes of a cluster run in test_training.py; the chief writes what it found to a file, JSON."""

import hashlib
import json
import os
import pathlib
import signal
import sys

from deepfm_ops import cluster

cluster.serve_or_continue(wait=120)

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from deepfm_ops import DeepFM, FeatureDictionary, optimizers  # noqa: E402

V, P, B, N = 300, 4, 32, 640
RNG = np.random.default_rng(0)
INDICES = np.minimum(RNG.zipf(1.3, (N, P)), V) - 1
VALUES = RNG.normal(1, 0.2, (N, P)).astype("float32")
Y = (RNG.random(N) < 0.4).astype("float32")
ARGUMENTS = {"num_features": V, "num_fields": P, "embedding_dim": 5, "hidden_units": (8,), "seed": 3}
ARGUMENTS |= {"feature_counts": np.bincount(INDICES.reshape(-1), minlength=V), "num_samples": N}


class At(keras.callbacks.Callback):
    """Calls a function once, after a number of batches."""

    def __init__(self, batch, function):
        super().__init__()
        self.batch, self.function, self.seen = batch, function, 0

    def on_train_batch_end(self, batch, logs=None):
        self.seen += 1
        if self.seen == self.batch:
            self.function()


def process_of(role, index):
    """Its process id: that of the one which has this task in its TF_CONFIG, of this cluster."""
    own = json.loads(os.environ["TF_CONFIG"])
    for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
        try:
            texts = path.read_bytes().split(b"\0")
        except OSError:
            continue
        for text in texts:
            if text.startswith(b"TF_CONFIG="):
                found = json.loads(text.partition(b"=")[2])
                if found["cluster"] == own["cluster"] and found["task"] == {"type": role, "index": index}:
                    return int(path.parent.name)
    raise LookupError(f"no {role} {index}")


def kill(role, index):
    os.kill(process_of(role, index), signal.SIGKILL)


def bits(model):
    single = model.to_single() if isinstance(model, cluster.ShardedDeepFM) else model
    single.show_averages()
    return [v.numpy() for v in (*single.weights, *single.optimizer.variables)]


def equal(found):
    """One step in flight, against one process."""
    models = []
    for make in (cluster.ShardedDeepFM, DeepFM):
        extra = {} if make is cluster.ShardedDeepFM else {"embeddings_initializer": cluster.RowNormal(0.01, 3)}
        model = make(**ARGUMENTS, **extra)
        model.compile(metrics=["AUC"])
        keras.utils.set_random_seed(1)
        more = {"in_flight": 1} if make is cluster.ShardedDeepFM else {}
        model.fit((INDICES, VALUES), Y, B, epochs=2, verbose=0, **more)
        models.append(model)
    sharded, single = models
    found["equal"] = all(np.array_equal(a, b) for a, b in zip(bits(sharded), bits(single), strict=True))
    scores = sharded.predict((INDICES, VALUES))
    found["scores"] = float(np.abs(scores - single.predict((INDICES, VALUES), verbose=0)).max())
    found["evaluated"] = sharded.evaluate((INDICES, VALUES), Y), single.evaluate((INDICES, VALUES), Y, verbose=0)
    bad = INDICES.copy()
    bad[40, 2] = V
    try:
        sharded.fit((bad, VALUES), Y, B, shuffle=False, verbose=0)
    except tf.errors.InvalidArgumentError as error:
        found["bad"] = error.message
    return sharded


def stream(found, folder):
    """Workers read the parts of a stream; one of them is killed, and comes back."""
    path = folder / "log.csv"
    lines = [f"{y:.0f},{a},{b}\n" for y, (a, b) in zip(np.tile(Y, 50), np.tile(INDICES[:, :2], (50, 1)), strict=True)]
    path.write_text("label,a,b\n" + "".join(lines))
    features = FeatureDictionary().fit(path, categorical=["a", "b"], label="label")
    model = cluster.ShardedDeepFM.from_features(features, embedding_dim=4, hidden_units=(8,), seed=0)
    model.compile(optimizers.LazyAdam(1e-2))
    before = process_of("worker", 1)
    killer = At(20, lambda: kill("worker", 1))
    history = model.fit(features.stream(path, 100), epochs=2, verbose=0, callbacks=[killer])
    found["batches"], found["rows"] = killer.seen, len(lines)
    found["steps"] = int(model.optimizer.iterations.numpy())
    found["losses"] = history.history["loss"]
    found["is another"] = process_of("worker", 1) != before


def resumed(folder, name, victims=()):
    """Trains with checkpoints; of the victims one is killed in each life of the job, not at the end of an epoch."""
    keras.utils.set_random_seed(1)
    model = cluster.ShardedDeepFM(**ARGUMENTS)
    model.compile(optimizers.LazyAdam(1e-2, use_ema=True))
    callbacks = [cluster.Checkpoint(folder / name, every_steps=6)]
    killed = len(list(folder.glob(f"{name}.killed*")))
    if killed < len(victims):
        (folder / f"{name}.killed{killed}").touch()
        callbacks.append(At([N // B + 10, 10][killed], lambda: kill(*victims[killed])))
    model.fit((INDICES, VALUES), Y, B, epochs=3, verbose=0, callbacks=callbacks, in_flight=1)
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in bits(model))).hexdigest()
    (folder / f"{name}.json").write_text(json.dumps({"servers": len(model.cluster.servers), "digest": digest}))


def sent():
    """Bytes that went over this namespace's loopback."""
    lines = pathlib.Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:"))


def traffic(folder):
    """Bytes of a step, and what the formula says of them: rows and their gradients once each, dense weights too."""
    rng, size, fields, width, steps = np.random.default_rng(0), 2048, 20, 16, 20
    ids = np.minimum(rng.zipf(1.2, (size * steps, fields)), 50_000) - 1
    inputs, labels = (ids, np.ones(ids.shape, "float32")), np.zeros(len(ids))
    found = {}
    for wire, bytes_each in (("float32", 4), ("bfloat16", 2)):
        model = cluster.ShardedDeepFM(50_000, fields, width, (64,), seed=0, wire=wire)
        model.compile(optimizers.LazyAdam(1e-3))
        ends = []
        at_end = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs, ends=ends: ends.append(sent()))
        model.fit(inputs, labels, size, shuffle=False, verbose=0, callbacks=[at_end], in_flight=1)
        unique = np.mean([len(np.unique(ids[start : start + size])) for start in range(0, len(ids), size)])
        rows = unique * (4 + 2 * (width + 1) * bytes_each)
        dense = 2 * 4 * sum(int(np.prod(v.shape)) for v in model.template.trainable_variables if v.shape[0] != 1)
        batch = size * (fields * 12 + 4 + 8)
        found[wire] = {"seen": float(np.mean(np.diff(ends)[3:])), "formula": rows + dense + batch}
    (folder / "traffic.json").write_text(json.dumps(found))


def main():
    kind, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    if kind == "equal":
        found = {}
        equal(found)
        stream(found, folder)
        resumed(folder, "whole")
        (folder / "found.json").write_text(json.dumps(found))
    elif kind == "traffic":
        traffic(folder)
    elif kind == "resumed":
        resumed(folder, "resumed", [("ps", 1), ("chief", 0)])


if __name__ == "__main__":
    main()
