"""Builds the native library next to the package; pyproject.toml holds the rest.

DEEPFM_OPS_BUILD=auto    compile; without a compiler or TensorFlow, install the fallback and say so (default)
DEEPFM_OPS_BUILD=native  compile, or fail
DEEPFM_OPS_BUILD=python  do not compile
"""

import concurrent.futures
import json
import os
import pathlib
import runpy
import shutil
import subprocess
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).resolve().parent
VERSIONS = runpy.run_path(str(ROOT / "deepfm_ops" / "_version.py"))
TENSORFLOW = VERSIONS["TENSORFLOW"]
MODE = os.environ.get("DEEPFM_OPS_BUILD", "auto")
if MODE not in ("auto", "native", "python"):
    sys.exit(f"DEEPFM_OPS_BUILD must be auto, native or python, got {MODE!r}")
CXX = os.environ.get("CXX", "c++")
COMPILE = MODE == "native" or (MODE == "auto" and shutil.which(CXX) is not None)

FLAGS = {  # one body of the loops, one build per instruction set
    "fm_cpu_avx2.cc": ["-mavx2", "-mfma", "-mf16c"],
    "fm_cpu_avx512.cc": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}


class BuildNative(build_ext):
    """Compiles csrc/ into deepfm_ops/_native.so and writes _build_info.json beside it."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self):
        library = pathlib.Path(self.get_ext_fullpath("deepfm_ops._native"))
        info = library.with_name("_build_info.json")
        info.unlink(missing_ok=True)
        try:
            built = self.compile_library(library)
        except Exception as error:
            if MODE == "native":
                raise
            library.unlink(missing_ok=True)
            built = {"error": f"the native library could not be built: {error}"}
            print(f"deepfm_ops: {built['error']}; installing the pure-Python fallback", file=sys.stderr)
        info.parent.mkdir(parents=True, exist_ok=True)
        info.write_text(json.dumps(built))

    def get_outputs(self):
        library = self.get_ext_fullpath("deepfm_ops._native")
        return [f for f in (library, os.path.join(os.path.dirname(library), "_build_info.json")) if os.path.exists(f)]

    def compile_library(self, library):
        import tensorflow as tf

        if tf.__version__.split(".")[:2] != TENSORFLOW.split("."):
            raise RuntimeError(f"needs TensorFlow {TENSORFLOW}, found {tf.__version__}")
        headers = max(path.stat().st_mtime for path in [*ROOT.glob("csrc/**/*.h"), ROOT / "setup.py"])
        objects = ROOT / "build" / f"native-{tf.__version__}"  # kept: a second build compiles what changed
        objects.mkdir(parents=True, exist_ok=True)

        def compile_one(source):
            target = objects / (source.stem + ".o")
            if target.exists() and target.stat().st_mtime > max(headers, source.stat().st_mtime):
                return target
            flags = ["-std=c++17", "-O3", "-fPIC", "-Wall", *FLAGS.get(source.name, [])]
            if source.parent.name == "tf":
                flags += [flag.replace("-I", "-isystem") for flag in tf.sysconfig.get_compile_flags()]
            subprocess.run([CXX, *flags, "-c", str(source), "-o", str(target)], check=True)
            return target

        sources = sorted([*ROOT.glob("csrc/kernels/*.cc"), *ROOT.glob("csrc/tf/*.cc")])
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            linked = [str(target) for target in pool.map(compile_one, sources)]
        library.parent.mkdir(parents=True, exist_ok=True)
        # A new file, not new bytes in the old one: a process may have the old one mapped.
        fresh = library.with_suffix(".so.new")
        subprocess.run(
            [CXX, "-shared", "-Wl,-z,defs", "-o", str(fresh), *linked, *tf.sysconfig.get_link_flags()], check=True
        )
        os.replace(fresh, library)
        compiler = subprocess.run([CXX, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
        return {"tensorflow": tf.__version__, "compiler": compiler, "cuda_architectures": []}


if not COMPILE:  # nothing stale may be taken for this build's
    for name in ("_native.so", "_build_info.json"):
        (ROOT / "deepfm_ops" / name).unlink(missing_ok=True)

TEST = ["pytest", "pytest-xdist", "hypothesis", "pandas", "matplotlib", "ruff", "clang-format"]
setup(
    version=VERSIONS["__version__"],
    ext_modules=[Extension("deepfm_ops._native", sources=[])] if COMPILE else [],
    cmdclass={"build_ext": BuildNative},
    setup_requires=[f"tensorflow-cpu=={TENSORFLOW}.*"] if COMPILE else [],
    extras_require={
        "cpu": [f"tensorflow-cpu=={TENSORFLOW}.*"],
        "gpu": [f"tensorflow=={TENSORFLOW}.*"],
        "data": ["pandas"],
        "demo": ["pandas", "matplotlib"],
        "test": TEST,
    },
)
