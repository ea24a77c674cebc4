"""DeepFM over many machines: tables on parameter servers, steps on workers, one script for all of them.

Names are loaded when first used: importing this imports no TensorFlow.
"""

import importlib

_HOME = {
    "Checkpoint": "checkpoints",
    "ClusterError": "config",
    "RowNormal": "initializers",
    "ShardedDeepFM": "model",
    "serve_or_continue": "server",
}

__all__ = [*_HOME]


def __getattr__(name):
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
