"""Measures training steps against vocabulary size: `python bench/train.py [--rows V ...] [--json FILE]`.

A step: B=4096, F=39, K=16, first order, second order, MLP 3x400, values of one, uniform indices, float32. A side is a
process of its own, those of peers in environments of their own (`make bench-peers`). Up to a million rows all sides
take turns; above, those that hold several whole tables run one after the other, after the others. In a turn a side does
one step untimed and then timed ones.
The loss must start at that of a coin and not rise. Figures are medians and quartiles; memory is the process's peak.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
from common import machine, statistics

HERE = pathlib.Path(__file__).parent
B, F, K = 4096, 39, 16
PYTHON = {
    "train_ours": pathlib.Path(sys.executable),
    **{f"train_{name}": HERE.parent / f".venv-{name}" / "bin" / "python" for name in ("torch", "deepctr", "xlearn")},
}
SIDES = {
    "DeepFM, deepfm_ops LazyAdam": "train_ours",
    "MLP alone": "train_ours",
    "MLP alone, with its input's gradient": "train_ours",
    "DeepFM, Keras 3 Adam": "train_ours",
    "DeepFM, Keras 3 Adam, XLA": "train_ours",
    "DeepFM, DeepCTR Adam": "train_deepctr",
    "DeepFM, PyTorch Adam": "train_torch",
    "DeepFM, PyTorch SparseAdam": "train_torch",
    "FM, deepfm_ops RowWiseAdagrad": "train_ours",
    "FM, FBGEMM row-wise Adagrad": "train_torch",
    "FM and first order, deepfm_ops Adagrad": "train_ours",
    "FM and first order, xLearn Adagrad": "train_xlearn",
}
# They write whole tables, and hold several: not all of them fit into memory at once.
HEAVY = [name for name in SIDES if name.startswith("DeepFM, ") and name != "DeepFM, deepfm_ops LazyAdam"]


def make_batches(rows, sets=6):
    """(indices int64 [sets, B, F], labels float32 [sets, B, 1]): labels that a first order can learn."""
    indices = np.random.default_rng(0).integers(0, rows // F * F, (sets, B, F))
    hits = (indices % 7 == 3).sum(axis=2, keepdims=True)
    return indices, (hits > np.median(hits)).astype(np.float32)


class Side:
    """One side's process."""

    def __init__(self, side, rows):
        module = SIDES[side]
        command = [str(PYTHON[module]), str(HERE / "train_worker.py"), module, side, str(rows)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=HERE,
            env={"USER": "bench", **os.environ},  # xLearn aborts without one
        )
        self.times, self.losses, self.memory, self.error = [], [], None, None

    def turn(self, steps):
        """Steps, unless the process has died; what it said, or that it died, is kept."""
        if self.error:
            return
        try:
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        reply = json.loads(line) if line else {"error": f"the process ended, status {self.process.wait()}"}
        self.error = reply.get("error")
        if not self.error:
            self.times += reply["ms"]
            self.losses += reply["losses"]
            self.memory = reply["gigabytes"]

    def finish(self):
        if self.error:
            self.process.kill()
            self.process.wait()
            return {"error": self.error}
        self.process.stdin.close()
        self.process.wait()
        if self.losses:
            first, last = self.losses[0], np.mean(self.losses[-3:])
            if not (0.4 < first < 1.2 and last < first + 0.005):
                return {"error": f"the loss went from {first:.3f} to {last:.3f}"}
        return {"ms": statistics(self.times), "gigabytes": self.memory, "losses": [*self.losses[:1], *self.losses[-1:]]}


def measure(rows, names, rounds, steps):
    """{side: {"ms": [median, quartiles], "gigabytes", "losses"} or {"error"}}."""
    groups = [names]
    if rows > 10**6:
        groups = [[name for name in names if name not in HEAVY], *([name] for name in names if name in HEAVY)]
    found = {}
    for group in groups:
        sides = {name: Side(name, rows) for name in group}
        for _ in range(rounds):
            for side in sides.values():
                side.turn(steps)
        found |= {name: side.finish() for name, side in sides.items()}
    return {name: found[name] for name in names}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, nargs="+", default=[1e5, 1e6, 1e7, 3e7])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a side per turn")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--append", action="store_true", help="keep the other numbers of rows in the JSON file")
    parser.add_argument("--json", type=pathlib.Path, default=HERE / "results" / "train.json")
    arguments = parser.parse_args()
    names = [name for name in arguments.sides if PYTHON[SIDES[name]].exists()]
    report = {"machine": machine(), "command": "python " + " ".join(sys.argv), "rows": []}
    if arguments.append:
        before = json.loads(arguments.json.read_text())
        report["command"] = f"{before['command']}; {report['command']}"
        report["rows"] = [row for row in before["rows"] if row["rows"] not in map(int, arguments.rows)]
    print(report["machine"])
    for rows in map(int, arguments.rows):
        # xLearn writes its model as a file at the end of every run, which at more rows takes minutes.
        here = [name for name in names if rows <= 10**6 or SIDES[name] != "train_xlearn"]
        found = measure(rows, here, arguments.rounds, arguments.steps)
        print(f"\nV={rows:,}")
        for name, result in found.items():
            if "error" in result:
                print(f"  {name:40s} {result['error']}")
                continue
            median, low, high = result["ms"]
            memory, losses = result["gigabytes"], ", ".join(f"{loss:.3f}" for loss in result["losses"])
            print(f"  {name:40s} {median:9.1f} ms [{low:.1f}, {high:.1f}] {memory:6.2f} GB  loss {losses}", flush=True)
        report["rows"].append({"rows": rows, "sides": found})
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
