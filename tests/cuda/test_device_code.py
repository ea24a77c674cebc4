"""The CUDA kernels without a GPU: run on the CPU against double loops, and what nvcc made of them, if it is there."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sysconfig

import emulated_module
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*command):
    return subprocess.run([str(x) for x in command], capture_output=True, text=True, timeout=500)


def compiled(*command):
    done = run(*command)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def compiler():
    found = shutil.which(os.environ.get("CXX", "g++"))
    if not found:
        pytest.skip("there is no C++ compiler")
    return found


@pytest.fixture(scope="module")
def objects():
    """What nvcc made of each source, with warnings as errors, when the package was built."""
    info = json.loads((ROOT / "deepfm_ops" / "_build_info.json").read_text())
    if not info.get("cuda_architectures"):
        pytest.skip("deepfm_ops was built without nvcc")
    folder = ROOT / "build" / "-".join(["cuda", info["cuda_runtime"], *info["cuda_architectures"]])
    return info["cuda_architectures"], [folder / f"{source.stem}.o" for source in emulated_module.SOURCES]


def dump(*arguments):
    """What cuobjdump prints, which pip has put beside nvdisasm where no PATH leads."""
    folders = [str(path.parent) for path in pathlib.Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/cuobjdump")]
    env = {**os.environ, "PATH": os.pathsep.join([*folders, os.environ["PATH"]])}
    done = subprocess.run(["cuobjdump", *map(str, arguments)], capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def fuzz(compiler, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    source = ROOT / "tests" / "native" / "fuzz_cuda.cc"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]
    compiled(compiler, *flags, source, *emulated_module.kernels(), "-o", folder / "fuzz", "-pthread")
    return folder / "fuzz"


def test_on_the_cpu(fuzz):
    """Every feature, against double loops; outputs are poisoned before, and errors guard what is written."""
    done = run(fuzz, "350", "7")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "350 passed, 0 failed" in done.stdout


BROKEN_KERNELS = {
    "barrier": (
        "if (threadIdx.x < 40) __syncthreads();",
        "of block 0, 40 threads wait at a barrier that the others do not reach",
    ),
    "shuffle": (
        "if (threadIdx.x != 3) *out = __shfl_xor_sync(~0u, *out, 1);",
        "of block 0, 31 threads wait at a barrier that the others do not reach",
    ),
    "alignment": (
        "__ldg(reinterpret_cast<const uint4*>(out + 1));",
        "a load of 16 bytes that is not aligned",
    ),
}


# Threads, not fibers, wait for a minute at a barrier before they give up.
@pytest.mark.parametrize(("kind", "threads"), [*((kind, False) for kind in BROKEN_KERNELS), ("alignment", True)])
def test_broken_kernels_abort(kind, threads, compiler, tmp_path):
    body, message = BROKEN_KERNELS[kind]
    source = tmp_path / "broken.cc"
    source.write_text(
        f'#include "{ROOT}/csrc/cuda/launch.h"\n'
        "using namespace deepfm::cuda;\n"
        f"__global__ void Broken(float* out) {{ (void)out; {body} }}\n"
        "int main() { alignas(16) static float x[8]; Launch(Broken, 1, 64, nullptr, &x[0]); }\n"
    )
    flags = ["-DDEEPFM_EMULATE_WITH_THREADS"] if threads else []
    compiled(compiler, "-std=c++17", *flags, source, "-o", tmp_path / "broken", "-pthread")
    done = run(tmp_path / "broken")
    assert done.returncode != 0 and message in done.stderr


def test_no_kernel_spills(objects):
    """No kernel of ours keeps anything in local memory (the sort's are its library's)."""
    architectures, paths = objects
    kernels = 0
    for path in paths:
        text = dump("--dump-resource-usage", path)
        for name, stack, local in re.findall(r"Function (\S+):\n.*STACK:(\d+).*LOCAL:(\d+)", text):
            if "deepfm" in name and "3cub" not in name:
                kernels += 1
                assert stack == local == "0", (path.name, name)
    assert kernels > 100 * len(architectures)


def test_loads_are_wide(objects):
    """The forward reads rows of four floats with one instruction; its rows in flight stay in registers."""
    architectures, paths = objects
    path = next(path for path in paths if path.stem == "forward")
    wide = 0
    for architecture in architectures:
        for function in dump("--dump-sass", "-arch", f"sm_{architecture}", path).split("Function : ")[1:]:
            name = function.split()[0]
            assert not re.search(r"\b(LDL|STL)\b", function), name
            if re.search(r"7ForwardIfLi4E", name):
                wide += 1
                assert len(re.findall(r"LDG\.E\.128", function)) >= 5, name
    assert wide == 2 * len(architectures)  # of int32 and int64 indices
