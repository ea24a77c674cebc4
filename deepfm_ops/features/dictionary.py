"""The feature dictionary: one index per category value and numeric column. Imports neither TensorFlow nor Keras."""

import json
import pathlib

import numpy as np

from deepfm_ops.features import cells, tables
from deepfm_ops.files import replacing


class FeatureDictionary:
    """Numbers the features of a table: one index per category value and one per numeric column.

    Index 0 stands for everything that is missing or was not seen by `fit`, with value 0: it adds nothing
    to a factorization machine. Categories have value 1, numeric columns their number as it is (scale them
    before: a factorization machine multiplies them with each other), and the n known values of a
    multivalued entry 1/n each.

    Example:
        >>> import pandas as pd
        >>> df = pd.DataFrame({"city": ["Rome", "Oslo"], "age": [0.3, 0.5], "tags": ["a|b", "b"]})
        >>> features = FeatureDictionary().fit(df, categorical=["city"], numeric=["age"], multivalued=["tags"])
        >>> indices, values = features.transform(df)
        >>> indices.tolist()
        [[2, 3, 4, 5], [1, 3, 5, 0]]
        >>> values.tolist()
        [[1.0, 0.30000001192092896, 0.5, 0.5], [1.0, 0.5, 1.0, 0.0]]

    Attributes:
        num_features: number of indices, 0 included: the `num_features` of the layers and models.
        field_sizes: columns of the matrices per field: 1, or the longest entry seen of a multivalued one.
        num_fields: number of fields, as `DeepFM(..., field_sizes=...)` counts them.
        num_columns: columns of the matrices, the sum of field_sizes.

    """

    FORMAT = 1

    def __init__(self):
        self.fields = []  # {"name", "kind", "size", "start"; "values": list} in the order of the columns
        self._index_of = {}  # {name of a field: {value: index}}, made when first needed
        self.num_features = 1
        self.separator = "|"

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
        """Learns the features of `df`.

        Args:
            df: a pandas DataFrame, or a dict of equally long arrays.
            categorical: names of columns of strings, integers or booleans; NaN and None are missing.
            numeric: names of columns of numbers; NaN is missing.
            multivalued: names of columns of lists, or of strings to be split at `separator`.
            separator: between the values of a multivalued string.

        Returns:
            self.

        Raises:
            KeyError: a column that df does not have.
            ValueError: no rows, no columns, a column named twice, or columns of unequal length.
            TypeError: values that cannot be categories or numbers.

        """
        names = [*categorical, *numeric, *multivalued]
        if not names:
            raise ValueError("fit needs at least one column name")
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"columns named more than once: {repeated}")
        if tables.num_rows(df, names) == 0:
            raise ValueError("cannot fit on a table without rows")
        fresh = FeatureDictionary()  # so that a column that fails leaves this dictionary as it was
        for name in categorical:
            values = {cells.category(value, name) for value in tables.objects(df, name) if not cells.is_missing(value)}
            fresh._add(name, "categorical", 1, cells.sorted_values(values))
        for name in numeric:
            tables.numbers(df, name)
            fresh._add(name, "numeric", 1, [name])
        for name in multivalued:
            entries = [
                [cells.category(value, name) for value in entry] for entry in tables.entries(df, name, separator)
            ]
            fresh._add(name, "multivalued", max(1, *map(len, entries)), cells.sorted_values(set().union(*entries)))
        self.fields, self.num_features, self.separator = fresh.fields, fresh.num_features, separator
        self._index_of = {}
        return self

    def _indices(self, field):
        """{value: index} of a field."""
        name = field["name"]
        if name not in self._index_of:
            self._index_of[name] = {value: field["start"] + i for i, value in enumerate(field["values"])}
        return self._index_of[name]

    def _add(self, name, kind, size, values):
        self.fields.append({"name": name, "kind": kind, "size": size, "start": self.num_features, "values": values})
        self.num_features += len(values)

    def transform(self, df):
        """The feature matrices of `df`.

        Of a multivalued entry, as many known values count as the longest one in `fit` had.

        Args:
            df: a table with the columns that `fit` was given; other columns are ignored.

        Returns:
            indices: int64 [rows, num_columns], in [0, num_features).
            values: float32 [rows, num_columns].

        Raises:
            KeyError: a column that df does not have.
            ValueError: not fitted, or columns of unequal length.
            TypeError: values that cannot be categories or numbers.

        """
        if not self.fields:
            raise ValueError("fit or load the FeatureDictionary first")
        rows = tables.num_rows(df, [field["name"] for field in self.fields])
        indices = np.zeros((rows, self.num_columns), np.int64)
        values = np.zeros((rows, self.num_columns), np.float32)
        column = 0
        for field in self.fields:
            name, start, size = field["name"], field["start"], field["size"]
            here = slice(column, column + size)
            if field["kind"] == "numeric":
                numbers = tables.numbers(df, name)
                known = ~np.isnan(numbers)
                indices[:, column] = np.where(known, start, 0)
                values[:, column] = np.where(known, numbers, 0.0)
            elif field["kind"] == "categorical":
                index_of = self._indices(field)
                found = (_index(index_of, value) for value in tables.objects(df, name))
                indices[:, column] = np.fromiter(found, np.int64, rows)
                values[:, column] = indices[:, column] != 0
            else:
                index_of = self._indices(field)
                for row, entry in enumerate(tables.entries(df, name, self.separator)):
                    known = [i for i in (_index(index_of, value) for value in entry) if i][:size]
                    indices[row, here][: len(known)] = known
                    values[row, here][: len(known)] = 1.0 / max(1, len(known))
            column += size
        return indices, values

    def fit_transform(self, df, **columns):
        """`fit(df, **columns)`, then `transform(df)`."""
        return self.fit(df, **columns).transform(df)

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
        return {"format": self.FORMAT, "separator": self.separator, "fields": self.fields}

    @classmethod
    def from_config(cls, content):
        """The dictionary of `to_config`. Raises KeyError, TypeError or ValueError for anything else."""
        if content["format"] != cls.FORMAT:
            raise ValueError(f"format {content['format']}, this version reads {cls.FORMAT}")
        loaded = cls()
        loaded.separator = content["separator"]
        if not isinstance(loaded.separator, str | None):
            raise ValueError(f"separator {loaded.separator!r} is no text")
        for field in content["fields"]:
            kind, size, values = field["kind"], field["size"], field["values"]
            good = kind in ("categorical", "numeric", "multivalued") and isinstance(values, list)
            good = good and isinstance(size, int) and size >= 1 and (size == 1 or kind == "multivalued")
            good = good and len(set(values)) == len(values) and field["start"] == loaded.num_features
            if not good:
                raise ValueError(f"field {field['name']!r} does not fit")
            loaded._add(field["name"], kind, size, values)
        return loaded

    @classmethod
    def load(cls, path):
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged, of another format, or not a FeatureDictionary.

        """
        try:
            return cls.from_config(json.loads(pathlib.Path(path).read_text(encoding="utf-8")))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a readable FeatureDictionary: {error}") from error


def _index(index_of, value):
    """The index of a value; 0 for one that is missing, was not seen, or is of a kind that cannot have been."""
    try:
        return 0 if cells.is_missing(value) else index_of.get(cells.category(value, ""), 0)
    except TypeError:
        return 0
