"""A click log over parameter servers and workers, to a scorer that answers: what `make demo-cluster` runs.

python -m deepfm_ops.cluster launch --ps 2 --workers 2 examples/cluster.py [--rows N] [--folder FOLDER]

Every process of the cluster runs this file. A job that was interrupted goes on from its newest checkpoint when the same
command is given again, with another number of servers too.
"""

import argparse
import pathlib
import time

from deepfm_ops import cluster

cluster.serve_or_continue()  # parameter servers and workers stay in here; the chief goes on

import keras  # noqa: E402

from deepfm_ops import FeatureDictionary  # noqa: E402
from deepfm_ops.data.synthetic import ClickLog  # noqa: E402
from deepfm_ops.scorer import Scorer  # noqa: E402

TRAINING_DAYS, TEST_DAY = range(3), 3


def files_of(folder, days):
    return sorted(file for day in days for file in folder.glob(f"day-{day:02}-part-*.tsv"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000, help="of the log, in four days")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("demo-output/cluster"))
    arguments = parser.parse_args()
    folder, log = arguments.folder / f"{arguments.rows}", ClickLog()
    if not files_of(folder, [TEST_DAY]):
        print(f"Making a log of {arguments.rows:,} rows in {folder}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        log.write(folder, range(TEST_DAY + 1), arguments.rows // (TEST_DAY + 1), 2, format="tsv")
    days, test = files_of(folder, TRAINING_DAYS), files_of(folder, [TEST_DAY])
    features = FeatureDictionary(min_count=4)
    numeric = dict.fromkeys(log.numeric, "log1p")
    features.fit(days, numeric=numeric, categorical=log.categorical, label="label")

    keras.utils.set_random_seed(0)
    model = cluster.ShardedDeepFM.from_features(features, seed=0)
    model.compile(metrics=["AUC"])
    servers, workers = len(model.cluster.servers), len(model.cluster.workers)
    print(f"{features.num_features:,} features on {servers} servers, {workers} workers", flush=True)
    start = time.perf_counter()
    checkpoint = cluster.Checkpoint(folder / "checkpoints", every_steps=50)
    model.fit(features.stream(days, 1024, shuffle="rows"), verbose=2, callbacks=[checkpoint])
    print(f"trained in {time.perf_counter() - start:.1f} s", flush=True)
    found = model.evaluate(features.stream(test, 8192), return_dict=True)
    print(f"the next day: AUC {found['AUC']:.4f}, logloss {found['loss']:.4f}", flush=True)

    path = folder / "model.scorer"
    model.export_scorer(path)
    with test[0].open() as lines:
        next(lines)  # the names of the columns
        cells = dict(zip(log.columns, next(lines).rstrip("\n").split("\t"), strict=True))
    record = {name: (float(cells[name]) if cells[name] else None) for name in log.numeric}
    record |= {name: cells[name] or None for name in log.categorical}
    print(f"{path}: the first record of the next day scores {Scorer.load(path).score(record)[0]:.4f}", flush=True)


if __name__ == "__main__":
    main()
