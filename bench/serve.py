"""Measures scoring: `python bench/serve.py [--rounds N] [--models NAME ...] [--sides NAME ...] [--json FILE]`.

Latency of a call at B = 1, 32 and 512, and throughput, for the demo's DeepFM, a DeepFM of ten million rows (F=39, K=16,
MLP 3x400) and an FM of a million. A side is a process of its own, those of peers in environments of their own
(`make bench-peers`), and may use all cores. Before it is timed, its scores must be those of the Keras model on a pool
of 32768 samples; timed calls walk through the pool, so that no call finds its rows in cache because of the one before.
Inputs are ready, as tensors where the side takes tensors; a call ends with scores in NumPy. The sides take turns.
Then, in fresh processes: the time from the start of Python to the first score at ten million rows.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
from common import machine, statistics

HERE = pathlib.Path(__file__).parent
FIELDS, POOL, BATCHES = 39, 32768, (1, 32, 512)
TABLES = ("float32", "bfloat16", "int8")
# (rows, or None for the demo's model; whether there is an MLP)
SIZES = {"demo": (None, True), "DeepFM": (10**7, True), "FM": (10**6, False)}
VENV = pathlib.Path(sys.executable)
TORCH, ONNX = (HERE.parent / f".venv-{name}" / "bin" / "python" for name in ("torch", "onnx"))
# By side: (its Python, the largest difference from the Keras model's scores that it may have)
SIDES = {
    "Scorer float32": (VENV, 1e-5),
    "Scorer float32, one thread": (VENV, 1e-5),
    "Scorer bfloat16": (VENV, 1e-2),
    "Scorer int8": (VENV, 2e-2),
    "SavedModel portable": (VENV, 1e-5),
    "SavedModel native": (VENV, 1e-5),
    "Keras __call__": (VENV, 1e-5),
    "Keras predict": (VENV, 1e-5),
    "PyTorch eager": (TORCH, 1e-5),
    "TorchScript": (TORCH, 1e-5),
    "ONNX Runtime": (ONNX, 1e-5),
}
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
FIRST = {
    "Scorer": """
import numpy as np; lap("import NumPy")
from deepfm_ops.scorer import Scorer; lap("import deepfm_ops.scorer")
scorer = Scorer.load(path); lap("load")
scorer.score(np.arange(39)[None], np.ones((1, 39), np.float32)); lap("score")
""",
    "SavedModel": """
import numpy as np; lap("import NumPy")
import tensorflow as tf
if path.endswith("native"): import deepfm_ops.ops
lap("import TensorFlow")
loaded = tf.saved_model.load(path); lap("load")
inputs = {"indices": tf.constant(np.arange(39)[None]), "values": tf.ones((1, 39))}
loaded.signatures["serving_default"](**inputs)["score"].numpy(); lap("score")
""",
}
LAPS = """
import json, sys, time
path, laps, last = sys.argv[1], {}, time.perf_counter()
def lap(name):
    global last
    now = time.perf_counter()
    laps[name], last = now - last, now
"""


class Side:
    """One side's process."""

    def __init__(self, name, folder):
        self.name, self.times, self.difference, self.error = name, {}, None, None
        python, self.bound = SIDES[name]
        self.process = subprocess.Popen(
            [str(python), str(HERE / "serve_worker.py"), name, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=HERE,
            env=os.environ | (ONE_THREAD if name.endswith("one thread") else {}),
        )

    def ask(self, **command):
        """The answer, or None: what it said, or that it died, is kept."""
        if self.error:
            return None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        reply = json.loads(line) if line else {"error": f"the process ended, status {self.process.wait()}"}
        self.error = reply.get("error")
        return reply.get("ok")

    def check(self):
        self.difference = self.ask(do="check", batches=BATCHES)
        if self.difference is not None and self.difference > self.bound:
            self.error = f"its scores are off by {self.difference:.2e}, {self.bound:.0e} is allowed"

    def turn(self, batch, seconds, least):
        self.times.setdefault(batch, []).extend(
            self.ask(do="time", batch=batch, seconds=seconds, least=least, most=2000) or []
        )

    def finish(self):
        if self.error:
            self.process.kill()
        self.process.stdin.close()
        self.process.wait()
        if self.error:
            return {"error": self.error}
        return {"difference": self.difference, "batches": {batch: summary(batch, t) for batch, t in self.times.items()}}


def summary(batch, times):
    """Microseconds of a call, and samples per second at the median."""
    median = float(np.median(times))
    p99 = float(np.percentile(times, 99))
    return {"p50": median, "p99": p99, "calls": len(times), "samples/s": batch / median * 1e6}


def measure(folder, names, failed, rounds, seconds, least):
    """{side: {"difference", "batches": {batch: ...}} or {"error"}}."""
    sides = {}
    for name in names:
        if name in failed:
            continue
        sides[name] = Side(name, folder)
        sides[name].check()  # one after the other: loading takes more memory than having loaded
    for batch in BATCHES:
        for _ in range(rounds):
            for side in sides.values():
                side.turn(batch, seconds, least)
    found = {name: side.finish() for name, side in sides.items()}
    return {name: found[name] if name in found else {"error": failed[name]} for name in names}


def prepare(folder):
    """What bench/serve_models.py found; the models are in the folder."""
    done = subprocess.run(
        [str(VENV), str(HERE / "serve_models.py"), str(folder)], stdout=subprocess.PIPE, text=True, check=True, cwd=HERE
    )
    found = json.loads(done.stdout.splitlines()[-1])
    (folder / "found.json").write_text(json.dumps(found))
    return found


def convert(folder):
    """Makes model.onnx of the portable SavedModel: None, or why not."""
    if not ONNX.exists():
        return f"{ONNX.parent.parent.name} is missing"
    if (folder / "model.onnx").exists():
        return None
    command = [str(ONNX), str(HERE / "serve_onnx.py"), str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    except subprocess.TimeoutExpired:
        return "tf2onnx: not done after 15 minutes"
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if "Error" in line and "CalledProcess" not in line]
        return f"tf2onnx: {last[-1][:300] if last else f'status {done.returncode}'}"
    return None


def first_score(code, path, runs):
    """Seconds from the start of Python to a score, and of its steps; the file's pages are in memory."""
    walls, laps = [], []
    code = f"{LAPS}{code}print(json.dumps(laps), flush=True)"
    for run in range(runs + 1):
        start = time.perf_counter()
        with subprocess.Popen(
            [str(VENV), "-c", code, str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            line = process.stdout.readline()
            wall = time.perf_counter() - start
        if not line:
            return {"error": f"the process ended, status {process.returncode}"}
        if run:  # the one before brought the pages
            walls.append(wall)
            laps.append(json.loads(line))
    steps = {name: float(np.median([each[name] for each in laps])) for name in laps[0]}
    steps = {"start of Python": float(np.median(walls)) - sum(steps.values()), **steps}
    return {"seconds": statistics(walls), "worst": max(walls), "runs": runs, "steps": steps}


def show(model, found):
    print(f"\n{model}")
    for name, result in found.items():
        if "error" in result:
            print(f"  {name:28s} {result['error']}")
            continue
        cells = [f"B={b}: {r['p50']:9.1f} us, p99 {r['p99']:9.1f}" for b, r in result["batches"].items()]
        print(f"  {name:28s} {'; '.join(cells)}; off by {result['difference']:.1e}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="turns of each side at each batch")
    parser.add_argument("--seconds", type=float, default=0.3, help="of a turn, if that makes the least calls")
    parser.add_argument("--least", type=int, default=20, help="calls of a turn")
    parser.add_argument("--starts", type=int, default=9, help="fresh processes, for the time to the first score")
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--folder", type=pathlib.Path, help="keep the models here, and use those that are here")
    parser.add_argument("--json", type=pathlib.Path, default=HERE / "results" / "serve.json")
    arguments = parser.parse_args()
    report = {"machine": machine(), "command": "python " + " ".join(sys.argv)}
    print(report["machine"])
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.folder or pathlib.Path(scratch) / "models").absolute()
        kept = folder / "found.json"
        report |= json.loads(kept.read_text()) if kept.exists() else prepare(folder)
        print(json.dumps(report["accuracy"]))
        report["first score"] = {}
        paths = {f"Scorer {table}": f"{table}.scorer" for table in TABLES}
        for name, file in [*paths.items(), ("SavedModel portable", "portable"), ("SavedModel native", "native")]:
            found = first_score(FIRST[name.split()[0]], folder / "DeepFM" / file, arguments.starts)
            report["first score"][name] = found
            print(f"first score, {name}: {json.dumps(found)}", flush=True)
        report["models"] = {}
        for model in arguments.models:
            here = folder / model
            names = [name for name in arguments.sides if SIDES[name][0].exists() or name == "ONNX Runtime"]
            reason = convert(here) if "ONNX Runtime" in names else None
            failed = {"ONNX Runtime": reason} if reason else {}
            found = measure(here, names, failed, arguments.rounds, arguments.seconds, arguments.least)
            show(model, found)
            report["models"][model] = found
            arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
