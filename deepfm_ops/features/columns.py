"""DeepCTR-style feature columns, and which rows of a table they own. Imports neither TensorFlow nor Keras."""

import csv
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from deepfm_ops.features import cells

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
            if len(row) != 2 or not re.fullmatch(r"\s*-?[0-9]+\s*", row[0]):
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
        use_hash: hash the input's canonical text (7, 7.0 and "7" are one) to [0, vocabulary_size).
        vocabulary_path: a CSV file of "index,key" lines that maps text to indices; other text is index 0.
            The file is read here, and travels with a saved model.
        dtype: of the input: an integer type, or "string" with use_hash or vocabulary_path.
        embeddings_initializer: a Keras initializer, or None: normal with a deviation of 1e-4.
        embedding_name: columns with one embedding_name share their rows. None: the name.
        group_name: columns of one group interact with each other.
        trainable: whether the embedding learns.
        vocabulary: {key: index}, keys by their canonical text (see `FeatureDictionary`); read from vocabulary_path
            when None.

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
        elif self.vocabulary is not None:
            if not isinstance(self.vocabulary, Mapping):
                raise ValueError(f"{owner}: vocabulary must be {{key: index}}, got {type(self.vocabulary).__name__}")
            vocabulary = {}
            for key, index in self.vocabulary.items():
                text = cells.category(key, self.name)
                if text in vocabulary:
                    raise ValueError(f"{owner}: key {text!r} occurs twice in the vocabulary")
                if isinstance(index, bool) or not isinstance(index, int | np.integer):
                    raise ValueError(f"{owner}: vocabulary[{key!r}] must be an integer, got {index!r}")
                if not 0 <= index < self.vocabulary_size:
                    raise ValueError(f"{owner}: vocabulary[{key!r}] = {index} is not in [0, {self.vocabulary_size})")
                vocabulary[text] = int(index)
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

    for column in as_columns(feature_columns):
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


def as_columns(columns) -> list:
    """The columns as a list; one column is a list of one."""
    return [columns] if isinstance(columns, _Column) else list(columns)


def sequence_names(columns) -> set:
    """The inputs whose samples may be shorter than the model's: values of multi-valued columns, and their weights."""
    sequences = [column for column in columns if isinstance(column, VarLenSparseFeat)]
    return {column.name for column in sequences} | {c.weight_name for c in sequences if c.weight_name is not None}


def get_feature_names(feature_columns: Sequence) -> list[str]:
    """The names of the inputs that a model of these columns takes."""
    return list(input_specs(feature_columns))


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
