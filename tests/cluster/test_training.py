"""Training over real processes on this machine."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("training.py")
LIMIT = 200  # seconds, and only against hanging


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the chief of two servers and two workers found."""
    out = tmp_path_factory.mktemp("cluster") / "found.json"
    command = [sys.executable, "-m", "deepfm_ops.cluster", "launch", "--ps", "2", "--workers", "2", str(SCRIPT), str(out)]
    env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "TF_NUM_INTRAOP_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=env)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return json.loads(out.read_text())


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
