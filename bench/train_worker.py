"""Runs one side of bench/train.py: `python bench/train_worker.py MODULE SIDE ROWS`, numbers of steps on standard input.

MODULE has `step(side, rows, indices, labels)`, which returns a function from a batch's number to its loss.
"""

import importlib
import json
import os
import resource
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
channel = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print must not get between the answers


def main():
    module, side, rows = sys.argv[1], sys.argv[2], int(sys.argv[3])
    step, done = None, 0
    for line in sys.stdin:
        try:
            if step is None:
                from train import make_batches

                step = importlib.import_module(module).step(side, rows, *make_batches(rows))
            times, losses = [], []
            for _ in range(int(line) + 1):
                start = time.perf_counter()
                answer = step(done % 6)
                # A side that trains on files times its epochs itself.
                loss, seconds = answer if isinstance(answer, tuple) else (answer, time.perf_counter() - start)
                done += 1
                times.append(seconds * 1e3)
                losses += [] if loss is None else [float(loss)]
            memory = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
            reply = {"ms": times[1:], "losses": losses, "gigabytes": memory / 2**20}
        except Exception as error:  # the bench goes on without this side, and says why
            reply = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        print(json.dumps(reply), file=channel, flush=True)


if __name__ == "__main__":
    main()
