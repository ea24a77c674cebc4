"""Loads the native library, once, after comparing versions; says why when it cannot."""

import contextlib
import contextvars
import ctypes
import functools
import hashlib
import json
import logging
import os
import pathlib
import sys
import tempfile

from deepfm_ops import _build
from deepfm_ops._version import SUPPORTED, TENSORFLOW, __version__, supports
from deepfm_ops.files import replacing

KERAS_EXPORT = "keras.src.export"  # what Keras's export is made of
BACKENDS = ("auto", "native", "reference")
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps . (in deepfm_ops's source)"
DRIVERS = {12: 525, 13: 580}  # the first driver that runs programs of a CUDA: docs.nvidia.com/deploy/cuda-compatibility
_EXPORT = contextvars.ContextVar("export", default=None)  # "portable", "native", or None
_PACKAGE = pathlib.Path(__file__).parent
_SOURCES = _PACKAGE / "_csrc"  # there only if the op was left to its first use
_LOGGER = logging.getLogger("deepfm_ops")


def _build_info(folder):
    """What is known of the library in `folder`; empty if it was not compiled."""
    file = folder / "_build_info.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _cache(tensorflow):
    """The user's folder for the op of this package and this TensorFlow."""
    digest = hashlib.sha256(repr(tensorflow).encode())
    for path in sorted(path for path in _SOURCES.glob("**/*") if path.is_file()):
        digest.update(path.read_bytes())
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "deepfm_ops" / digest.hexdigest()[:32]


@contextlib.contextmanager
def _locked(folder):
    """Inside, no other process is; files are replaced whole, so that where folders cannot be locked nothing breaks."""
    import fcntl  # not on every system that the fallback runs on

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _compile(folder, tensorflow):
    """Compiles the carried op into `folder`, and writes down what came of it, an error too: it is tried once."""
    _LOGGER.warning("Compiling the native op for TensorFlow %s, once; it takes about a minute.", tensorflow[0])
    info, library = folder / "_build_info.json", folder / "_native.so"
    with tempfile.TemporaryDirectory() as objects, replacing(info) as fresh:
        try:
            kernels = [_SOURCES / "kernels.o"]
            built = _build.build_op(_SOURCES / "tf", kernels, pathlib.Path(objects), library, tensorflow)
        except RuntimeError as error:
            built = {"error": f"the native op could not be compiled: {error}; to try again, remove {info}"}
        fresh.write_text(json.dumps(built))


def _find(tf):
    """The folder of the library. An op that was left to its first use is compiled now, if it never was.

    Raises:
        RuntimeError: nothing can be compiled here.
        OSError: nothing can be written.

    """
    if _build_info(_PACKAGE) or not _SOURCES.exists():
        return _PACKAGE
    if not supports(tf.__version__):
        raise RuntimeError(f"the native op needs TensorFlow {SUPPORTED}, found {tf.__version__}")
    tensorflow = [tf.__version__, [*tf.sysconfig.get_compile_flags(), "-w"], tf.sysconfig.get_link_flags()]
    folder = _PACKAGE if os.access(_PACKAGE, os.W_OK) else _cache(tensorflow)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if not _build_info(folder):
            if not _build.has_compiler():
                raise RuntimeError(f"the native op needs a C++ compiler, {_build.compiler()[0]}, at its first use")
            _compile(folder, tensorflow)
    return folder


def _why_not(folder, found):
    """The reason not to load the library under TensorFlow `found`, or None. Versions are compared before loading."""
    built = _build_info(folder)
    if not built:
        return f"deepfm_ops was installed without its native library; to build it: {REBUILD}"
    if "error" in built:
        return f"{built['error']}; to build it: {REBUILD}"
    if built["tensorflow"] != found:
        return (
            f"the native library was built for TensorFlow {built['tensorflow']}, found {found}; "
            f"to rebuild it: {REBUILD}, or install TensorFlow {built['tensorflow']}"
        )
    if not (folder / "_native.so").exists():
        return f"the native library _native.so is missing; to build it: {REBUILD}"
    return None


@functools.cache
def _load():
    """(module of the native ops or None, reason or None, folder of the library or None)."""
    import tensorflow as tf

    folder = None
    try:
        folder = _find(tf)
        reason = _why_not(folder, tf.__version__)
    except (RuntimeError, OSError) as error:
        reason = str(error)
    if reason is None:
        try:
            return tf.load_op_library(str(folder / "_native.so")), None, folder
        except (tf.errors.OpError, OSError) as error:
            reason = f"the native library could not be loaded: {error}; to rebuild it: {REBUILD}"
    if _requested() != "reference":
        _LOGGER.warning("%s. Using the plain TensorFlow fallback, which is slower.", reason)
    return None, reason, folder


def _requested():
    backend = os.environ.get("DEEPFM_OPS_BACKEND", "auto")
    if backend not in BACKENDS:
        raise ValueError(f"DEEPFM_OPS_BACKEND must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


@contextlib.contextmanager
def export(kind):
    """Inside, a forward is made for serving; if it is "portable", of standard TensorFlow ops alone."""
    token = _EXPORT.set(kind)
    try:
        yield
    finally:
        _EXPORT.reset(token)


def is_portable():
    return _EXPORT.get() == "portable" or _is_exported_by_keras()


def is_export():
    return _EXPORT.get() is not None or _is_exported_by_keras()


def _is_exported_by_keras():
    """Whether a graph is being traced for Keras's `model.export`, whatever model these layers are in.

    Keras says so nowhere, so it is asked who calls.
    """
    import tensorflow as tf

    if tf.executing_eagerly():
        return False
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(KERAS_EXPORT):
            return True
        frame = frame.f_back
    return False


def resolve(backend):
    """The backend, once it is known to be one; "auto" is what the environment says."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return _requested() if backend == "auto" else backend


def native_ops(backend="auto"):
    """The native ops to use for `backend`, or None for the plain TensorFlow reference; None in a portable export.

    Args:
        backend: "auto" (native where it loads), "native" or "reference". The environment variable
            DEEPFM_OPS_BACKEND replaces "auto".

    Raises:
        ValueError: backend is none of the three.
        RuntimeError: backend is "native" and the library cannot be used; the text says why.

    """
    backend = resolve(backend)
    if backend == "reference" or is_portable():
        return None
    module, reason, _ = _load()
    if module is None and backend == "native":
        raise RuntimeError(reason)
    return module


@functools.cache
def _cuda_driver():
    """The CUDA, such as "12.4", that this machine's driver is for; None without a driver."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) or not version.value:
            return None
    except OSError:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _runs_on(capability, architectures):
    """Whether a GPU of (major, minor) runs what was compiled for architectures, for the last of them as PTX too."""
    built = sorted((int(name[:-1]), int(name[-1])) for name in architectures)
    return capability >= built[-1] or any(capability[0] == major and capability[1] >= minor for major, minor in built)


@functools.cache
def why_not_on_gpus():
    """The reason not to use native kernels for GPUs in this process, or None."""
    import tensorflow as tf

    module, reason, folder = _load()
    if module is None:
        return reason
    built = _build_info(folder)
    architectures, runtime = built.get("cuda_architectures"), built.get("cuda_runtime")
    if not architectures:
        return f"the native library was built without CUDA; to build it with: DEEPFM_OPS_CUDA=1 {REBUILD}"
    gpus = tf.config.list_physical_devices("GPU")
    if runtime is not None:
        driver, major = _cuda_driver(), int(runtime.partition(".")[0])
        needs = (
            f"the native library was built with CUDA {runtime}, whose kernels need a driver for CUDA {major}.0 or newer"
        )
        needs += f" ({DRIVERS[major]})" if major in DRIVERS else ""
        if driver is None:
            return f"{needs}, found none"
        if int(driver.partition(".")[0]) < major:
            return f"{needs}, found one for CUDA {driver}; update it, or with nvcc of its CUDA on PATH: {REBUILD}"
        for gpu in gpus:
            capability = tf.config.experimental.get_device_details(gpu).get("compute_capability")
            if capability is not None and not _runs_on(capability, architectures):
                found = f"{gpu.name} has compute capability {'.'.join(map(str, capability))}"
                variable = f'DEEPFM_OPS_CUDA_ARCHITECTURES="{"".join(map(str, capability))}"'
                text = f"the native library was built for the architectures {', '.join(architectures)}"
                return f"{text}, and {found}; to rebuild it: {variable} {REBUILD}"
    return None if gpus else "TensorFlow finds no GPU"


@functools.cache
def leaves_gpus_alone():
    """Whether TensorFlow must be kept from placing a native op on a GPU, as there is one that cannot run it."""
    import tensorflow as tf

    return why_not_on_gpus() is not None and bool(tf.config.list_physical_devices("GPU"))


def native_info() -> dict:
    """What computes the interaction in this process, and why.

    Returns:
        A dict: "native" (bool: the C++ op is in use), "reason" (str, or None when native), "version",
        "tensorflow_built" (str or None), "tensorflow_found", "tensorflow_supported" (tuple of series),
        "instruction_set" ("baseline", "avx2", "avx512" or None), "cuda_architectures" (list of str: the GPUs that the
        native library has kernels for), "cuda_runtime" (str or None: the CUDA they were built with), "cuda_driver"
        (str or None: the CUDA that the driver found is for), "cuda_reason" (str or None: why tables on GPUs are left to
        the fallback), "threads" (int: TensorFlow's intra-op threads).

    """
    import tensorflow as tf

    module, reason, folder = _load() if _requested() != "reference" else (None, "DEEPFM_OPS_BACKEND=reference", None)
    built = _build_info(folder or _PACKAGE)
    return {
        "native": reason is None,
        "reason": reason,
        "version": __version__,
        "tensorflow_built": built.get("tensorflow"),
        "tensorflow_found": tf.__version__,
        "tensorflow_supported": TENSORFLOW,
        "instruction_set": instruction_set() if module is not None else None,
        "cuda_architectures": built.get("cuda_architectures", []),
        "cuda_runtime": built.get("cuda_runtime"),
        "cuda_driver": _cuda_driver(),
        "cuda_reason": why_not_on_gpus() if reason is None else reason,
        "threads": tf.config.threading.get_intra_op_parallelism_threads() or os.cpu_count(),
    }


def instruction_set(force=None):
    """The instruction set of the native loops; with `force`, that one from now on (for tests).

    Raises:
        ValueError: this machine cannot run `force`.
        RuntimeError: the native library cannot be used.

    """
    _, reason, folder = _load()
    if reason is not None:
        raise RuntimeError(reason)
    library = ctypes.CDLL(str(folder / "_native.so"))
    library.deepfm_ops_isa.restype = ctypes.c_char_p
    if force is not None and not library.deepfm_ops_set_isa(force.encode()):
        raise ValueError(f"this machine cannot run the {force!r} build")
    return library.deepfm_ops_isa().decode()
