"""What a cell of a table is: missing, a category, a text."""

import numpy as np


def is_missing(value):
    # pandas.NA has no truth value, so it is known by its name; NumPy's float64 is a float.
    kinds = (float, np.floating)
    return value is None or type(value).__name__ == "NAType" or (isinstance(value, kinds) and bool(value != value))


def category(value, name):
    if isinstance(value, np.generic):
        value = value.item()
    if not isinstance(value, str | int | float | bool):
        raise TypeError(f"column {name!r}: a category must be a string or a number, got {value!r}; convert it first")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas turns integers into floats where a value is missing
    return value


def text_of(value):
    """A cell as text; a missing one is the empty string."""
    return "" if is_missing(value) else value.decode("utf-8") if isinstance(value, bytes) else str(value)


def sorted_values(values):
    """Sorted by type and value, so that equal data give equal numbers in every process."""
    return sorted(values, key=lambda value: (type(value).__name__, value))
