"""Data parallel training, under MirroredStrategy and MultiWorkerMirroredStrategy: what one process does, to 1e-6."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys

import keras
import numpy as np
from testing import LIGHT, REFERENCE_MODE

SCRIPT = pathlib.Path(__file__).parent / "replicated_training.py"
LIMIT = 600  # seconds, of all processes


@contextlib.contextmanager
def free_ports(number):
    """Of this machine, as long as nobody takes them in between."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [str(each.getsockname()[1]) for each in sockets]
    yield ports


def trained(folder, environments):
    """Runs the script once in each environment; {name of the run: its arrays}."""
    running = []
    try:
        for environment in environments:
            command = [sys.executable, str(SCRIPT), str(folder)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            running.append(subprocess.Popen(command, env={**os.environ, **LIGHT, **environment}, **pipes))
        for process in running:
            out, _ = process.communicate(timeout=LIMIT)
            assert process.returncode == 0, out[-4000:]
    finally:
        for process in running:
            process.kill()
            process.wait(30)
    return {path.stem: dict(np.load(path)) for path in folder.glob("*.npz")}


def apart(one, other):
    """{name: by how much} for the arrays that are not those of one process; text says so itself."""
    found = {}
    for name in one.keys() | {name for name in other if not name.startswith("refused")}:
        if name not in one or name not in other or one[name].shape != other[name].shape:
            found[name] = "missing, or of another shape"
        elif "averages_shown_as" not in name:  # which is of their bits
            a, b = one[name].astype(np.float64), other[name].astype(np.float64)
            difference = np.abs(a - b) / np.maximum(1, np.abs(a))
            if not (difference <= 1e-6).all():
                found[name] = difference.max()
    return found


def test_replicas_train_as_one_process(tmp_path):
    """Two replicas in one process, and two processes: tables, dense weights, slots, averages, losses, metrics, scores.

    Batches are odd, and the last one has one sample, so that a replica has none of it.
    """
    with free_ports(2) as ports:
        cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
        configs = [json.dumps({"cluster": cluster, "task": {"type": "worker", "index": i}}) for i in range(2)]
        workers = [] if REFERENCE_MODE else [{"TF_CONFIG": config} for config in configs]
        runs = trained(tmp_path, [{}, *workers])
    one = runs.pop("one")
    assert len(one) > 100 and not any(np.isnan(x).any() for x in one.values() if x.dtype.kind == "f")
    assert runs.keys() == {"mirrored"} | ({"worker_0", "worker_1"} if workers else set())
    assert {name: apart(one, arrays) for name, arrays in runs.items()} == dict.fromkeys(runs, {})
    for name, arrays in runs.items():
        errors = {key.removeprefix("refused: "): str(x) for key, x in arrays.items() if key.startswith("refused")}
        assert "AUC was made outside of the strategy" in errors["metric"]
        assert "indices[0,0] = 1000000 is not in [0, " in errors["index"]  # of one replica, and of each process
        if name == "mirrored":
            assert "LazyAdam was made outside of the strategy" in errors["optimizer"]
        else:
            assert "same data, of which it takes its part, but they have 50, 51 samples" in errors["lengths"]
            assert "but they have 3, 2 batches" in errors["batches"]
            assert "outside of `with strategy.scope():`" in errors["predict"]
    if workers:
        a, b = runs["worker_0"], runs["worker_1"]
        assert [name for name in one if " weight " in name and (a[name] != b[name]).any()] == []
        saved = keras.models.load_model(tmp_path / "model.keras")
        weights = {f"recommended: weight {i} {v.name}": v.numpy() for i, v in enumerate(saved.weights)}
        assert all((a[name] == weights[name]).all() for name in weights) and len(weights) > 5
