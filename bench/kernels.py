"""Measures the kernels themselves, on NumPy arrays: `python bench/kernels.py [--json FILE]`.

The touch floor is a loop that only reads the same rows, with the best of four prefetch distances, measured in the
same turns. Results are checked against a float64 oracle first. Figures are medians and quartiles over the rounds.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time

import ml_dtypes
import numpy as np
from common import SETS, Case, aligned, expected, machine, make_data, statistics

from deepfm_ops import kernels

DISTANCES = (8, 16, 32, 64)


def load(case):
    table, indices, values = make_data(case)
    if case.batch <= 16384:
        y, rows, gradient = expected(table, indices[0], values)
        got, sums, _, _ = kernels.fm_forward(table, indices[0], values)
        np.testing.assert_allclose(got, y, rtol=1e-4, atol=1e-4 * np.abs(y).max())
        unique, d_rows, _ = kernels.fm_gradient(table, indices[0], values, sums, np.ones_like(got))
        np.testing.assert_array_equal(unique, rows)
        np.testing.assert_allclose(d_rows, gradient, rtol=1e-4, atol=1e-4 * np.abs(gradient).max())
    return (table if case.dtype == "float32" else aligned(table.astype(ml_dtypes.bfloat16))), indices, values


def take_turns(functions, rounds):
    """{name: [median, quartiles]} in milliseconds; a function takes the number of an index set."""
    times, turn = {name: [] for name in functions}, 0
    for _ in range(rounds):
        for name, function in functions.items():
            function(turn % SETS)
            turn += 1
            start = time.perf_counter()
            seconds = function(turn % SETS)
            turn += 1
            # The touch floor times its loop itself, without the call around it: the stricter comparison.
            times[name].append((seconds if isinstance(seconds, float) else time.perf_counter() - start) * 1e3)
    return {name: statistics(t) for name, t in times.items()}


def forward(table, indices, values, **options):
    return lambda n: kernels.fm_forward(table, indices[n], values, **options)


def gradient(table, indices, values, **options):
    ones = np.ones((len(values), 1), np.float32)
    sums = [kernels.fm_forward(table, i, values)[1] for i in indices]
    return lambda n: kernels.fm_gradient(table, indices[n], values, sums[n], ones, **options)


def touch(table, indices, distance, **options):
    return lambda n: kernels.read_rows(table, indices[n], distance, **options)


def floors(rounds):
    """The forward against the touch floor, in cache and out of it."""
    for rows in (1_000, 1_000_000, 10_000_000):
        case = Case(batch=16384, rows=rows)
        table, indices, values = load(case)
        functions = {"forward": forward(table, indices, values)}
        for d in DISTANCES:
            functions[f"touch {d}"] = touch(table, indices, d)
        times = take_turns(functions, rounds)
        best = min(times[f"touch {d}"][0] for d in DISTANCES)
        yield {
            "case": dataclasses.asdict(case),
            "times": times,
            "percent of the floor": 100 * best / times["forward"][0],
        }


def threads(rounds):
    """Two threads against one."""
    case = Case(batch=65536)
    data = load(case)
    functions = {
        f"{k} {n}": make(*data, threads=n) for k, make in (("forward", forward), ("gradient", gradient)) for n in (1, 2)
    }
    for n in (1, 2):  # what the memory itself gives a second thread
        functions[f"touch {n}"] = touch(data[0], data[1], DISTANCES[-1], threads=n)
    times = take_turns(functions, rounds)
    for kind in ("forward", "gradient", "touch"):
        yield {"case": dataclasses.asdict(case), "kind": kind, "speedup": times[f"{kind} 1"][0] / times[f"{kind} 2"][0]}


def zipf(rounds):
    """A gradient of heavy duplicates against one of few."""
    functions = {}
    for distribution in ("uniform", "zipf"):
        functions[distribution] = gradient(*load(Case(batch=16384, distribution=distribution)))
    times = take_turns(functions, rounds)
    yield {"times": times, "uniform over zipf": times["uniform"][0] / times["zipf"][0]}


def bfloat16(rounds):
    """A bfloat16 table against a float32 one."""
    functions = {}
    for dtype in ("float32", "bfloat16"):
        functions[dtype] = forward(*load(Case(batch=16384, dim=64, dtype=dtype)))
    times = take_turns(functions, rounds)
    yield {"times": times, "float32 over bfloat16": times["float32"][0] / times["bfloat16"][0]}


def dims(rounds):
    """Bytes per second of every K, as a share of the slower neighbouring power of two's, in cache and out of it."""
    for rows in (1_000, 200_000):
        functions, cases = {}, {}
        for dim in range(1, 131):
            case = Case(batch=2048, fields=20, dim=dim, rows=rows)
            cases[dim], functions[dim] = case, forward(*load(case))
        times = take_turns(functions, rounds)
        speed = {dim: cases[dim].useful_bytes / times[dim][0] / 1e6 for dim in cases}
        shares = {}
        for dim in speed:
            below = 1 << (dim.bit_length() - 1)
            around = [speed[p] for p in (below, 2 * below) if p in speed]
            shares[dim] = speed[dim] / min(around)
        worst = min(shares, key=shares.get)
        yield {"rows": rows, "GB/s": speed, "worst": {"K": worst, "share of the slower power of two": shares[worst]}}


def naive(rounds):
    """The identity: the sum over all pairs, O(n^2 k), against the fused O(n k), one thread each."""
    for n in (10, 20, 40, 80, 120, 160, 200, 240, 280, 320, 360, 400):
        case = Case(batch=64, fields=n, dim=16, rows=100_000)
        table, indices, values = load(case)

        def pairwise(s, n=n, table=table, indices=indices, values=values):
            e = table[indices[s]] * values[..., None]
            products = np.matmul(e, e.transpose(0, 2, 1))  # every inner product of two fields
            return products[(slice(None), *np.triu_indices(n, 1))].sum(axis=1)

        times = take_turns({"fused": forward(table, indices, values, threads=1), "pairwise": pairwise}, rounds)
        yield {"n": n, "times": times}


def orders(rounds):
    """An order of 3 and field weights over the plain interaction, forward and with the gradient."""
    for batch in (4096, 16384):
        case = Case(batch=batch)
        table, indices, values = load(case)
        weights = np.random.default_rng(0).normal(size=case.fields * (case.fields - 1) // 2).astype(np.float32)
        kinds = {"plain": {}, "order 3": {"order": 3}, "field weights": {"field_weights": weights}}
        functions = {name: forward(table, indices, values, **options) for name, options in kinds.items()}

        def with_gradient(n, options, table=table, indices=indices, values=values):
            y, sums, e, _ = kernels.fm_forward(table, indices[n], values, return_embeddings=True, **options)
            return kernels.fm_gradient(table, indices[n], values, sums, np.ones_like(y), embeddings=e, **options)

        functions |= {
            f"{name}, gradient": lambda n, options=options, call=with_gradient: call(n, options)
            for name, options in kinds.items()
        }
        times = take_turns(functions, rounds)
        over = {name: times[name][0] / times["plain" + name[len(name.split(",")[0]) :]][0] for name in times}
        yield {"case": dataclasses.asdict(case), "times": times, "over plain": over}


PARTS = {
    "floors": floors,
    "threads": threads,
    "zipf": zipf,
    "bfloat16": bfloat16,
    "dims": dims,
    "naive": naive,
    "orders": orders,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results" / "kernels.json")
    arguments = parser.parse_args()
    here = {"machine": f"{machine()}, {kernels.isa()}", "command": "python " + " ".join(sys.argv)}
    print(here["machine"])
    is_all, known = arguments.parts == list(PARTS), arguments.json.exists()
    report = here if is_all or not known else json.loads(arguments.json.read_text())  # the other parts stay
    for part in arguments.parts:
        report[part] = list(PARTS[part](arguments.rounds))
        if not is_all:
            report.setdefault("apart", {})[part] = here
        for row in report[part]:
            print(part, {k: v for k, v in row.items() if k != "GB/s"}, flush=True)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
