"""Builds the GPU's module with g++, from its CUDA sources and a header that runs them on a CPU, and loads it."""

import concurrent.futures
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
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-DDEEPFM_EMULATED"]


@functools.cache
def load():
    """The module _cuda_emulated; what was built of the same sources before is taken."""
    import pybind11

    compiler = shlex.split(os.environ.get("CXX", "c++"))
    includes = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    sources = [*sorted(CSRC.glob("cuda/*.cu")), CSRC / "python" / "gpu" / "cuda.cc", CSRC / "python" / "calls.cc"]
    sources += [CSRC / "kernels" / "checks.cc", CSRC / "kernels" / "scratch.cc"]
    headers = sorted(path for kind in ("*.h", "*.cuh") for path in CSRC.glob(f"**/{kind}"))
    parts = [*(path.read_bytes() for path in (*sources, *headers)), repr((compiler, FLAGS, includes)).encode()]
    folder = BUILD / f"emulated_module-{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}"
    library = folder / f"_cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # several test processes come here at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():

            def compile_one(source):
                target = folder / f"{source.name}.o"
                subprocess.run(
                    [*compiler, *FLAGS, *includes, "-x", "c++", "-c", source, "-o", target], check=True, timeout=300
                )
                return target

            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(compile_one, sources))
            fresh = folder / "fresh.so"
            subprocess.run([*compiler, "-shared", "-o", fresh, *objects, "-pthread"], check=True, timeout=300)
            fresh.rename(library)
    loader = importlib.machinery.ExtensionFileLoader("_cuda_emulated", str(library))
    found = importlib.util.module_from_spec(importlib.util.spec_from_loader("_cuda_emulated", loader))
    loader.exec_module(found)
    return found
