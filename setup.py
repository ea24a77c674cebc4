"""Builds the native library next to the package; pyproject.toml holds the rest.

DEEPFM_OPS_BUILD=auto    compile; without a compiler or TensorFlow, install the fallback and say so (default)
DEEPFM_OPS_BUILD=native  compile, or fail
DEEPFM_OPS_BUILD=kernels compile what the scorer needs, without TensorFlow, or fail
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
import sysconfig

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).resolve().parent
VERSIONS = runpy.run_path(str(ROOT / "deepfm_ops" / "_version.py"))
TENSORFLOW = VERSIONS["TENSORFLOW"]
MODE = os.environ.get("DEEPFM_OPS_BUILD", "auto")
if MODE not in ("auto", "native", "kernels", "python"):
    sys.exit(f"DEEPFM_OPS_BUILD must be auto, native, kernels or python, got {MODE!r}")
CXX = os.environ.get("CXX", "c++")
COMPILE = MODE in ("native", "kernels") or (MODE == "auto" and shutil.which(CXX) is not None)

FLAGS = {  # one body of the loops, one build per instruction set
    "fm_cpu_avx2.cc": ["-mavx2", "-mfma", "-mf16c"],
    "fm_cpu_avx512.cc": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}


class BuildNative(build_ext):
    """Compiles csrc/ into two libraries and writes _build_info.json beside them.

    _kernels: the kernels on NumPy arrays; needs no TensorFlow.
    _native.so: the TensorFlow ops, for the TensorFlow that is installed now.
    """

    def get_ext_filename(self, fullname):
        name = super().get_ext_filename(fullname)
        return os.path.join(*fullname.split(".")) + ".so" if fullname.split(".")[-1] == "_native" else name

    def library(self, name):
        return pathlib.Path(self.get_ext_fullpath(f"deepfm_ops.{name}"))

    def run(self):
        info = self.library("_native").with_name("_build_info.json")
        info.unlink(missing_ok=True)
        built = {}
        try:
            kernels = self.compile("kernels", [])
            self.build_module(kernels)
            if MODE == "kernels":
                self.library("_native").unlink(missing_ok=True)
                built = {"error": "deepfm_ops was installed with DEEPFM_OPS_BUILD=kernels, without its op"}
            else:
                built = self.build_op(kernels)
        except Exception as error:
            if MODE in ("native", "kernels"):
                raise
            self.library("_native").unlink(missing_ok=True)
            built = {"error": f"the native library could not be built: {error}"}
            print(f"deepfm_ops: {built['error']}; installing the pure-Python fallback", file=sys.stderr)
        info.parent.mkdir(parents=True, exist_ok=True)
        info.write_text(json.dumps(built))

    def get_outputs(self):
        libraries = [self.library("_kernels"), self.library("_native")]
        files = [*libraries, libraries[0].with_name("_build_info.json")]
        return [str(file) for file in files if file.exists()]

    def compile(self, folder, flags, tag=""):
        """The objects of csrc/<folder>; those that are newer than their source and all headers are kept."""
        headers = max(path.stat().st_mtime for path in [*ROOT.glob("csrc/**/*.h"), ROOT / "setup.py"])
        objects = ROOT / "build" / f"{folder}{tag}"
        objects.mkdir(parents=True, exist_ok=True)

        def compile_one(source):
            target = objects / (source.stem + ".o")
            if not target.exists() or target.stat().st_mtime < max(headers, source.stat().st_mtime):
                options = ["-std=c++17", "-O3", "-fPIC", "-Wall", *FLAGS.get(source.name, []), *flags]
                subprocess.run([CXX, *options, "-c", str(source), "-o", str(target)], check=True)
            return str(target)

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(compile_one, sorted(ROOT.glob(f"csrc/{folder}/*.cc"))))

    def link(self, library, arguments):
        # A new file, not new bytes in the old one: a process may have the old one mapped.
        library.parent.mkdir(parents=True, exist_ok=True)
        fresh = library.with_name(library.name + ".new")
        subprocess.run([CXX, "-shared", "-o", str(fresh), *arguments], check=True)
        os.replace(fresh, library)

    def build_module(self, kernels):
        import pybind11

        includes = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
        tag = f"-{sysconfig.get_config_var('SOABI')}"
        self.link(
            self.library("_kernels"),
            [*self.compile("python", ["-fvisibility=hidden", *includes], tag), *kernels, "-pthread"],
        )

    def build_op(self, kernels):
        import tensorflow as tf

        if tf.__version__.split(".")[:2] != TENSORFLOW.split("."):
            raise RuntimeError(f"needs TensorFlow {TENSORFLOW}, found {tf.__version__}")
        flags = [flag.replace("-I", "-isystem") for flag in tf.sysconfig.get_compile_flags()]
        objects = [*self.compile("tf", flags, f"-{tf.__version__}"), *kernels]
        self.link(self.library("_native"), ["-Wl,-z,defs", *objects, *tf.sysconfig.get_link_flags()])
        compiler = subprocess.run([CXX, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
        return {"tensorflow": tf.__version__, "compiler": compiler, "cuda_architectures": []}


if not COMPILE:  # nothing stale may be taken for this build's
    for stale in [*ROOT.glob("deepfm_ops/*.so"), ROOT / "deepfm_ops" / "_build_info.json"]:
        stale.unlink(missing_ok=True)

SERVE = ["fastapi", "uvicorn", "httptools", "orjson"]
TEST = ["pytest", "pytest-xdist", "hypothesis", "pandas", "matplotlib", *SERVE, "ruff", "clang-format"]
setup(
    version=VERSIONS["__version__"],
    ext_modules=[Extension(f"deepfm_ops.{name}", sources=[]) for name in ("_kernels", "_native")] if COMPILE else [],
    cmdclass={"build_ext": BuildNative},
    setup_requires=[f"tensorflow-cpu=={TENSORFLOW}.*"] if COMPILE and MODE != "kernels" else [],
    extras_require={
        "cpu": [f"tensorflow-cpu=={TENSORFLOW}.*"],
        "gpu": [f"tensorflow=={TENSORFLOW}.*"],
        "data": ["pandas"],
        "demo": ["pandas", "matplotlib"],
        "serve": SERVE,
        "test": TEST,
    },
)
