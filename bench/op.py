"""Measures the op against what it replaces: `python bench/op.py [--full] [--json FILE]`.

Sides run in processes of their own, those of PyTorch and DeepCTR in environments of their own where
`make bench-peers` made them. Every side's result is checked against a float64 oracle before it is timed. Then the
sides take turns: in each round each side is called once untimed and then timed. Figures are medians and quartiles
over the rounds. A "gradient" is a forward and a gradient.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from common import Case, expected, machine, make_data, statistics

HERE = pathlib.Path(__file__).parent
ENVIRONMENTS = {
    "sides_ours": pathlib.Path(sys.executable),
    "sides_torch": HERE.parent / ".venv-torch" / "bin" / "python",
    "sides_deepctr": HERE.parent / ".venv-deepctr" / "bin" / "python",
}
BASE = Case()
QUICK = [
    BASE,
    *(dataclasses.replace(BASE, batch=b) for b in (1, 128, 1024, 65536)),
    *(dataclasses.replace(BASE, rows=v) for v in (1_000, 100_000, 10_000_000)),
    *(dataclasses.replace(BASE, dim=k) for k in (4, 8, 64, 128)),
    dataclasses.replace(BASE, rows=1_000, dim=10),
    *(dataclasses.replace(BASE, fields=f) for f in (10, 100)),
    dataclasses.replace(BASE, distribution="zipf"),
    dataclasses.replace(BASE, dim=64, dtype="bfloat16"),
]
FULL = [
    Case(*shape)
    for shape in itertools.product(
        (1, 128, 1024, 4096, 65536), (10, 39, 100), (4, 8, 16, 64, 128), (1_000, 100_000, 1_000_000, 10_000_000),
        ("uniform", "zipf"), ("float32", "bfloat16"),
    )
]  # fmt: skip
REPEATED = ("TensorFlow formula", "TensorFlow formula, XLA", "PyTorch eager", "PyTorch compiled", "DeepCTR FM layer")


class Worker:
    """A process that runs the sides of one environment."""

    def __init__(self, sides, python):
        command = [str(python), str(HERE / "worker.py"), sides]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=HERE
        )

    def ask(self, **command):
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        reply = json.loads(line) if line else {"error": "the process ended"}
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply["ok"]


def check(arrays, kind, case, truth):
    """Raises unless the result is the oracle's, to the accuracy of float32 (and of a bfloat16 table)."""
    y, rows, gradient = truth
    scale = 1e-4 if case.dtype == "float32" else 4e-2
    if kind == "forward":
        np.testing.assert_allclose(arrays[0], y, rtol=scale, atol=scale * np.abs(y).max())
        return
    from common import add_up

    unique, added = add_up(arrays[0], arrays[1])
    np.testing.assert_array_equal(unique, rows)
    np.testing.assert_allclose(added, gradient, rtol=scale, atol=scale * np.abs(gradient).max())


def measure(case, workers, folder, rounds, calls):
    """{side: {kind: [median, quartiles] or error}} of one case."""
    table, indices, values = make_data(case)
    for name, array in (("table", table), ("indices", indices), ("values", values)):
        np.save(folder / f"{name}.npy", array)
    truth = expected(table, indices[0], values)
    found, turns = {}, []
    for worker in workers.values():
        try:
            sides = worker.ask(do="load", case=dataclasses.asdict(case), folder=str(folder))
        except RuntimeError as error:
            print(f"  {error}", flush=True)
            continue
        for side, kinds in sides.items():
            for kind in kinds:
                try:
                    path = str(folder / "result.npz")
                    worker.ask(do="result", side=side, kind=kind, path=path)
                    if side not in (
                        "touch floor",
                        "empty tf.function",
                        "FBGEMM lookup alone",
                    ):  # these do not compute it
                        with np.load(path) as arrays:
                            check(list(arrays.values()), kind, case, truth)
                    turns.append((worker, side, kind, []))
                except (RuntimeError, AssertionError) as error:
                    found.setdefault(side, {})[kind] = str(error).strip()[:300]
    for _ in range(rounds):
        for worker, side, kind, times in turns:
            times += worker.ask(do="time", side=side, kind=kind, calls=calls)
    for _, side, kind, times in turns:
        found.setdefault(side, {})[kind] = statistics(times)
    return found


def show(case, found):
    print(f"\n{case}")
    floor = found.get("touch floor", {}).get("forward")
    for kind in ("forward", "gradient"):
        ours = found["deepfm_ops op"][kind][0]
        for side, kinds in found.items():
            if kind not in kinds:
                continue
            if isinstance(kinds[kind], str):
                print(f"  {kind:8s} {side:30s} {kinds[kind]}")
                continue
            median, low, high = kinds[kind]
            extra = ""
            if kind == "forward":
                extra = f"{case.useful_bytes / median / 1e6:7.1f} GB/s"
                extra += f" {100 * floor[0] / median:4.0f} % of the touch floor" if isinstance(floor, list) else ""
            elif side in REPEATED:
                extra = "  rows repeated"
            print(
                f"  {kind:8s} {side:30s} {median:9.3f} ms [{low:.3f}, {high:.3f}] {median / ours:6.2f} x ours {extra}",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the whole grid: a night, and 16 GB of memory")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=2, help="timed calls of a side per turn")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the cases to run")
    parser.add_argument("--json", type=pathlib.Path, default=HERE / "results" / "op.json")
    arguments = parser.parse_args()
    environments = {name: python for name, python in ENVIRONMENTS.items() if python.exists()}
    workers = {name: Worker(name, python) for name, python in environments.items()}
    print(f"{machine()}; sides: {', '.join(workers)}")
    report = {"machine": machine(), "command": "python " + " ".join(sys.argv), "cases": []}
    with tempfile.TemporaryDirectory() as folder:
        cases = FULL if arguments.full else QUICK
        for number in arguments.only or range(len(cases)):
            case = cases[number]
            rounds = arguments.rounds if case.batch < 65536 else max(3, arguments.rounds // 3)
            found = measure(case, workers, pathlib.Path(folder), rounds, arguments.calls)
            show(case, found)
            report["cases"].append({"case": dataclasses.asdict(case), "sides": found})
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
