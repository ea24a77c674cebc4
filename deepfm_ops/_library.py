"""Loads the native library, once, after comparing versions; says why when it cannot."""

import contextlib
import contextvars
import ctypes
import functools
import json
import logging
import os
import pathlib
import sys

from deepfm_ops._version import TENSORFLOW, __version__

KERAS_EXPORT = "keras.src.export"  # what Keras's export is made of
BACKENDS = ("auto", "native", "reference")
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps . (in deepfm_ops's source)"
_PORTABLE = contextvars.ContextVar("portable", default=False)
_DIRECTORY = pathlib.Path(__file__).parent
_LIBRARY = _DIRECTORY / "_native.so"
_BUILD_INFO = _DIRECTORY / "_build_info.json"


def _why_not(found):
    """The reason not to load the library under TensorFlow `found`, or None. Versions are compared before loading."""
    if not _BUILD_INFO.exists():
        return f"deepfm_ops was installed without its native library; to build it: {REBUILD}"
    built = json.loads(_BUILD_INFO.read_text())
    if "error" in built:
        return f"{built['error']}; to build it: {REBUILD}"
    if built["tensorflow"] != found:
        return (
            f"the native library was built for TensorFlow {built['tensorflow']}, found {found}; "
            f"to rebuild it: {REBUILD}, or install TensorFlow {built['tensorflow']}"
        )
    if not _LIBRARY.exists():
        return f"the native library {_LIBRARY.name} is missing; to build it: {REBUILD}"
    return None


@functools.cache
def _load():
    """(module of the native ops or None, reason or None)."""
    import tensorflow as tf

    reason = _why_not(tf.__version__)
    if reason is None:
        try:
            return tf.load_op_library(str(_LIBRARY)), None
        except (tf.errors.OpError, OSError) as error:
            reason = f"the native library could not be loaded: {error}; to rebuild it: {REBUILD}"
    if _requested() != "reference":
        logging.getLogger("deepfm_ops").warning("%s. Using the plain TensorFlow fallback, which is slower.", reason)
    return None, reason


def _requested():
    backend = os.environ.get("DEEPFM_OPS_BACKEND", "auto")
    if backend not in BACKENDS:
        raise ValueError(f"DEEPFM_OPS_BACKEND must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


@contextlib.contextmanager
def portable():
    """Inside, whatever the backend, a forward is of standard TensorFlow ops alone, and made for serving."""
    token = _PORTABLE.set(True)
    try:
        yield
    finally:
        _PORTABLE.reset(token)


def is_portable():
    return _PORTABLE.get() or _is_exported_by_keras()


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


def native_ops(backend="auto"):
    """The native ops to use for `backend`, or None for the plain TensorFlow reference.

    Args:
        backend: "auto" (native where it loads), "native" or "reference". The environment variable
            DEEPFM_OPS_BACKEND replaces "auto".

    Raises:
        ValueError: backend is none of the three.
        RuntimeError: backend is "native" and the library cannot be used; the text says why.

    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        backend = _requested()
    if backend == "reference" or is_portable():
        return None
    module, reason = _load()
    if module is None and backend == "native":
        raise RuntimeError(reason)
    return module


def native_info() -> dict:
    """What computes the interaction in this process, and why.

    Returns:
        A dict: "native" (bool: the C++ op is in use), "reason" (str, or None when native), "version",
        "tensorflow_built" (str or None), "tensorflow_found", "tensorflow_supported" (series),
        "instruction_set" ("baseline", "avx2", "avx512" or None), "cuda_architectures" (list of str),
        "threads" (int: TensorFlow's intra-op threads).

    """
    import tensorflow as tf

    module, reason = _load()
    if _requested() == "reference":
        reason = "DEEPFM_OPS_BACKEND=reference"
    built = json.loads(_BUILD_INFO.read_text()) if _BUILD_INFO.exists() else {}
    return {
        "native": reason is None,
        "reason": reason,
        "version": __version__,
        "tensorflow_built": built.get("tensorflow"),
        "tensorflow_found": tf.__version__,
        "tensorflow_supported": TENSORFLOW,
        "instruction_set": instruction_set() if module is not None else None,
        "cuda_architectures": built.get("cuda_architectures", []),
        "threads": tf.config.threading.get_intra_op_parallelism_threads() or os.cpu_count(),
    }


def instruction_set(force=None):
    """The instruction set of the native loops; with `force`, that one from now on (for tests).

    Raises:
        ValueError: this machine cannot run `force`.

    """
    library = ctypes.CDLL(str(_LIBRARY))
    library.deepfm_ops_isa.restype = ctypes.c_char_p
    if force is not None and not library.deepfm_ops_set_isa(force.encode()):
        raise ValueError(f"this machine cannot run the {force!r} build")
    return library.deepfm_ops_isa().decode()
