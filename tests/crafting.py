"""Files that nobody's program wrote: what tests of readers share."""

import copy
import io
import json
import zipfile

import numpy as np

from deepfm_ops import container

ODD = [None, True, -1, 0, 2, 3.5, 2**62, 10**400, float("nan"), "x", "float32", [], [1], [[2**40]], [{}], {"a": 1}]
ARRAYS = {
    "gone": lambda x: None,
    "none": lambda x: x[:0],
    "shorter": lambda x: x[:-1],
    "longer": lambda x: np.concatenate([x, x[:1]]),
    "flat": lambda x: x.reshape(-1),
    "deeper": lambda x: x.reshape(*x.shape, 1),
    "turned": lambda x: np.ascontiguousarray(x.T),
    "float64": lambda x: x.astype("f8"),
    "uint8": lambda x: x.astype("u1"),
    "uint16": lambda x: x.astype("u2"),
    "int64": lambda x: x.astype("i8"),
    "complex": lambda x: x.astype("c8"),
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "text": lambda x: x.astype("U5"),
    "nan": lambda x: np.full_like(x, np.nan) if x.dtype == "f4" else x,
    "ones": lambda x: np.frombuffer(b"\xff" * x.nbytes, x.dtype).reshape(x.shape),
    "narrow": lambda x: np.ascontiguousarray(x[:, :1]) if x.ndim == 2 else x[:1],
}


def packed(manifest, arrays):
    """The bytes of a zip as ours are; the manifest as a dict or as bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        manifest = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
        container.write_entry(archive, container.MANIFEST, manifest)
        for name, array in arrays.items():
            container.write_array(archive, name, array)
    return buffer.getvalue()


def paths(value, path=()):
    """The places of a JSON value, inner ones too."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*path, key))


def changed(value, path, change):
    """A copy with something done to what lies at a place: `change(its owner, its key)`."""
    value = {"root": copy.deepcopy(value)}
    owner, key = value, "root"
    for step in path:
        owner, key = owner[key], step
    change(owner, key)
    return value.get("root")


def mutations(manifest):
    for path in paths(manifest):
        for odd in ODD:
            yield path, odd, changed(manifest, path, lambda owner, key, odd=odd: owner.__setitem__(key, odd))
        yield path, "gone", changed(manifest, path, lambda owner, key: owner.__delitem__(key))
        yield path, "twice", changed(manifest, path, lambda owner, key: _double(owner[key]))


def _double(value):
    if isinstance(value, list):
        value += copy.deepcopy(value)
    elif isinstance(value, dict):
        value["more"] = 1
