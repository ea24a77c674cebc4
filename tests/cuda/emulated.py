"""TensorFlow with a GPU that is made of host memory, and this package with its CUDA kernels run on the CPU."""

import ctypes
import json
import pathlib

import emulated_module

from deepfm_ops import _build, _library

HERE = pathlib.Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
BUILD = HERE.parents[1] / "build" / "emulated"


def build(folder=BUILD):
    """Makes of `folder` what the package's own folder is: an op library, with GPU kernels that are emulated.

    Of several processes one does it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _library._locked(folder):
        _build_all(folder)


def _build_all(folder):
    tensorflow = _build.find_tensorflow()
    flags = [flag.replace("-I", "-isystem") for flag in tensorflow[1]]
    objects = folder / f"tf-{tensorflow[0]}"
    device = _build.compile_folder(HERE, objects, flags)
    own, opens = (next(path for path in device if path.stem == name) for name in ("device", "open_memory"))
    _build.link(folder / "device.so", [own, *tensorflow[2]])
    cpu = _build.compile_folder(CSRC / "kernels", HERE.parents[1] / "build" / "kernels")
    cuda = _build.Cuda([*emulated_module.kernels(), opens], [], ["emulated"], None)
    op = HERE.parents[1] / "build" / f"tf-{tensorflow[0]}"  # the ops' objects are those of the package
    info = _build.build_op(CSRC / "tf", cpu, op, folder / "_native.so", tensorflow, cuda)
    (folder / "_build_info.json").write_text(json.dumps(info))


def load(folder=BUILD):
    """In a process that has run no op: the device, and the package that uses it."""
    from tensorflow.python.framework import load_library

    ctypes.CDLL(str(folder / "device.so"), ctypes.RTLD_GLOBAL)
    load_library.load_pluggable_device_library(str(folder / "device.so"))
    _library._PACKAGE = folder
