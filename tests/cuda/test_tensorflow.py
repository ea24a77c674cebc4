"""The op's kernels for GPUs, without one: emulated, on a device of host memory; the real ones, as far as they load."""

import os
import pathlib
import signal
import subprocess
import sys

import emulated
import pytest
from testing import REFERENCE_MODE, run_with_tensorflow

from deepfm_ops import _build, _library

pytestmark = pytest.mark.skipif(REFERENCE_MODE, reason="kernels of the native op")
HERE = pathlib.Path(__file__).parent
READ_ON_THE_HOST = """
import ctypes, emulated
emulated.load()
import tensorflow as tf, deepfm_ops
table = tf.Variable(tf.ones((4, 2)))
y = deepfm_ops.fm_interaction(table, [[0, 1]])
print(table.device, y.numpy(), flush=True)
# From now on memory stays closed while a kernel runs: it does what the host does that reads memory of the device.
ctypes.CDLL(str(emulated.BUILD / "_native.so")).keep_device_memory_closed()
print("reads", flush=True)
deepfm_ops.fm_interaction(table, [[0, 1]])
print("read", flush=True)
"""
KERNELS = """
import json
import deepfm_ops.ops
from tensorflow.python.framework import kernels
names = ("FmInteraction", "ResourceFmInteraction", "FmInteractionGrad", "ResourceFmInteractionGrad", "ResourceFmUpdate",
         "SparseUpdate")
found = {}
for name in names:
    for kernel in kernels.get_registered_kernels_for_op(f"DeepfmOps{name}").kernel:
        types = [t for c in kernel.constraint if c.name == "T" for t in c.allowed_values.list.type]
        found.setdefault(name, []).append((kernel.device_type, *types))
print(json.dumps([deepfm_ops.native_info(), {name: sorted(where) for name, where in found.items()}]))
"""


@pytest.fixture(scope="module")
def device():
    emulated.build()


def python(*arguments):
    env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "DEEPFM_OPS_BACKEND": "auto"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (HERE, HERE.parents[1])))
    return subprocess.run([sys.executable, *arguments], cwd=HERE, env=env, capture_output=True, text=True, timeout=500)


def test_on_a_device(device):
    """Its cases are those of device_tests.py."""
    done = python("-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "--tb=short", "device_tests.py")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_the_host_cannot_read_memory_of_the_device(device):
    done = python("-c", READ_ON_THE_HOST)
    assert done.stdout.splitlines()[-1] == "reads" and "GPU:0 [[2.]]" in done.stdout, done.stderr
    assert done.returncode == -signal.SIGSEGV


def test_the_library_as_it_was_built():
    """With CUDA or without, and here without a driver: it loads, and has the kernels that it says it has."""
    import json

    info, kernels = json.loads(run_with_tensorflow(KERNELS).splitlines()[-1])
    assert info["native"] and len(kernels) == 6
    gpu = [["GPU", 1], ["GPU", 14], ["GPU", 19]]  # float32, bfloat16, float16
    for where in kernels.values():
        assert where == [["CPU"], *(gpu if info["cuda_architectures"] else [])]
    if not info["cuda_architectures"]:
        assert info["cuda_runtime"] is None and "was built without CUDA" in info["cuda_reason"]
    elif info["cuda_driver"] is None:
        text = f"was built with CUDA {info['cuda_runtime']}, whose kernels need a driver for CUDA"
        assert text in info["cuda_reason"] and info["cuda_reason"].endswith(", found none")


# ---------------------------------------------------------------------------------------------
# Which kernels are used, and which are built


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (None, r"was built with CUDA 13.0, whose kernels need a driver for CUDA 13.0 or newer \(580\), found none"),
        (
            "12.4",
            r"a driver for CUDA 13.0 or newer \(580\), found one for CUDA 12.4; update it, or with nvcc of its CUDA",
        ),
        ("13.0", "TensorFlow finds no GPU"),
        ("14.1", "TensorFlow finds no GPU"),
    ],
)
def test_a_driver(driver, reason, monkeypatch):
    built = {**_library._build_info(_library._PACKAGE), "cuda_architectures": ["80", "90"], "cuda_runtime": "13.0"}
    monkeypatch.setattr(_library, "_build_info", lambda folder: built)
    monkeypatch.setattr(_library, "_cuda_driver", lambda: driver)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(_library.why_not_on_gpus.__wrapped__())


def test_architectures_that_a_gpu_runs():
    runs = {
        capability: _library._runs_on(capability, ["80", "90"])
        for capability in [(7, 5), (8, 0), (8, 9), (9, 0), (12, 0)]
    }
    assert runs == {(7, 5): False, (8, 0): True, (8, 9): True, (9, 0): True, (12, 0): True}
    assert not _library._runs_on((9, 0), ["80", "100"])  # neither its machine code, nor PTX that is old enough


def fake_nvcc(folder, version):
    major, minor = version.split(".")
    folder.mkdir(parents=True)
    path = folder / "nvcc"
    path.write_text(
        f"""#!/bin/sh
[ "$1" = --dryrun ] || {{ echo "nvcc fatal : no" >&2; exit 1; }}
echo '#$ LIBRARIES=  "-L{folder}/lib"' >&2
echo '#$ gcc -D__CUDACC_VER_MAJOR__={major} -D__CUDACC_VER_MINOR__={minor}' >&2
"""
    )
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def no_cuda(monkeypatch):
    """As on a machine without CUDA."""
    for name in ("CUDA_HOME", "DEEPFM_OPS_CUDA", "DEEPFM_OPS_CUDA_ARCHITECTURES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_build, "CUDA_ROOTS", ())
    monkeypatch.setenv("PATH", "/nowhere")
    return monkeypatch


def test_which_nvcc(no_cuda, tmp_path):
    assert _build.find_nvcc() is None
    newer = fake_nvcc(tmp_path / "cuda-13" / "bin", "13.0")
    no_cuda.setenv("PATH", f"{tmp_path}/cuda-13/bin:/bin")
    assert _build.find_nvcc() == (newer, "13.0", [f"-L{tmp_path}/cuda-13/bin/lib"])
    older = fake_nvcc(tmp_path / "cuda-12" / "bin", "12.5")
    no_cuda.setenv("CUDA_HOME", str(tmp_path / "cuda-12"))
    assert _build.find_nvcc()[:2] == (older, "12.5")  # whatever stands first
    no_cuda.delenv("CUDA_HOME")
    no_cuda.setattr(_build, "CUDA_ROOTS", (f"{tmp_path}/cuda-12*",))
    assert _build.find_nvcc()[:2] == (older, "12.5")


def test_cuda_is_asked_for_or_not(no_cuda, tmp_path, capfd):
    def built():
        return _build.build_cuda(emulated.CSRC / "cuda", tmp_path)

    assert built() is None
    assert capfd.readouterr().err == (
        "deepfm_ops: no kernels for GPUs: there is no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda\n"
    )
    no_cuda.setenv("DEEPFM_OPS_CUDA", "1")
    with pytest.raises(RuntimeError, match="DEEPFM_OPS_CUDA=1, but there is no nvcc on PATH"):
        built()
    fake_nvcc(tmp_path / "bin", "12.5")
    no_cuda.setenv("PATH", f"{tmp_path}/bin:/bin")
    with pytest.raises(RuntimeError, match="DEEPFM_OPS_CUDA=1, but .*nvcc failed: nvcc fatal : no"):
        built()
    no_cuda.setenv("DEEPFM_OPS_CUDA", "auto")
    assert built() is None and "no kernels for GPUs: " in capfd.readouterr().err
    no_cuda.setenv("DEEPFM_OPS_CUDA", "0")
    assert built() is None and capfd.readouterr().err == ""
    no_cuda.setenv("DEEPFM_OPS_CUDA", "yes")
    with pytest.raises(RuntimeError, match="DEEPFM_OPS_CUDA must be auto, 0 or 1, got 'yes'"):
        built()
    no_cuda.setenv("DEEPFM_OPS_CUDA", "1")
    no_cuda.setenv("DEEPFM_OPS_CUDA_ARCHITECTURES", "8.0")
    with pytest.raises(RuntimeError, match="DEEPFM_OPS_CUDA_ARCHITECTURES must be numbers .*'80 90', got '8.0'"):
        built()
