"""The columns of a table, as Python objects, numbers, lists, and arrays in the shape of a model's input."""

import math

import numpy as np

from deepfm_ops.features.cells import is_missing, text_of


def column(df, name):
    try:
        found = df[name]
    except KeyError:
        raise KeyError(f"column {name!r} is missing; the table has {list(df.keys())}") from None
    if getattr(found, "ndim", 1) != 1:
        raise ValueError(f"column {name!r} must be one column of values, got shape {found.shape}")
    return found


def num_rows(df, names):
    lengths = {name: len(column(df, name)) for name in names}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns must be equally long, got {lengths}")
    return next(iter(lengths.values()))


def objects(df, name):
    """The column as Python objects."""
    return np.asarray(column(df, name), dtype=object)


def entries(df, name, separator):
    """A list of values per row, the missing ones left out."""
    entries = []
    for entry in column(df, name):
        if isinstance(entry, str):
            entry = [value for value in entry.split(separator) if value]
        elif not isinstance(entry, list | tuple | set | np.ndarray):
            if not is_missing(entry):
                raise TypeError(f"column {name!r}: an entry must be a list or a string, got {entry!r}")
            entry = []
        entries.append([value for value in entry if not is_missing(value)])
    return entries


def numbers(df, name):
    found = column(df, name)
    if hasattr(found, "to_numpy"):
        try:
            return found.to_numpy(dtype=np.float64, na_value=np.nan)
        except (TypeError, ValueError) as error:
            raise TypeError(f"column {name!r} must hold numbers: {error}") from None
    try:
        return np.asarray(found, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"column {name!r} must hold numbers: {error}") from None


def input_array(name, column, shape, kind):
    """An input of feature columns as the model takes it.

    Args:
        name: for errors.
        column: anything that NumPy makes an array of.
        shape: of a sample.
        kind: "string", "int64" or a float dtype.

    Returns:
        [B, *shape]: str objects, int64, or numbers.

    Raises:
        TypeError: other content.
        ValueError: another shape.

    """
    # As objects, or NumPy would make text of numbers, and numbers of other numbers, before they are written out.
    try:
        column = np.asarray(column, dtype=object if kind == "string" else None)
    except ValueError:
        raise ValueError(f"input {name!r} must hold equally long lists") from None
    if kind == "string":
        if any(isinstance(value, list | tuple | np.ndarray) for value in column.flat):
            raise ValueError(f"input {name!r} must hold equally long lists")
        texts = [text_of(value) for value in column.flat]
        column = np.fromiter(texts, object, len(texts)).reshape(column.shape)
    elif column.dtype.kind not in "iufb":
        raise TypeError(f"input {name!r} must hold numbers, got dtype {column.dtype}")
    elif kind == "int64":
        if column.dtype.kind == "f" and not (np.isfinite(column) & (column == np.floor(column))).all():
            raise TypeError(f"input {name!r} must hold integers, got {column.dtype} with fractions or NaN")
        if column.dtype.kind in "fu" and ((column < -(2.0**63)) | (column >= 2.0**63)).any():
            raise TypeError(f"input {name!r} must hold integers of at most 64 bits")
        column = column.astype(np.int64)
    if column.shape[1:] != tuple(shape):
        if math.prod(column.shape[1:]) != math.prod(shape):
            raise ValueError(f"input {name!r} must have shape {('B', *shape)}, got {column.shape}")
        column = column.reshape(column.shape[0] if column.ndim else 1, *shape)
    return column
