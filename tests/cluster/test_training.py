"""Training over real processes on this machine."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from testing import LIGHT

SCRIPT = pathlib.Path(__file__).with_name("training.py")
LIMIT = 200  # seconds, and only against hanging


def launch(*arguments, servers=2, workers=2, restarts=0, before=()):
    counts = ["--ps", str(servers), "--workers", str(workers), "--restarts", str(restarts)]
    command = [sys.executable, "-m", "deepfm_ops.cluster", "launch", *counts, str(SCRIPT), *map(str, arguments)]
    env = {
        **os.environ,
        **LIGHT,
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TF_NUM_INTRAOP_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "-1",
    }
    done = subprocess.run([*before, *command], capture_output=True, text=True, timeout=LIMIT, env=env)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the chief of two servers and two workers left what it found."""
    folder = tmp_path_factory.mktemp("cluster")
    code, log = launch("equal", folder)
    assert code == 0, log[-5000:]
    return folder


@pytest.fixture
def found(folder):
    return json.loads((folder / "found.json").read_text())


def test_the_bits_of_one_process(found):
    assert found["equal"]
    assert found["scores"] == 0
    sharded, single = found["evaluated"]
    assert sharded == pytest.approx(single, rel=1e-5)


def test_a_bad_index_names_its_batch(found):
    assert found["bad"] == "batch 1: indices[8,2] = 300 is not in [0, 300)"


def test_a_worker_is_killed_and_comes_back(found):
    per_epoch = found["rows"] / 100
    assert found["batches"] == pytest.approx(2 * per_epoch, abs=2 * 2)  # each part ends with a batch of its own
    assert found["batches"] <= found["steps"] <= found["batches"] + 2  # what the killed one was at may be done twice
    assert found["losses"][1] < found["losses"][0]
    assert found["is another"]


def test_a_server_is_killed_then_the_chief_and_the_job_starts_again_with_more_servers(folder):
    code, log = launch("resumed", folder, workers=1, restarts=1)
    assert code != 0, log[-5000:]
    assert "is lost, and its rows with it" in log and "starts again, 1 of 1" in log
    assert (folder / "resumed.killed1").exists() and not (folder / "resumed.json").exists()
    code, log = launch("resumed", folder, servers=3, workers=1)
    assert code == 0, log[-5000:]
    whole, killed = (json.loads((folder / f"{name}.json").read_text()) for name in ("whole", "resumed"))
    assert killed == whole | {"servers": 3}


def test_bytes_of_a_step(tmp_path):
    alone = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode != 0:
        pytest.skip("no network of one's own can be made here")
    code, log = launch("traffic", tmp_path, workers=1, before=alone)
    assert code == 0, log[-5000:]
    for wire, found in json.loads((tmp_path / "traffic.json").read_text()).items():
        assert found["formula"] < found["seen"] < 1.05 * found["formula"] + 40_000, (wire, found)
