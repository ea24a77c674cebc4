"""What the processes of `cluster.py` run: steps of a model, timed, and the bytes that they send.

cluster_job.py '{"model": {...}, "batches": 20, ...}' OUT
"""

import itertools
import json
import pathlib
import sys
import time

from deepfm_ops import cluster

cluster.serve_or_continue(wait=300)

import keras  # noqa: E402
import numpy as np  # noqa: E402
from zipf_stream import DIFFERENT, ZipfStream, made  # noqa: E402

from deepfm_ops import DeepFM, FeatureDictionary, optimizers  # noqa: E402
from deepfm_ops.data.synthetic import ClickLog  # noqa: E402


def formula(job, turn, model):
    """Bytes of a step, as docs/scaling.md has them."""
    sizes, servers = job["model"], len(model.cluster.servers)
    width, batch = sizes["embedding_dim"], job["batch_size"]
    ids = [made(sizes["num_features"], sizes["num_fields"], batch, number)[0][0] for number in range(DIFFERENT)]
    unique = sum(len(np.unique(some)) for some in ids) / DIFFERENT
    if not sizes["use_deep"] and len(model.cluster.workers) > 1:  # sums
        return servers * batch * 4 * (2 * width + 4) + 8 * batch * sizes["num_fields"] + 8 * batch
    each = 2 if turn.get("wire") == "bfloat16" else 4
    dense = sum(int(np.prod(v.shape)) for v in model.template.trainable_variables if v.shape[0] != 1)
    return unique * (4 + 2 * each * (width + 1)) + 8 * dense + 8 * batch


def sent():
    """Bytes that went out of each network interface of this namespace."""
    lines = pathlib.Path("/proc/net/dev").read_text().splitlines()[2:]
    return sum(int(line.split(":")[1].split()[8]) for line in lines)


class Clock(keras.callbacks.Callback):
    """Times and bytes at the end of each step."""

    def __init__(self, log=None):
        super().__init__()
        self.seconds, self.bytes, self.log = [], [], log

    def on_train_batch_end(self, batch, logs=None):
        self.seconds.append(time.monotonic())
        self.bytes.append(sent())
        if self.log:
            with open(self.log, "a") as file:
                print(self.seconds[-1], file=file)


def quality(job):
    """AUC of the day after, of a pass over a made-up log, for each turn and seed."""
    log, folder = ClickLog(), pathlib.Path(job["log"])
    days = [sorted(folder.glob(f"day-{day:02}-part-*.tsv")) for day in range(4)]
    features = FeatureDictionary(min_count=4)
    numeric = dict.fromkeys(log.numeric, "log1p")
    features.fit(sum(days[:3], []), numeric=numeric, categorical=log.categorical, label="label")
    found = []
    for seed, turn in itertools.product(job["seeds"], job["turns"]):
        keras.utils.set_random_seed(seed)
        wire = turn.get("wire", "float32")
        model = cluster.ShardedDeepFM.from_features(features, seed=seed, wire=wire)
        model.compile(optimizers.LazyAdam(1e-3) if turn["optimizer"] == "LazyAdam" else None, metrics=["AUC"])
        stream = features.stream(sum(days[:3], []), 1024, shuffle="rows", seed=seed)
        model.fit(stream, verbose=0, in_flight=turn["in_flight"])
        tested = model.evaluate(features.stream(days[3], 8192), return_dict=True)
        found.append({**turn, "seed": seed, "AUC": tested["AUC"], "logloss": tested["loss"]})
        print(found[-1], flush=True)
    return found


def main():
    job = json.loads(sys.argv[1])
    if "log" in job:
        pathlib.Path(sys.argv[2]).write_text(json.dumps(quality(job)))
        return
    sizes = job["model"]["num_features"], job["model"]["num_fields"]
    found = []
    for turn in job["turns"]:
        model = cluster.ShardedDeepFM(**job["model"], wire=turn.get("wire", "float32"), prefetch=turn.get("prefetch"))
        model.compile(optimizers.LazyAdam(1e-3))
        clock = Clock(job.get("log_steps"))
        stream = ZipfStream(*sizes, job["batch_size"], job["batches"])
        callbacks = [clock, *([cluster.Checkpoint(job["checkpoint"], every_steps=20)] if "checkpoint" in job else [])]
        model.fit(stream, verbose=0, callbacks=callbacks, in_flight=turn.get("in_flight"))
        said = formula(job, turn, model)
        found.append({"turn": turn, "seconds": clock.seconds, "bytes": clock.bytes, "formula": said})
        del model
    if job.get("local"):
        model = DeepFM(**job["model"])
        model.compile(optimizers.LazyAdam(1e-3), "binary_crossentropy", jit_compile=False)
        clock, stream = Clock(), ZipfStream(*sizes, job["batch_size"], job["batches"])
        batches = list(stream)
        for number, (inputs, labels) in enumerate(batches):
            model.train_on_batch(inputs, labels)
            clock.on_train_batch_end(number)
        found.append({"turn": "local", "seconds": clock.seconds, "bytes": clock.bytes})
    pathlib.Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
