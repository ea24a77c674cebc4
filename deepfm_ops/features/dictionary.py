"""The feature dictionary: one index per category and numeric column. Imports neither TensorFlow nor Keras.

`transform` is the encoding on NumPy; `dictionary_tensorflow` is its other side.
"""

import bisect
import collections
import itertools
import json
import operator
import pathlib
import warnings
from collections.abc import Iterable

import numpy as np

from deepfm_ops.features import cells
from deepfm_ops.features import counts as counts_
from deepfm_ops.features.tables import Table
from deepfm_ops.files import replacing

KINDS = ("categorical", "numeric", "multivalued")
NONFINITE = ("error", "missing")


class FeatureDictionary:
    """Numbers the features of a table: one index per category and one per numeric column.

    Index 0 stands for everything that is missing or was not seen by `fit`, with value 0: it adds nothing
    to a factorization machine. Categories have value 1, numeric columns their number as it is (scale them
    before: a factorization machine multiplies them with each other), and the n known values of a
    multivalued entry 1/n each.

    A category is its canonical text, whatever type it comes in: 7, 7.0, "7", b"7" and numpy.int64(7) are one, "007" is
    another. Bytes are UTF-8.

    Args:
        nonfinite: what an infinity, a NaT or a number beyond 2^32 in a numeric column is: "error" (a ValueError that
            names row and column), or "missing".

    Example:
        >>> import pandas as pd
        >>> df = pd.DataFrame({"city": ["Rome", "Oslo"], "age": [0.3, 0.5], "tags": ["a|b", "b"]})
        >>> features = FeatureDictionary().fit(df, categorical=["city"], numeric=["age"], multivalued=["tags"])
        >>> indices, values = features.transform(df)
        >>> indices.tolist()
        [[2, 3, 4, 5], [1, 3, 5, 0]]
        >>> values.tolist()
        [[1.0, 0.30000001192092896, 0.5, 0.5], [1.0, 0.5, 1.0, 0.0]]
        >>> features.index("city", "Rome"), features.name(2)
        (2, ('city', 'Rome'))

    Attributes:
        num_features: number of indices, 0 included: the `num_features` of the layers and models.
        field_sizes: columns of the matrices per field: 1, or the longest entry seen of a multivalued one.
        num_fields: number of fields, as `DeepFM(..., field_sizes=...)` counts them.
        num_columns: columns of the matrices, the sum of field_sizes.
        counts: int64 [num_features], how often each feature occurs in what `fit` saw, with a value other than zero;
            index 0, which has none, is 0. None: the dictionary was saved by an older version.
        num_samples: rows that `fit` saw; None likewise.

    """

    FORMAT = 2
    counts = num_samples = None  # of one that an older version pickled

    def __init__(self, nonfinite="error"):
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite must be one of {', '.join(NONFINITE)}, got {nonfinite!r}")
        self.nonfinite = nonfinite
        # In the order of the columns: "name", "kind", "size", "start", "values" (canonical texts; None: an index that
        # nothing has) and "dtype" ("text", "integer", "fraction" or "boolean": what the categories came as).
        self.fields = []
        self._index_of = {}  # {name of a field: {text: index}}, made when first needed
        self.num_features = 1
        self.separator = "|"
        self.counts = self.num_samples = None

    @property
    def field_sizes(self):
        return [field["size"] for field in self.fields]

    @property
    def num_fields(self):
        return len(self.fields)

    @property
    def num_columns(self):
        return sum(self.field_sizes)

    def fit(self, df, categorical=(), numeric=(), multivalued=(), separator="|"):
        """Learns the features of a table.

        Args:
            df: a pandas or polars DataFrame, a pyarrow Table, or a dict of equally long arrays, lists or tensors.
            categorical: name or names of columns of strings, numbers or booleans; NaN, NaT and None are missing.
            numeric: name or names of columns of numbers; NaN and None are missing.
            multivalued: name or names of columns of lists (ragged and sparse tensors too), or of strings to be split at
                `separator`.
            separator: between the values of a multivalued string; None: blanks.

        Returns:
            self.

        Raises:
            KeyError: a column that df does not have.
            ValueError: no rows, no columns, a column named twice, columns of unequal length, bytes that are not UTF-8,
                or a number that cannot be trained on (see `nonfinite`).
            TypeError: something that is no table, or values that cannot be categories or numbers.

        """
        kinds = {"categorical": categorical, "numeric": numeric, "multivalued": multivalued}
        categorical, numeric, multivalued = (_names(kind, names) for kind, names in kinds.items())
        names = [*categorical, *numeric, *multivalued]
        if not names:
            raise ValueError("fit needs at least one column name")
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"columns named more than once: {repeated}")
        if separator is not None and not (isinstance(separator, str) and separator):
            raise ValueError(f"separator must be text, or None for blanks, got {separator!r}")
        table = Table(df, names, record=False)
        if table.num_rows == 0:
            raise ValueError("cannot fit on a table without rows")
        fresh = FeatureDictionary()  # so that a column that fails leaves this dictionary as it was
        fresh._counted = []
        for name in categorical:
            kinds, texts = set(), collections.Counter()
            for value in table.cells(name):
                if not cells.is_missing(value):
                    text = cells.category(value, name)
                    texts[text] += 1
                    kinds.add(cells.kind(value, text))
            fresh._add_counted(name, "categorical", 1, texts, _dtype(kinds))
        for name in numeric:
            numbers = self._numbers(table, name)
            present = int(np.count_nonzero(numbers[~np.isnan(numbers)]))
            fresh._add_counted(name, "numeric", 1, {name: present}, None)
        for name in multivalued:
            entries = [[cells.category(x, name) for x in entry] for entry in table.entries(name, separator)]
            texts = collections.Counter(itertools.chain.from_iterable(entries))
            fresh._add_counted(name, "multivalued", max(1, *map(len, entries)), texts, "text")
        self.fields, self.num_features, self.separator = fresh.fields, fresh.num_features, separator
        self.counts, self.num_samples = np.concatenate([[0], *fresh._counted]), table.num_rows
        self._index_of = {}
        return self

    def _indices(self, field):
        """{text: index} of a field."""
        name = field["name"]
        if name not in self._index_of:
            known = enumerate(field["values"], field["start"])
            self._index_of[name] = {text: index for index, text in known if text is not None}
        return self._index_of[name]

    def _add_counted(self, name, kind, size, counted, dtype):
        """Adds a field of the values in {value: how often it occurs}."""
        values = list(counted) if kind == "numeric" else cells.in_order(set(counted))
        self._counted.append(np.array([counted[value] for value in values], np.int64))
        self._add(name, kind, size, values, dtype)

    def _add(self, name, kind, size, values, dtype):
        start = self.num_features
        self.fields.append({"name": name, "kind": kind, "size": size, "start": start, "values": values, "dtype": dtype})
        self.num_features += len(values)

    def transform(self, df):
        """The feature matrices of a table.

        Of a multivalued entry, as many known values count as the longest one in `fit` had. Where more than half of the
        categories of a column are unknown, and `fit` saw some, a warning names the column and three of them.

        Args:
            df: a table with the columns that `fit` was given, as for `fit`; other columns are ignored. A dict of plain
                values, one for each column, is a table of one row.

        Returns:
            indices: int64 [rows, num_columns], in [0, num_features).
            values: float32 [rows, num_columns].

        Raises:
            KeyError: a column that df does not have.
            ValueError: not fitted, columns of unequal length, or a number that cannot be used (see `nonfinite`).
            TypeError: something that is no table, or values that cannot be numbers.

        """
        indices, values, unknown = self.encode(df)
        for message in unknown.values():
            warnings.warn(message, stacklevel=2)
        return indices, values

    def encode(self, df):
        """`transform` that warns nobody: (indices, values, {name of a column that is mostly unknown: what to say})."""
        if not self.fields:
            raise ValueError("fit or load the FeatureDictionary first")
        lists = [field["name"] for field in self.fields if field["kind"] == "multivalued"]
        table = Table(df, [field["name"] for field in self.fields], lists)
        rows = table.num_rows
        indices = np.zeros((rows, self.num_columns), np.int64)
        values = np.zeros((rows, self.num_columns), np.float32)
        unknown, column = {}, 0
        for field in self.fields:
            name, start, size = field["name"], field["start"], field["size"]
            here = slice(column, column + size)
            if field["kind"] == "numeric":
                numbers = self._numbers(table, name)
                known = ~np.isnan(numbers)
                indices[:, column] = np.where(known, start, 0)
                values[:, column] = np.where(known, numbers, 0.0)
            elif field["kind"] == "categorical":
                given = table.cells(name)
                index_of = self._indices(field)
                found = [_index(index_of, value) for value in given]
                indices[:, column] = found
                values[:, column] = indices[:, column] != 0
                unknown |= self._mostly_unknown(field, found, given)
            else:
                index_of = self._indices(field)
                every, given = [], []
                for row, entry in enumerate(table.entries(name, self.separator)):
                    found = [_index(index_of, value) for value in entry]
                    every += found
                    given += entry
                    known = [index for index in found if index][:size]
                    indices[row, here][: len(known)] = known
                    values[row, here][: len(known)] = 1.0 / max(1, len(known))
                unknown |= self._mostly_unknown(field, every, given)
            column += size
        return indices, values, unknown

    def _numbers(self, table, name):
        return cells.checked_numbers(name, table.numbers(name), lambda: table.cells(name), self.nonfinite)

    def _mostly_unknown(self, field, found, given):
        """{name: text of a warning} if more than half of three values or more, missing ones apart, is unknown."""
        zeros = found.count(0)
        if zeros < 2 or 2 * zeros <= len(found) or not self._indices(field):
            return {}
        strange = [value for index, value in zip(found, given, strict=True) if index == 0]
        strange = [value for value in strange if not cells.is_missing(value)]
        present = len(found) - zeros + len(strange)
        if present < 3 or 2 * len(strange) <= present:
            return {}
        examples = ", ".join(list(dict.fromkeys(repr(_shown(value)) for value in strange[:1000]))[:3])
        known = self._indices(field)
        text = (
            f"column {field['name']!r}: {len(strange)} of {present} values were not seen by fit and count as missing, "
            f"such as {examples}; fit saw {len(known)}, such as {next(iter(known))!r}"
        )
        return {field["name"]: text}

    def fit_transform(self, df, **columns):
        """`fit(df, **columns)`, then `transform(df)`."""
        return self.fit(df, **columns).transform(df)

    def _field(self, column):
        for field in self.fields:
            if field["name"] == column:
                return field
        raise KeyError(f"column {column!r} is not in the dictionary; it has {[field['name'] for field in self.fields]}")

    def index(self, column, value=None) -> int:
        """The index of a value of a column; of a numeric column, which has one index, whatever the value.

        Returns:
            int; 0 for a value that is missing or was not seen by `fit`.

        Raises:
            KeyError: a column that is not in the dictionary.

        """
        field = self._field(column)
        return field["start"] if field["kind"] == "numeric" else _index(self._indices(field), value)

    def indices(self, column):
        """The indices of all values of a column, a range, in the order of `name`."""
        field = self._field(column)
        return range(field["start"], field["start"] + len(field["values"]))

    def name(self, index):
        """(column, value) of an index: the inverse of `index`.

        A value is its canonical text, None for a numeric column. Index 0, which stands for everything that is missing,
        is (None, None).

        Raises:
            IndexError: an index outside [0, num_features).

        """
        index = operator.index(index)
        if not 0 <= index < self.num_features:
            raise IndexError(f"index {index} is not in [0, {self.num_features})")
        if index == 0:
            return None, None
        starts = [field["start"] for field in self.fields if field["values"]]
        field = [field for field in self.fields if field["values"]][bisect.bisect_right(starts, index) - 1]
        return field["name"], None if field["kind"] == "numeric" else field["values"][index - field["start"]]

    def save(self, path):
        """Writes the dictionary as JSON, replacing `path` whole or not at all."""
        if not self.fields:
            raise ValueError("fit the FeatureDictionary before saving it")
        content = json.dumps(self.to_config())
        with replacing(path) as fresh:
            fresh.write_text(content, encoding="utf-8")

    def to_config(self):
        """The dictionary as a JSON-ready dict, for `from_config`. Raises ValueError for names that JSON cannot hold."""
        for field in self.fields:
            if not isinstance(field["name"], str | int):
                raise ValueError(f"column {field['name']!r}: a name must be text to be saved")
        return {
            "format": self.FORMAT,
            "separator": self.separator,
            "nonfinite": self.nonfinite,
            "fields": self.fields,
            "counts": None if self.counts is None else counts_.packed(np.minimum(self.counts, counts_.MOST)),
            "num_samples": self.num_samples,
        }

    @classmethod
    def from_config(cls, content):
        """The dictionary of `to_config`. Raises KeyError, TypeError or ValueError for anything else."""
        if content["format"] not in (1, cls.FORMAT):
            raise ValueError(f"format {content['format']}, this version reads 1 and {cls.FORMAT}")
        is_old = content["format"] == 1  # its values are of JSON's types, and 3 and "3" are two
        loaded = cls("error" if is_old else content["nonfinite"])
        loaded.separator = content["separator"]
        if not isinstance(loaded.separator, str | None):
            raise ValueError(f"separator {loaded.separator!r} is no text")
        for field in content["fields"]:
            kind, size, values = field["kind"], field["size"], field["values"]
            if kind not in KINDS or not isinstance(values, list) or field["start"] != loaded.num_features:
                raise ValueError(f"field {field['name']!r} does not fit")
            if not isinstance(size, int) or size < 1 or (size > 1 and kind != "multivalued"):
                raise ValueError(f"field {field['name']!r} has size {size!r}")
            known = [value for value in values if value is not None]
            if len(set(known)) != len(known) or (is_old and known != values):
                raise ValueError(f"field {field['name']!r} has a value twice")
            dtype, texts = _from_old(kind, values) if is_old else (field["dtype"], values)
            if kind != "numeric" and not all(isinstance(text, str | None) for text in texts):
                raise ValueError(f"field {field['name']!r} has values that are no text")
            loaded._add(field["name"], kind, size, list(texts), dtype)
        if content.get("counts") is not None:
            loaded.counts = counts_.checked(content["counts"], loaded.num_features).astype(np.int64)
            loaded.num_samples = operator.index(content["num_samples"])
        return loaded

    @classmethod
    def load(cls, path):
        """Reads what `save` wrote, this version's or an older one's.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged, of another format, or not a FeatureDictionary.

        """
        try:
            return cls.from_config(json.loads(pathlib.Path(path).read_text(encoding="utf-8")))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a readable FeatureDictionary: {error}") from error


def _names(kind, names):
    """The names as a list; one name is a list of one."""
    if isinstance(names, str | int):
        return [names]
    if not isinstance(names, Iterable):
        raise TypeError(f"{kind} must be a name or a list of names, got {names!r}")
    return list(names)


def _dtype(kinds):
    """What the categories of a column are, by their kinds: a fraction where there are integers too."""
    if kinds == {"fraction", "integer"}:
        return "fraction"
    return next(iter(kinds)) if len(kinds) == 1 else "text"


def _from_old(kind, values):
    """(dtype, texts) of a field of format 1; of values that now are one, the first has the index."""
    if kind == "numeric":
        return None, values
    texts, seen = [], set()
    for value in values:
        text = cells.text(value)
        texts.append(None if text in seen else text)
        seen.add(text)
    return "text" if kind == "multivalued" else _dtype(set(map(cells.kind, values, map(cells.text, values)))), texts


def _index(index_of, value):
    """The index of a value; 0 for one that is missing, was not seen, or is of a kind that cannot have been."""
    if type(value) is str:
        return index_of.get(value, 0)
    try:
        return 0 if cells.is_missing(value) else index_of.get(cells.text(value), 0)
    except (TypeError, ValueError):
        return 0


def _shown(value):
    return value.item() if isinstance(value, np.generic) else value
