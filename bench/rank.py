"""Measures ranking: `python bench/rank.py [--seconds S] [--items N] [--deep-items N] [--json FILE]`.

FM: the 100 best of a million items, K=16, for one user, beside one pass over the items' rows that does nothing with
them. DeepFM, F=39, K=16, MLP 3x400: 20,000 items, all with their deep part, and a shortlist of 1,000, beside scoring
the joined matrix. Both with drawn weights, in this process, without TensorFlow, whose threads would get in the way. A
call of `rank` encodes its user from a record; the joined matrix is there, indices and values. The scores must be those
of the joined rows before anything is timed, and sides take turns. The demo's models: the share of the 100 best of their
items that a shortlist finds.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import report_rank
from common import machine, statistics

from deepfm_ops import kernels
from deepfm_ops.scorer import Scorer

HERE = pathlib.Path(__file__).parent
K, SHORTLIST, THREADS = 100, 1000, 2
BLOCK = 1024  # numbers that the pass reads at a time


def made(folder):
    """(scorer, table of items, record of a user, joined indices and values)."""
    table, joined = np.load(folder / "items.npz"), np.load(folder / "joined.npz")
    record = json.loads((folder / "user.json").read_text())
    scorer = Scorer.load(folder / "model.scorer", threads=THREADS)
    return scorer, dict(table), record, (joined["indices"], joined["values"])


def check(positions, scores, joined):
    """Raises unless they are those of the joined rows, to 1e-5."""
    np.testing.assert_allclose(scores, joined[positions], rtol=0, atol=1e-5)
    np.testing.assert_allclose(scores, np.sort(joined)[::-1][: len(scores)], rtol=0, atol=1e-5)


def in_turns(sides, seconds):
    """{side: median and quartiles, ms} of functions that take turns."""
    times = {name: [] for name in sides}
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(next(iter(times.values()))) < 5:
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics(each) for name, each in times.items()}


def fm(folder, seconds):
    scorer, table, record, joined = made(folder)
    start = time.perf_counter()
    items = scorer.items(table, key="item")
    encoding = time.perf_counter() - start
    check(*scorer.rank(record, items, K), scorer.score(*joined))
    numbers = items.rows.reshape(-1)
    blocks = numbers[: len(numbers) // BLOCK * BLOCK].reshape(-1, BLOCK)
    every, users = np.arange(len(blocks))[np.newaxis], {name: [x] * 8 for name, x in record.items()}
    sides = {
        "one pass": lambda: kernels.read_rows(blocks, every, 0, THREADS),
        "rank": lambda: scorer.rank(record, items, K),
        "rank, 8 users": lambda: scorer.rank(users, items, K),
        "score of the joined matrix": lambda: scorer.score(*joined),
    }
    return {"items": len(items), "bytes": items.rows.nbytes, "encoding": encoding, "times": in_turns(sides, seconds)}


def deep(folder, seconds):
    scorer, table, record, joined = made(folder)
    items = scorer.items(table)
    check(*scorer.rank(record, items, K), scorer.score(*joined))
    sides = {
        "score of the joined matrix": lambda: scorer.score(*joined),
        "rank": lambda: scorer.rank(record, items, K),
        f"rank, shortlist {SHORTLIST}": lambda: scorer.rank(record, items, K, shortlist=SHORTLIST),
    }
    return {"items": len(items), "times": in_turns(sides, seconds)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30, help="of each comparison")
    parser.add_argument("--items", type=int, default=10**6)
    parser.add_argument("--deep-items", type=int, default=20_000)
    parser.add_argument("--json", type=pathlib.Path, default=HERE / "results" / "rank.json")
    arguments = parser.parse_args()
    report = {"machine": machine(), "command": "python " + " ".join(sys.argv)}
    print(report["machine"])
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        command = [sys.executable, str(HERE / "rank_models.py"), folder, arguments.items, arguments.deep_items]
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True, timeout=1800)
        report["demo"] = json.loads(done.stdout.splitlines()[-1])
        report["FM"] = fm(folder / "FM", arguments.seconds)
        report["DeepFM"] = deep(folder / "DeepFM", arguments.seconds)
    arguments.json.write_text(json.dumps(report, indent=1))
    for target in report_rank.targets(report):
        print(*target)


if __name__ == "__main__":
    main()
