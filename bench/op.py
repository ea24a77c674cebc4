"""Measures the op against what a TensorFlow user would write instead.

python bench/op.py [--batch 128 4096] [--fields 39] [--dim 16] [--rows 1e6] [--rounds 15] [--json FILE]

Every side's result is checked against the reference before it is timed. The sides take turns within one
process, and each is called once before the call that is timed. Figures are medians and quartiles.
"""

import argparse
import json
import os
import pathlib
import platform
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf

import deepfm_ops
from deepfm_ops import reference


def formula(table, indices, values):
    """The plain TensorFlow formula: gather, square of the sum, sum of the squares."""
    e = tf.gather(table, indices) * values[..., tf.newaxis]
    s = tf.reduce_sum(e, axis=1)
    return 0.5 * tf.reduce_sum(s * s - tf.reduce_sum(e * e, axis=1), axis=1, keepdims=True)


def gradient_of(function, table, indices, values, unique=False):
    """(row numbers, rows) of the gradient of the sum; with `unique`, repeated rows are added up."""
    with tf.GradientTape() as tape:
        y = tf.reduce_sum(function(table, indices, values))
    gradient = tape.gradient(y, table)
    if not unique:
        return gradient.indices, gradient.values
    rows, position = tf.unique(gradient.indices)
    return rows, tf.math.unsorted_segment_sum(gradient.values, position, tf.size(rows))


def sides(table, indices, values):
    """{name: (function, whether it is a gradient)}."""
    made = {}
    for name, function in (("native", deepfm_ops.fm_interaction), ("formula", formula)):
        made[f"{name} forward"] = tf.function(lambda f=function: f(table, indices, values))
        made[f"{name} gradient"] = tf.function(lambda f=function: gradient_of(f, table, indices, values))
    made["formula XLA forward"] = tf.function(lambda: formula(table, indices, values), jit_compile=True)
    made["formula gradient, unique"] = tf.function(lambda: gradient_of(formula, table, indices, values, unique=True))
    return made


def check(name, result, table, indices, values):
    """Raises unless the side's result is the reference's, to float32's accuracy."""
    if "gradient" not in name:
        np.testing.assert_allclose(result, reference.fm_interaction(table, indices, values), rtol=1e-3, atol=1e-2)
        return
    rows, expected = gradient_of(reference.fm_interaction, table, indices, values)
    order, position = np.unique(result[0], return_inverse=True)
    added = np.zeros((len(order), table.shape[1]), np.float32)
    np.add.at(added, position, result[1].numpy())
    np.testing.assert_array_equal(order, rows)
    np.testing.assert_allclose(added, expected, rtol=1e-3, atol=1e-2)


def measure(functions, rounds):
    """{name: (median, lower quartile, upper quartile)} in milliseconds."""
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            function()
            start = time.perf_counter()
            function()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: tuple(np.percentile(t, [50, 25, 75])) for name, t in times.items()}


def machine():
    """One line about where this ran."""
    model = [line for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    info = deepfm_ops.native_info()
    return (
        f"{model[0].split(': ')[1] if model else platform.processor()}, {len(model)} cores, {info['threads']} threads, "
        f"{info['instruction_set']}, TensorFlow {info['tensorflow_found']}, Python {platform.python_version()}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 4096])
    parser.add_argument("--fields", type=int, default=39)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--rows", type=float, nargs="+", default=[1e6, 1e7])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    rng, report = np.random.default_rng(0), []
    print(machine())
    print("python", *sys.argv)
    for num_rows in map(int, arguments.rows):
        table = tf.Variable(rng.normal(size=(num_rows, arguments.dim)).astype(np.float32))
        # As in training: after a sparse update, reading the variable's value would copy it.
        table.scatter_sub(tf.IndexedSlices(tf.zeros((1, arguments.dim)), [0]))
        for batch in arguments.batch:
            shape = (batch, arguments.fields)
            indices, values = tf.constant(rng.integers(0, num_rows, shape)), tf.constant(rng.random(shape, np.float32))
            functions = sides(table, indices, values)
            for name, function in functions.items():
                check(name, function(), table, indices, values)
            print(f"\nB={batch} F={arguments.fields} K={arguments.dim} V={num_rows:,} float32")
            for name, (median, low, high) in measure(functions, arguments.rounds).items():
                kind = "gradient" if "gradient" in name else "forward"
                report.append({"rows": num_rows, "batch": batch, "side": name, "ms": [median, low, high]})
                ours = next(
                    r["ms"][0]
                    for r in report
                    if r["batch"] == batch and r["rows"] == num_rows and r["side"] == f"native {kind}"
                )
                print(f"  {name:26s} {median:8.3f} ms  [{low:.3f}, {high:.3f}]  {median / ours:5.2f} x native {kind}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "command": sys.argv, "results": report}, indent=1))


if __name__ == "__main__":
    main()
