"""Raw data to features: DeepCTR-style columns, and the feature dictionary. Imports neither TensorFlow nor Keras."""

import csv
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

DEFAULT_GROUP_NAME = "default_group"
COMBINERS = ("mean", "sum", "max")


def _positive(owner, name, value):
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{owner}: {name} must be a positive integer, got {value!r}")


class _Column:
    def _replace(self, **changes):
        """A copy with some arguments changed: the name that DeepCTR's columns, which are named tuples, have for it."""
        return dataclasses.replace(self, **changes)


def _read_vocabulary(path, name, size):
    """{key: index} from a CSV file of "index,key" lines. 0 is for keys that are not in it."""
    vocabulary = {}
    with open(path, newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.reader(file), 1):
            where = f"column {name!r}: {path}, line {number}"
            if len(row) != 2 or not row[0].strip().lstrip("-").isdigit():
                raise ValueError(f"{where}: must be 'index,key', got {','.join(row)!r}")
            index = int(row[0])
            if not 0 <= index < size:
                raise ValueError(f"{where}: index {index} is not in [0, {size})")
            if row[1] in vocabulary:
                raise ValueError(f"{where}: key {row[1]!r} occurs twice")
            vocabulary[row[1]] = index
    return vocabulary


@dataclasses.dataclass(frozen=True)
class SparseFeat(_Column):
    """A categorical column: one index, or one value to hash, per sample.

    Args:
        name: the input's name.
        vocabulary_size: number of rows; indices are in [0, vocabulary_size).
        embedding_dim: width of the embedding, or "auto": 6 * floor(vocabulary_size ** 0.25).
        use_hash: hash the input's text (integers are written out first) to [0, vocabulary_size).
        vocabulary_path: a CSV file of "index,key" lines that maps text to indices; other text is index 0.
            The file is read here, and travels with a saved model.
        dtype: of the input: an integer type, or "string" with use_hash or vocabulary_path.
        embeddings_initializer: a Keras initializer, or None: normal with a deviation of 1e-4.
        embedding_name: columns with one embedding_name share their rows. None: the name.
        group_name: columns of one group interact with each other.
        trainable: whether the embedding learns.
        vocabulary: {key: index}; read from vocabulary_path when None.

    Raises:
        ValueError: an argument or a vocabulary file that does not fit.
        FileNotFoundError: no file at vocabulary_path.

    """

    name: str
    vocabulary_size: int
    embedding_dim: int | str = 4
    use_hash: bool = False
    vocabulary_path: str | None = None
    dtype: str = "int32"
    embeddings_initializer: Any = None
    embedding_name: str | None = None
    group_name: str = DEFAULT_GROUP_NAME
    trainable: bool = True
    vocabulary: dict | None = dataclasses.field(default=None, repr=False, hash=False)

    def __post_init__(self):
        owner = f"SparseFeat {self.name!r}"
        _positive(owner, "vocabulary_size", self.vocabulary_size)
        if self.embedding_dim == "auto":
            object.__setattr__(self, "embedding_dim", 6 * int(pow(self.vocabulary_size, 0.25)))
        _positive(owner, "embedding_dim", self.embedding_dim)
        if self.embedding_name is None:
            object.__setattr__(self, "embedding_name", self.name)
        if self.vocabulary_path is not None and self.vocabulary is None:
            vocabulary = _read_vocabulary(self.vocabulary_path, self.name, self.vocabulary_size)
            object.__setattr__(self, "vocabulary", vocabulary)
        if self.dtype != "string" and not np.issubdtype(np.dtype(self.dtype), np.integer):
            raise ValueError(f"{owner}: dtype must be an integer type or 'string', got {self.dtype!r}")
        if self.dtype == "string" and not self.use_hash and self.vocabulary is None:
            raise ValueError(f"{owner}: dtype 'string' needs use_hash or vocabulary_path")

    def __hash__(self):
        return hash(self.name)


@dataclasses.dataclass(frozen=True)
class VarLenSparseFeat(_Column):
    """A categorical column with several values per sample, pooled into one embedding.

    Args:
        sparsefeat: the SparseFeat of one value. Without length_name, index 0 is padding.
        maxlen: number of values per sample, padding included.
        combiner: "mean", "sum" or "max". A sample without values pools to zeros.
        length_name: name of the input that holds the number of values of each sample, or None.
        weight_name: name of the input that holds a weight per value, [B, maxlen] or [B, maxlen, 1], or None.
        weight_norm: apply a softmax to the weights of a sample first.

    Raises:
        ValueError: an argument that does not fit.

    """

    sparsefeat: SparseFeat
    maxlen: int
    combiner: str = "mean"
    length_name: str | None = None
    weight_name: str | None = None
    weight_norm: bool = True

    def __post_init__(self):
        owner = f"VarLenSparseFeat {self.name!r}"
        _positive(owner, "maxlen", self.maxlen)
        if self.combiner not in COMBINERS:
            raise ValueError(f"{owner}: combiner must be one of {', '.join(COMBINERS)}, got {self.combiner!r}")

    @property
    def name(self):
        return self.sparsefeat.name

    def __getattr__(self, attribute):
        # vocabulary_size, embedding_dim, group_name and so on are the sparsefeat's.
        if attribute.startswith("__") or attribute == "sparsefeat":
            raise AttributeError(attribute)
        return getattr(self.sparsefeat, attribute)

    def __hash__(self):
        return hash(self.name)


@dataclasses.dataclass(frozen=True)
class DenseFeat(_Column):
    """A numeric column.

    Args:
        name: the input's name.
        dimension: numbers per sample.
        dtype: of the input.
        transform_fn: a function of the [B, dimension] tensor that returns one of the same shape, or None.
            To be saved with a model it must be registered with Keras, or loaded with safe_mode=False.
        embedding_dim: when set, the column takes part in the factorization machine: each of its numbers has
            an embedding, which is multiplied with it.
        group_name: the factorization machine's group, with embedding_dim.

    Raises:
        ValueError: an argument that does not fit.

    """

    name: str
    dimension: int = 1
    dtype: str = "float32"
    transform_fn: Callable | None = None
    embedding_dim: int | None = None
    group_name: str = DEFAULT_GROUP_NAME

    def __post_init__(self):
        owner = f"DenseFeat {self.name!r}"
        _positive(owner, "dimension", self.dimension)
        if self.embedding_dim is not None:
            _positive(owner, "embedding_dim", self.embedding_dim)

    def __hash__(self):
        return hash(self.name)


def input_specs(feature_columns) -> dict:
    """{input name: (shape without the batch, dtype)}, in the order of the columns.

    Raises:
        ValueError: two columns need one input in two forms.
        TypeError: something that is not a column.

    """
    specs = {}

    def add(name, shape, dtype):
        if specs.setdefault(name, (shape, dtype)) != (shape, dtype):
            raise ValueError(f"input {name!r} is needed as {specs[name]} and as {(shape, dtype)}")

    for column in feature_columns:
        if isinstance(column, SparseFeat):
            add(column.name, (1,), column.dtype)
        elif isinstance(column, DenseFeat):
            add(column.name, (column.dimension,), column.dtype)
        elif isinstance(column, VarLenSparseFeat):
            add(column.name, (column.maxlen,), column.dtype)
            if column.weight_name is not None:
                add(column.weight_name, (column.maxlen, 1), "float32")
            if column.length_name is not None:
                add(column.length_name, (1,), "int32")
        else:
            raise TypeError(f"a feature column must be SparseFeat, DenseFeat or VarLenSparseFeat, got {column!r}")
    return specs


def get_feature_names(feature_columns: Sequence) -> list[str]:
    """The names of the inputs that a model of these columns takes."""
    return list(input_specs(feature_columns))


def text_of(value):
    """A cell as text; a missing one is the empty string."""
    return "" if _is_missing(value) else value.decode("utf-8") if isinstance(value, bytes) else str(value)


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


class TablePlan:
    """Which rows of one table each column owns, and which index columns it fills.

    Columns of one embedding_name share rows. A dense column with an embedding owns a row per number.

    Attributes:
        num_rows: rows of the table.
        blocks: [(rows, initializer or None)], in the order of the rows.
        offsets: {column name: first row}.
        field_sizes: index columns per field of the op. A column pooled by max, and every number of a dense
            column, is left as fields of one pair each, because summing them is not what they need.

    """

    def __init__(self, columns):
        self.columns = list(columns)
        self.offsets, self.field_sizes, self.num_rows, self.blocks = {}, [], 0, []
        owners = {}
        for column in self.columns:
            size = column.dimension if isinstance(column, DenseFeat) else column.vocabulary_size
            key = ("dense", column.name) if isinstance(column, DenseFeat) else ("sparse", column.embedding_name)
            if key not in owners:
                owners[key] = self.num_rows
                self.blocks.append((size, getattr(column, "embeddings_initializer", None)))
                self.num_rows += size
            self.offsets[column.name] = owners[key]
            width = 1 if isinstance(column, SparseFeat) else size if isinstance(column, DenseFeat) else column.maxlen
            separate = isinstance(column, DenseFeat) or getattr(column, "combiner", None) == "max"
            self.field_sizes += [1] * width if separate else [width]


def column_from_plain(config):
    """The column of a dict {"kind": its class's name, argument: value}."""
    config = dict(config)
    kind = {"SparseFeat": SparseFeat, "DenseFeat": DenseFeat, "VarLenSparseFeat": VarLenSparseFeat}[config.pop("kind")]
    if "sparsefeat" in config:
        config["sparsefeat"] = column_from_plain(config["sparsefeat"])
    return kind(**config)


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
        if _num_rows(df, names) == 0:
            raise ValueError("cannot fit on a table without rows")
        fresh = FeatureDictionary()  # so that a column that fails leaves this dictionary as it was
        for name in categorical:
            values = {_category(value, name) for value in _objects(df, name) if not _is_missing(value)}
            fresh._add(name, "categorical", 1, sorted_values(values))
        for name in numeric:
            _numbers(df, name)
            fresh._add(name, "numeric", 1, [name])
        for name in multivalued:
            entries = [[_category(value, name) for value in entry] for entry in _entries(df, name, separator)]
            fresh._add(name, "multivalued", max(1, *map(len, entries)), sorted_values(set().union(*entries)))
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
        rows = _num_rows(df, [field["name"] for field in self.fields])
        indices = np.zeros((rows, self.num_columns), np.int64)
        values = np.zeros((rows, self.num_columns), np.float32)
        column = 0
        for field in self.fields:
            name, start, size = field["name"], field["start"], field["size"]
            here = slice(column, column + size)
            if field["kind"] == "numeric":
                numbers = _numbers(df, name)
                known = ~np.isnan(numbers)
                indices[:, column] = np.where(known, start, 0)
                values[:, column] = np.where(known, numbers, 0.0)
            elif field["kind"] == "categorical":
                index_of = self._indices(field)
                found = (_index(index_of, value) for value in _objects(df, name))
                indices[:, column] = np.fromiter(found, np.int64, rows)
                values[:, column] = indices[:, column] != 0
            else:
                index_of = self._indices(field)
                for row, entry in enumerate(_entries(df, name, self.separator)):
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
        path = pathlib.Path(path)
        fresh = path.with_name(path.name + f".{os.getpid()}.new")
        content = json.dumps(self.to_config())
        try:
            fresh.write_text(content, encoding="utf-8")
            os.replace(fresh, path)
        finally:
            fresh.unlink(missing_ok=True)

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


def sorted_values(values):
    """Sorted by type and value, so that equal data give equal numbers in every process."""
    return sorted(values, key=lambda value: (type(value).__name__, value))


def _column(df, name):
    try:
        column = df[name]
    except KeyError:
        raise KeyError(f"column {name!r} is missing; the table has {list(df.keys())}") from None
    if getattr(column, "ndim", 1) != 1:
        raise ValueError(f"column {name!r} must be one column of values, got shape {column.shape}")
    return column


def _num_rows(df, names):
    lengths = {name: len(_column(df, name)) for name in names}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns must be equally long, got {lengths}")
    return next(iter(lengths.values()))


def _is_missing(value):
    # pandas.NA has no truth value, so it is known by its name; NumPy's float64 is a float.
    kinds = (float, np.floating)
    return value is None or type(value).__name__ == "NAType" or (isinstance(value, kinds) and bool(value != value))


def _category(value, name):
    if isinstance(value, np.generic):
        value = value.item()
    if not isinstance(value, str | int | float | bool):
        raise TypeError(f"column {name!r}: a category must be a string or a number, got {value!r}; convert it first")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas turns integers into floats where a value is missing
    return value


def _objects(df, name):
    """The column as Python objects."""
    return np.asarray(_column(df, name), dtype=object)


def _index(index_of, value):
    """The index of a value; 0 for one that is missing, was not seen, or is of a kind that cannot have been."""
    try:
        return 0 if _is_missing(value) else index_of.get(_category(value, ""), 0)
    except TypeError:
        return 0


def _entries(df, name, separator):
    """A list of values per row, the missing ones left out."""
    entries = []
    for entry in _column(df, name):
        if isinstance(entry, str):
            entry = [value for value in entry.split(separator) if value]
        elif not isinstance(entry, list | tuple | set | np.ndarray):
            if not _is_missing(entry):
                raise TypeError(f"column {name!r}: an entry must be a list or a string, got {entry!r}")
            entry = []
        entries.append([value for value in entry if not _is_missing(value)])
    return entries


def _numbers(df, name):
    column = _column(df, name)
    if hasattr(column, "to_numpy"):
        try:
            return column.to_numpy(dtype=np.float64, na_value=np.nan)
        except (TypeError, ValueError) as error:
            raise TypeError(f"column {name!r} must hold numbers: {error}") from None
    try:
        return np.asarray(column, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"column {name!r} must hold numbers: {error}") from None
