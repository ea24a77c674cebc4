"""Measures an FM's `fit` against `train_on_batch` on the same batches: `python bench/fit.py [--rounds N]`.

V=1,000,000, B=4096, F=39, K=16, first and second order, 100 batches; arrays, and a Dataset of them. The sides take
turns in one process, one untimed round first. A figure is rows per second over those of train_on_batch: median and
quartiles over the rounds, by the clock and by the processor's time.
"""

import argparse
import json
import pathlib
import sys
import time

import keras
import numpy as np
import tensorflow as tf
from common import machine, statistics

from deepfm_ops import DeepFM, optimizers

V, B, F, K, STEPS = 1_000_000, 4096, 39, 16, 100


def measure(optimizer, rounds):
    """{side: {"clock": [median, quartiles], "cpu": ...}}, of ratios."""
    rng = np.random.default_rng(0)
    rows = B * STEPS
    inputs = rng.integers(0, V, (rows, F)), np.ones((rows, F), "f")
    labels = rng.integers(0, 2, (rows, 1)).astype("f")
    keras.utils.set_random_seed(1)
    model = DeepFM(V, F, K, use_deep=False, seed=1)
    model.compile(*optimizer)
    batches = [([a[s : s + B] for a in inputs], labels[s : s + B]) for s in range(0, rows, B)]
    data = tf.data.Dataset.from_tensor_slices((inputs, labels)).batch(B).prefetch(2)

    def train_on_batch():
        for x, y in batches:
            model.train_on_batch(tuple(x), y)

    sides = {
        "train_on_batch": train_on_batch,
        "arrays": lambda: model.fit(inputs, labels, batch_size=B, verbose=0),
        "tf.data": lambda: model.fit(data, verbose=0),
    }
    times = {side: [] for side in sides}
    for _ in range(rounds + 1):
        for side, run in sides.items():
            clock, cpu = time.perf_counter(), time.process_time()
            run()
            times[side].append((time.perf_counter() - clock, time.process_time() - cpu))
    ours = {side: np.array(taken[1:]) for side, taken in times.items()}
    ratios = {side: ours["train_on_batch"] / taken for side, taken in ours.items() if side != "train_on_batch"}
    return {side: {"clock": statistics(r[:, 0]), "cpu": statistics(r[:, 1])} for side, r in ratios.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results" / "fit.json")
    arguments = parser.parse_args()
    report = {"machine": machine(), "command": "python " + " ".join(sys.argv), "optimizers": {}}
    for name, optimizer in (("Adagrad", (optimizers.Adagrad(0.1), "binary_crossentropy")), ("compile()", ())):
        report["optimizers"][name] = measure(optimizer, arguments.rounds)
        for side, found in report["optimizers"][name].items():
            print(name, side, {by: [round(x, 3) for x in ratio] for by, ratio in found.items()}, flush=True)
    arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
