"""One measurement of bench/data.py in this process: `python bench/data_worker.py MODULE FUNCTION ARGUMENTS`.

MODULE.FUNCTION(clock, **ARGUMENTS), arguments in JSON, times its stages with `with clock(name)`; what it returns, and
the stages, are printed as JSON.
"""

import contextlib
import importlib
import json
import os
import resource
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
channel = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print must not get between the answers


def cpu_seconds():
    """Of all threads and of children that ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def peak():
    """The most memory this process has had, MB; pages of mapped files count."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Clock:
    """CPU and wall seconds of each stage, and the peak before it and at its end."""

    def __init__(self):
        self.stages = {}

    @contextlib.contextmanager
    def __call__(self, name):
        before, wall, cpu = peak(), time.perf_counter(), cpu_seconds()
        yield
        cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
        self.stages[name] = {"cpu": cpu, "wall": wall, "peak": peak(), "before": before}


def main():
    module, function, arguments = sys.argv[1:]
    clock = Clock()
    try:
        found = getattr(importlib.import_module(module), function)(clock, **json.loads(arguments))
        reply = {"stages": clock.stages, "found": found}
    except Exception as error:  # the bench goes on without this side, and says why
        reply = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    print(json.dumps(reply), file=channel, flush=True)


if __name__ == "__main__":
    main()
