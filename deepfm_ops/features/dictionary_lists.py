"""What older versions wrote of a FeatureDictionary: JSON of formats 1 and 2, lists of values whose indices are runs."""

import dataclasses
import operator

import numpy as np

from deepfm_ops.features import cells, counts
from deepfm_ops.features.fields import KINDS, Field, dtype_of
from deepfm_ops.features.vocabulary import DTYPES, NO_TEXT, native

FORMATS = (1, 2)


def state_of(content):
    """The `FeatureDictionary.state` of what was written.

    Raises:
        KeyError, TypeError, ValueError: something else.

    """
    if content["format"] not in FORMATS:
        raise ValueError(f"format {content['format']!r}, its lists are of {FORMATS}")
    is_old = content["format"] == 1  # its values are of JSON's types, and 3 and "3" are two
    if not isinstance(content["separator"], str | None):
        raise ValueError(f"separator {content['separator']!r} is no text")
    columns, texts, fields = [0], [None], []
    for number, field in enumerate(content["fields"], 1):
        kind, size, values = field["kind"], field["size"], field["values"]
        if kind not in KINDS or not isinstance(values, list) or field["start"] != len(columns):
            raise ValueError(f"field {field['name']!r} does not fit")
        if not isinstance(size, int) or size < 1 or (size > 1 and kind != "multivalued"):
            raise ValueError(f"field {field['name']!r} has size {size!r}")
        known = [value for value in values if value is not None]
        if len(set(known)) != len(known) or (is_old and known != values):
            raise ValueError(f"field {field['name']!r} has a value twice")
        dtype, found = _from_old(kind, values) if is_old else (field["dtype"], values)
        if kind != "numeric" and not all(isinstance(text, str | None) for text in found):
            raise ValueError(f"field {field['name']!r} has values that are no text")
        start = len(columns) if kind == "numeric" else 0
        fields.append(dataclasses.asdict(Field(field["name"], kind, number, size, dtype, start=start)))
        columns += [number] * len(found)
        texts += [None] * len(found) if kind == "numeric" else found
    arrays = {name: np.zeros(len(columns), dtype) for name, dtype in DTYPES.items()}
    arrays["columns"][:] = columns
    encoded = [None if text is None else text.encode("utf-8", "surrogatepass") for text in texts]
    sizes = np.array([len(text or b"") for text in encoded], np.int64)
    if sizes.max() > native.LONGEST_TEXT:
        raise ValueError(f"a value is longer than {native.LONGEST_TEXT} bytes")
    has_text = np.array([text is not None for text in encoded])
    arrays["text_starts"][:] = np.where(has_text, np.cumsum(sizes) - sizes, 0)
    arrays["text_starts"][~has_text] = NO_TEXT
    arrays["text_sizes"][:] = sizes
    arrays["texts"] = np.frombuffer(b"".join(text or b"" for text in encoded), np.uint8)
    num_samples = None
    if content.get("counts") is not None:
        arrays["counts"][:] = counts.checked(content["counts"], len(columns))
        num_samples = operator.index(content["num_samples"])
    settings = {"min_count": 1, "nonfinite": "error" if is_old else content["nonfinite"], "unseen": False}
    settings |= {"keep_texts": True, "sketch_bytes": None, "separator": content["separator"], "label": None}
    return settings | {"fields": fields, "num_samples": num_samples, "generation": 0}, arrays


def _from_old(kind, values):
    """(dtype, texts) of a field of format 1; of values that now are one, the first has the index."""
    if kind == "numeric":
        return None, values
    texts, seen = [], set()
    for value in values:
        text = cells.text(value)
        texts.append(None if text in seen else text)
        seen.add(text)
    kinds = set(map(cells.kind, values, map(cells.text, values)))
    return "text" if kind == "multivalued" else dtype_of(kinds), texts
