"""The GPU's kernels with g++, from their CUDA sources and a header that runs them on a CPU, and the module of them."""

import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import pathlib
import shlex
import subprocess
import sysconfig

CSRC = pathlib.Path(__file__).resolve().parents[2] / "csrc"
BUILD = CSRC.parent / "build"
SOURCES = sorted(CSRC.glob("cuda/*.cu"))
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden"]
COMPILER = shlex.split(os.environ.get("CXX", "c++"))


def run(*arguments):
    done = subprocess.run([*COMPILER, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


@contextlib.contextmanager
def folder_of(name, sources, flags):
    """(a folder of `build` for what is made of these sources and all headers, whether it was made before).

    Several test processes come here at once: one makes it, the others wait.
    """
    headers = sorted(path for kind in ("*.h", "*.cuh") for path in CSRC.glob(f"**/{kind}"))
    parts = [*(path.read_bytes() for path in (*sources, *headers)), repr((COMPILER, flags)).encode()]
    folder = BUILD / f"{name}-{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder, (folder / "made").exists()
        (folder / "made").touch()


def compile_all(folder, sources, flags):
    targets = [folder / f"{source.name}.o" for source in sources]

    def compile_one(source, target):
        run(*flags, "-x", "c++", "-c", source, "-o", target)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, targets))
    return targets


@functools.cache
def kernels():
    """The objects of the CUDA kernels for a CPU, compiled without a warning; whoever runs them has them from here."""
    flags = [*FLAGS, "-Wall", "-Wextra", "-Werror"]
    with folder_of("emulated_kernels", SOURCES, flags) as (folder, made):
        return [folder / f"{source.name}.o" for source in SOURCES] if made else compile_all(folder, SOURCES, flags)


@functools.cache
def load():
    """The module _cuda_emulated."""
    import pybind11

    includes = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    flags = [*FLAGS, "-DDEEPFM_EMULATED", *includes]
    sources = [CSRC / "python" / "gpu" / "cuda.cc", CSRC / "python" / "calls.cc"]
    sources += [CSRC / "kernels" / "checks.cc", CSRC / "kernels" / "scratch.cc"]
    with folder_of("emulated_module", [*SOURCES, *sources], flags) as (folder, made):
        library = folder / f"_cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
        if not made:
            run("-shared", "-o", library, *kernels(), *compile_all(folder, sources, flags), "-pthread")
    loader = importlib.machinery.ExtensionFileLoader("_cuda_emulated", str(library))
    found = importlib.util.module_from_spec(importlib.util.spec_from_loader("_cuda_emulated", loader))
    loader.exec_module(found)
    return found
