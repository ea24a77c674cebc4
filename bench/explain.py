"""Measures `explain` of one sample by a scorer beside its score: `python bench/explain.py [--rounds N]`.

F=39, K=16, V=1,000,000, an FM and a DeepFM of 3x400; inputs are ready, calls walk through a pool of samples, and the
sides take turns in one process. A figure is the median time of a call in microseconds, and its quartiles over the
rounds. Then samples per second of a summary, with and without pairs of features.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from common import machine, statistics

import deepfm_ops
from deepfm_ops import DeepFM, explain

V, F, K, POOL, BATCH = 1_000_000, 39, 16, 2000, 1024
MODELS = {"FM": {"use_deep": False}, "DeepFM 3x400": {"hidden_units": (400, 400, 400)}}
TABLES = ("float32", "int8")


def microseconds(call, pool):
    """The median of a call, over the pool."""
    clock, times = time.perf_counter, []
    for sample in pool:
        start = clock()
        call(sample)
        times.append(clock() - start)
    return float(np.median(times)) * 1e6


def measure(scorer, rounds):
    rng = np.random.default_rng(0)
    pool = [(rng.integers(0, V, (1, F)), rng.random((1, F), np.float32)) for _ in range(POOL)]
    batch = rng.zipf(1.1, (BATCH, F)) % V, np.ones((BATCH, F), np.float32)
    found = explain(scorer, pool[0])
    assert abs(found.score[0] - scorer.score(*pool[0])[0]) < 1e-5
    sides = {"score": lambda sample: scorer.score(*sample), "explain": lambda sample: explain(scorer, sample)}
    times = {side: [] for side in sides}
    for round_ in range(rounds + 1):
        for side, call in sides.items():
            taken = microseconds(call, pool)
            if round_:
                times[side].append(taken)
    rates = {}
    for name, top in (("summary", 20), ("summary, top=0", 0)):
        start = time.perf_counter()
        explain(scorer, batch, summary=True, top=top)
        rates[name] = BATCH / (time.perf_counter() - start)
    return {"microseconds": {side: statistics(t) for side, t in times.items()}, "samples per second": rates}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results" / "explain.json")
    arguments = parser.parse_args()
    report = {"machine": machine(), "command": "python " + " ".join(sys.argv), "sides": {}}
    for name, options in MODELS.items():
        model = DeepFM(V, F, K, **options)
        for table in TABLES:
            with tempfile.TemporaryDirectory() as folder:
                deepfm_ops.export_scorer(model, f"{folder}/model", table)
                found = measure(deepfm_ops.scorer.Scorer.load(f"{folder}/model"), arguments.rounds)
            report["sides"][f"{name}, {table}"] = found
            print(f"{name}, {table}: {found}", flush=True)
    arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
