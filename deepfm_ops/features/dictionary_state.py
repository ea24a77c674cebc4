"""What a feature dictionary's state may be: of a file, of a saved model's configuration. Checked before it is used.

The content of the arrays is not read here: an index that a damaged one holds is refused where it is used.
"""

import dataclasses
import itertools

import numpy as np

from deepfm_ops.features.fields import KINDS, TRANSFORMS, Field
from deepfm_ops.features.vocabulary import DTYPES

MOST_FIELDS = np.iinfo(np.uint16).max
MOST_COLUMNS = 1 << 20  # of the matrices; a row has 12 bytes in each
NONFINITE = ("error", "missing")
_FIELD = {field.name for field in dataclasses.fields(Field)}
_LARGEST = 2**63 - 1


def whole(value, least, most=_LARGEST):
    """Whether a value of JSON is an integer in a range, and no boolean."""
    return type(value) is int and least <= value <= most


def _number(value):
    return type(value) in (int, float) and abs(value) < 1e300  # not for NaN; what float64 holds


def _maybe(value, *range_):
    return value is None or whole(value, *range_)


def _name(value):
    return isinstance(value, str) or whole(value, -_LARGEST)


def check(content, arrays):
    """Raises ValueError where a state holds what no dictionary does, by what it is.

    Args:
        content: what JSON gave.
        arrays: {name: array}; `get` gives one.

    """
    size = _check_arrays(arrays)
    if not isinstance(content, dict):
        raise ValueError("it must be an object")
    good = {
        "min_count": lambda x: whole(x, 1),
        "nonfinite": lambda x: isinstance(x, str) and x in NONFINITE,
        "unseen": lambda x: type(x) is bool,
        "keep_texts": lambda x: type(x) is bool,
        "sketch_bytes": lambda x: _maybe(x, 64, 1 << 40),
        "separator": lambda x: x is None or (isinstance(x, str) and bool(x.encode())),
        "label": lambda x: x is None or _name(x) or (isinstance(x, list) and bool(x) and all(map(_name, x))),
        "num_samples": lambda x: _maybe(x, 0),
        "generation": lambda x: whole(x, 0, 2**31 - 1),
        "fields": lambda x: isinstance(x, list) and 0 < len(x) <= MOST_FIELDS,
    }
    _check(good, content, "the dictionary")
    for number, field in enumerate(content["fields"], 1):
        _check_field(field, number, size)
    names, columns = {field["name"] for field in content["fields"]}, sum(field["size"] for field in content["fields"])
    if len(names) != len(content["fields"]) or columns > MOST_COLUMNS:
        raise ValueError(
            f"its fields must have names of their own and at most {MOST_COLUMNS:,} columns, got {columns:,}"
        )


def _check(good, content, owner):
    if missing := good.keys() - content.keys():
        raise ValueError(f"{owner} has no {', '.join(sorted(missing))}")
    for name, is_good in good.items():
        if not is_good(content[name]):
            raise ValueError(f"{owner} cannot have {name} {content[name]!r:.100}")


def _check_arrays(arrays):
    """The number of indices."""
    dtypes = {**DTYPES, "texts": "u1", "slots": "u1"}
    found = {name: arrays.get(name) for name in dtypes}
    for name, array in found.items():
        if array is None and name in DTYPES:
            raise ValueError(f"its array {name!r} is missing")
        if array is not None and (array.dtype != dtypes[name] or array.ndim != 1):
            raise ValueError(f"its array {name!r} must be a vector of {dtypes[name]}, got {array.dtype} {array.shape}")
    if found["texts"] is None and found["slots"] is None:
        raise ValueError("it has neither texts nor slots")
    sizes = {len(found[name]) for name in DTYPES}
    if len(sizes) != 1 or not 1 <= max(sizes) < 2**32:
        raise ValueError("its arrays are not equally long")
    return sizes.pop()


def _check_field(field, number, size):
    if not isinstance(field, dict) or not {"name", "kind", "number"} <= field.keys() <= _FIELD:
        raise ValueError(
            f"field {number} must have a name, a kind, a number, and nothing but {', '.join(sorted(_FIELD))}"
        )
    plain = dataclasses.asdict(Field("", "", 0))
    field |= {name: plain[name] for name in plain.keys() - field.keys()}
    kind, transform = field["kind"], field["transform"]
    numeric = kind == "numeric"
    run = 1 if numeric else field["buckets"] or 0  # indices from its start on
    if numeric and isinstance(field["boundaries"], list):
        run += len(field["boundaries"])
    good = {
        "name": _name,
        "kind": lambda x: isinstance(x, str) and x in KINDS,
        "number": lambda x: x == number and whole(x, 1),
        "size": lambda x: whole(x, 1, MOST_COLUMNS if kind == "multivalued" else 1),
        "dtype": lambda x: x is None or (isinstance(x, str) and x in ("text", "integer", "fraction", "boolean")),
        "buckets": lambda x: x is None or (whole(x, 1, 2**31 - 1) and not numeric),
        "weighted": lambda x: type(x) is bool,
        "max_length": lambda x: _maybe(x, 1),
        "transform": lambda x: isinstance(x, str) and x in (TRANSFORMS if numeric else ("identity",)),
        "mean": _number,
        "deviation": lambda x: _number(x) and x > 0,
        "boundaries": lambda x: _ascending(x) if transform == "quantiles" else x is None,
        "start": lambda x: whole(x, min(run, 1), size - run),
        "unseen": lambda x: whole(x, 0, size - 1),
    }
    _check(good, field, f"field {number}")


def _ascending(value):
    if not isinstance(value, list) or not all(map(_number, value)):
        return False
    return all(before < after for before, after in itertools.pairwise(value))
