"""What the tests share: the oracle, the inputs' forms, tolerances."""

import contextlib
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading

import numpy as np
import tensorflow as tf

import deepfm_ops
from deepfm_ops import _library, reference

REFERENCE_MODE = os.environ.get("DEEPFM_OPS_BACKEND") == "reference"
FUNCTIONS = {"op": deepfm_ops.fm_interaction, "reference": reference.fm_interaction}
DTYPES = {"float32": tf.float32, "float64": tf.float64, "bfloat16": tf.bfloat16, "float16": tf.float16}


def runnable_instruction_sets():
    """The builds of the native loops that this machine runs; none in reference mode."""
    if REFERENCE_MODE:
        return []
    names, before = [], _library.instruction_set()
    for name in ("baseline", "avx2", "avx512"):
        try:
            _library.instruction_set(name)
            names.append(name)
        except ValueError:
            pass
    _library.instruction_set(before)
    return names


def oracle(table, samples, output="scalar", order=2, field_weights=None):
    """The definition, in float64: the sum over all pairs of fields, and over all triples, not the shortcuts.

    Args:
        table: [V, K].
        samples: per sample a list of fields, each a list of (index, value).
        output: "scalar" or "vector".
        order: 2, or 3 for triples too.
        field_weights: of fields f > h at f * (f - 1) / 2 + h; None: all ones.

    """
    table = np.asarray(table, np.float64)
    result = np.zeros((len(samples), table.shape[1]))
    for b, fields in enumerate(samples):
        e = [sum((np.float64(x) * table[i] for i, x in field), np.zeros(table.shape[1])) for field in fields]
        for f in range(len(e)):
            for h in range(f):
                result[b] += e[f] * e[h] * (1 if field_weights is None else field_weights[f * (f - 1) // 2 + h])
                for i in range(h if order == 3 else 0):
                    result[b] += e[f] * e[h] * e[i]
    return result if output == "vector" else result.sum(1, keepdims=True)


def dense_samples(indices, values=None):
    values = np.ones_like(indices, float) if values is None else values
    return [[[(i, x)] for i, x in zip(row, xs, strict=True)] for row, xs in zip(indices, values, strict=True)]


def ragged_samples(indices, values, row_splits):
    return [
        [[(indices[p], values[p])] for p in range(a, b)] for a, b in zip(row_splits[:-1], row_splits[1:], strict=True)
    ]


def tolerance(dtype, samples, table):
    """A bound from the accumulation's epsilon and the magnitude of what is summed."""
    eps = 1e-15 if dtype == "float64" else 1.2e-7
    largest = max((abs(x) for fields in samples for field in fields for _, x in field), default=1.0)
    fields = max((len(fields) for fields in samples), default=1)
    magnitude = (fields * largest * max(1e-3, float(np.abs(np.asarray(table, float)).max(initial=0)))) ** 2
    return 8 * eps * magnitude * max(1, np.shape(table)[1])


LIMIT = 300  # seconds, of a process
# The environment of processes without pandas and matplotlib, which Keras imports if they are there: a third of the time
# that importing TensorFlow takes.
_LIGHT = str(pathlib.Path(__file__).with_name("light"))
LIGHT = {"PYTHONPATH": os.pathsep.join([_LIGHT, *filter(None, [os.environ.get("PYTHONPATH")])])}


def run_python(code, folder=None, **environment):
    """Runs `code` in a fresh process, in `folder`, and returns what it printed."""
    env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=env, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@functools.cache
def _warm():
    """The process of warm.py, that the others are forks of."""
    env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, str(pathlib.Path(__file__).with_name("warm.py"))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=env)


class Process:
    """A process that has imported TensorFlow at once: a fork of one that did, and knows nothing of ours.

    There is one at a time: the next one kills whom nobody has waited for. `stdout` can be read line by line.

    Args:
        code: what it runs.
        arguments: its sys.argv[1:].
        folder: its working directory.
        environment: changes of the environment, of which the import of TensorFlow sees nothing.

    """

    _running = None

    def __init__(self, code, *arguments, folder=None, **environment):
        if Process._running:  # of a test that failed
            Process._running.kill()
            Process._running.wait()
        self._folder = tempfile.TemporaryDirectory()
        out, self._err = (os.path.join(self._folder.name, name) for name in ("out", "err"))
        os.mkfifo(out)
        request = {"code": code, "arguments": arguments, "folder": os.path.abspath(folder or ""), "out": out}
        request |= {"err": self._err, "environment": {**os.environ, **environment}}
        _warm().stdin.write(json.dumps(request, default=str).encode() + b"\n")
        self.pid = int(_warm().stdout.readline())
        self._limit = threading.Timer(LIMIT, self.kill)
        self._limit.daemon = True
        self._limit.start()
        self.stdout = open(out)
        Process._running = self

    def kill(self):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(self.pid, signal.SIGKILL)

    def wait(self):
        """(exit code, what it printed and nobody has read, its errors), when it has ended."""
        with self._folder, self.stdout:
            printed, code = self.stdout.read(), int(_warm().stdout.readline())
            self._limit.cancel()
            Process._running = None
            return code, printed, pathlib.Path(self._err).read_text()


def run_with_tensorflow(code, folder=None, **environment):
    """`run_python`, in a `Process`."""
    code, printed, errors = Process(code, folder=folder, **environment).wait()
    assert code == 0, errors[-4000:]
    return printed


def skewed(rows=200, features=60, seed=0):
    """(indices, values), labels of random samples of three fields."""
    r = np.random.default_rng(seed)
    indices = (features * r.random((rows, 3)) ** 2).astype(np.int64)  # some features often, some hardly ever
    return (indices, r.normal(size=(rows, 3)).astype("f")), r.integers(0, 2, (rows, 1)).astype("f")


def counts_of(indices, values, features=60):
    """How often each feature occurs, with a value other than zero."""
    return np.bincount(indices[values != 0], minlength=features)
