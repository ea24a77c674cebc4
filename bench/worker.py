"""Runs the sides of one environment for bench/op.py: `python bench/worker.py SIDES`, commands on standard input.

SIDES is a module here with `sides(case, table, indices, values) -> {name: {"forward": f, "gradient": f}}`, whose
functions take the number of an index set, and `result(kind, value)`, which makes NumPy arrays of what they return.
"""

import importlib
import json
import os
import sys
import time

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
channel = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print must not get between the answers


def main():
    module, made = importlib.import_module(sys.argv[1]), {}
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if command["do"] == "load":
                made.clear()
                data = [np.load(f"{command['folder']}/{name}.npy") for name in ("table", "indices", "values")]
                from common import Case

                made.update(module.sides(Case(**command["case"]), *data))
                answer = {side: list(kinds) for side, kinds in made.items()}
            else:
                function = made[command["side"]][command["kind"]]
                if command["do"] == "result":
                    arrays = module.result(command["kind"], function(0))
                    np.savez(command["path"], *arrays)
                    answer = None
                else:
                    times = []
                    for i in range(command["calls"] + 1):
                        start = time.perf_counter()
                        seconds = function(i % 3)  # a float: the side timed its own loop
                        times.append((seconds if isinstance(seconds, float) else time.perf_counter() - start) * 1e3)
                    answer = times[1:]
            reply = {"ok": answer}
        except Exception as error:  # the bench goes on without this side, and says why
            reply = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        print(json.dumps(reply), file=channel, flush=True)


if __name__ == "__main__":
    main()
