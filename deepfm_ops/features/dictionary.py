"""The feature dictionary: one index per category and numeric column. Imports neither TensorFlow nor Keras.

`transform` is the encoding on NumPy; `dictionary_tensorflow` is its other side.
"""

import base64
import copy
import dataclasses
import itertools
import operator
import os
import pathlib
import warnings
import zlib
from collections.abc import Iterable

import numpy as np

from deepfm_ops import container, heads
from deepfm_ops.features import cells, dictionary_file, dictionary_lists, dictionary_state
from deepfm_ops.features.dictionary_state import MOST_COLUMNS, MOST_FIELDS, NONFINITE
from deepfm_ops.features.fields import LONGEST, TRANSFORMS, Field, Learner
from deepfm_ops.features.tables import Table
from deepfm_ops.features.vocabulary import DTYPES, DictionaryFileError, Vocabulary, native


class FeatureDictionary:
    """Numbers the features of a table or of files: one index per category, one per numeric column.

    Index 0 stands for everything that is missing, with value 0: it adds nothing to a factorization machine. Categories
    have value 1, numeric columns their number as it is or transformed (a factorization machine multiplies them with
    each other, so large ones want to be), and the n known values of a multivalued entry 1/n each. Indices are given in
    the order of falling counts, so that rows that are used often lie together; equal counts in the order of the
    columns, and then of the texts' bytes.

    A category is its canonical text, whatever type it comes in: 7, 7.0, "7", b"7" and numpy.int64(7) are one, "007" is
    another. Bytes are UTF-8. Values are told apart by 64 bits of (column, text): that any two of n share them, and then
    their index, has a probability near n^2 / 2^65, 3e-5 for 34 million.

    Args:
        min_count: values that `fit`, or one `update`, sees less often have no index of their own.
        nonfinite: what an infinity, a NaT or a number beyond 2^32 in a numeric column is: "error" (a ValueError that
            names row and column), or "missing".
        unseen: whether every column of categories has an index for the values that have none of their own, which is
            trained on those below `min_count`, apart from what is missing. None: if `min_count` is more than 1. False:
            they count as missing.
        keep_texts: whether the values' texts are kept, for `name`, `values` and SavedModels. False: their keys alone.
        sketch_bytes: memory of a sketch that values have to pass before they get memory of their own, where there are
            too many to count them all: 1 << 28 for 30 million. It lets a few through that occurred less often than
            `min_count`, never keeps one back. None: counts are exact.

    Example:
        >>> import pandas as pd
        >>> df = pd.DataFrame({"city": ["Rome", "Oslo"], "age": [0.3, 0.5], "tags": ["a|b", "b"]})
        >>> features = FeatureDictionary().fit(df, categorical=["city"], numeric=["age"], multivalued=["tags"])
        >>> indices, values = features.transform(df)
        >>> indices.tolist()
        [[4, 1, 5, 2], [3, 1, 2, 0]]
        >>> values.tolist()
        [[1.0, 0.30000001192092896, 0.5, 0.5], [1.0, 0.5, 1.0, 0.0]]
        >>> features.index("city", "Rome"), features.name(4)
        (4, ('city', 'Rome'))

    Attributes:
        num_features: number of indices, 0 included: the `num_features` of the layers and models.
        field_sizes: columns of the matrices per field: 1, or the longest entry seen of a multivalued one.
        num_fields: number of fields, as `DeepFM(..., field_sizes=...)` counts them.
        num_columns: columns of the matrices, the sum of field_sizes.
        fields: list of `fields.Field`, in the order categorical, numeric, multivalued.
        counts: int64 [num_features], how often each feature occurred in what `fit` and `update` saw, with a value other
            than zero (of quantile buckets beyond 131,072 numbers: an estimate); index 0, which has none, is 0. None:
            the dictionary was saved by an older version.
        num_samples: rows that `fit` and `update` saw; None likewise.
        num_skipped: records that the last `fit`, `update` or `transform` of files left out with on_bad="skip".

    """

    FORMAT = 3

    def __init__(self, min_count=1, nonfinite="error", *, unseen=None, keep_texts=True, sketch_bytes=None):
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite must be one of {', '.join(NONFINITE)}, got {nonfinite!r}")
        if not isinstance(min_count, int | np.integer) or min_count < 1:
            raise ValueError(f"min_count must be a whole number from 1 on, got {min_count!r}")
        if sketch_bytes is not None and not 64 <= sketch_bytes <= 1 << 40:
            raise ValueError(f"sketch_bytes must be from 64 on, got {sketch_bytes!r}")
        if sketch_bytes is not None and min_count > 255:  # a sketch counts no further
            raise ValueError(f"with a sketch min_count may be 255 at most, got {min_count}")
        self.min_count, self.nonfinite = int(min_count), nonfinite
        self.unseen = min_count > 1 if unseen is None else bool(unseen)
        self.keep_texts, self.sketch_bytes = bool(keep_texts), sketch_bytes
        self.fields, self.label, self.separator = [], None, "|"
        self.vocabulary = Vocabulary.empty(self.keep_texts)
        self.num_samples, self.num_skipped = None, 0

    @property
    def num_features(self):
        return self.vocabulary.size

    @property
    def field_sizes(self):
        return [field.size for field in self.fields]

    @property
    def num_fields(self):
        return len(self.fields)

    @property
    def num_columns(self):
        return sum(self.field_sizes)

    @property
    def counts(self):
        return None if self.num_samples is None else self.vocabulary.counts

    def fit(
        self,
        source,
        categorical=(),
        numeric=(),
        multivalued=(),
        label=None,
        separator="|",
        *,
        hash_buckets=None,
        max_length=None,
        weighted=(),
        on_bad="error",
    ):
        """Learns the features of tables or files, in one pass; what was learned before is forgotten.

        Args:
            source: a pandas or polars DataFrame, a pyarrow Table, or a dict of equally long arrays, lists or tensors;
                an iterable of such tables; or files, see `data.files`: a path, a glob or a list of them.
            categorical: name or names of columns of strings, numbers or booleans; NaN, NaT and None are missing.
            numeric: name or names of columns of numbers; NaN and None are missing. Or {name: how the numbers enter}:
                "identity"; "log1p": log(1 + |x|) with x's sign; "standardize": (x - mean) / standard deviation;
                "quantiles": one of 32 buckets of equally many numbers, each with an index.
            multivalued: name or names of columns of lists (ragged and sparse tensors too), or of strings to be split at
                `separator`.
            label: name of the column of labels, for `stream`; or a list of names, those of a model's heads
                (task={name: ...}), whose cells may be missing.
            separator: between the values of a multivalued string; None: blanks.
            hash_buckets: {name: buckets} of categorical or multivalued columns that shall have no vocabulary: a value's
                index is its hash's (TensorFlow's to_hash_bucket_fast).
            max_length: {name: n}, or n for all multivalued columns: the first n values of an entry count. None: as many
                as the longest entry has; one of more than 1,024 is an error.
            weighted: name or names of the multivalued columns whose values carry weights, "drama:0.7|war:0.3", which
                are the features' values.
            on_bad: "error", or "skip": records of files that cannot be read are left out and counted, in `num_skipped`
                and a warning of the log "deepfm_ops". Of a file that is cut off so is the rest, of one that cannot be
                read at all the whole, as one record. Columns that are missing or of another type are an error even so,
                and in a table that you have so is every bad cell.

        Returns:
            self.

        Raises:
            KeyError: a column that the source does not have.
            ValueError: no rows, no columns, a column named twice, columns of unequal length, bytes that are not UTF-8,
                a number that cannot be trained on (see `nonfinite`), a record of a file that cannot be read: by file,
                line and column.
            TypeError: something that is no table, or values that cannot be categories or numbers.
            FileNotFoundError: no such file, or a glob that finds none.

        """
        hash_buckets = dict(hash_buckets or {})
        transforms = (
            dict(numeric) if isinstance(numeric, dict) else dict.fromkeys(_names("numeric", numeric), "identity")
        )
        multivalued, weighted = _names("multivalued", multivalued), _names("weighted", weighted)
        categorical = _names("categorical", categorical)
        categorical += [name for name in hash_buckets if name not in (*categorical, *multivalued)]
        names = [*categorical, *transforms, *multivalued]
        label = _names("label", label) if isinstance(label, list | tuple) else label
        _check_names(names, label)
        lengths = max_length if isinstance(max_length, dict) else dict.fromkeys(multivalued, max_length)
        _check_options(transforms, multivalued, hash_buckets, lengths, weighted, separator)
        fields = []
        for number, name in enumerate(names, 1):
            if name in transforms:
                fields.append(Field(name, "numeric", number, transform=transforms[name]))
            else:
                field = Field(name, "multivalued" if name in multivalued else "categorical", number)
                field.buckets, field.max_length = hash_buckets.get(name), lengths.get(name)
                field.weighted = name in weighted
                fields.append(field)
        fresh = copy.copy(self)  # so that a column that fails leaves this dictionary as it was
        fresh.fields, fresh.label, fresh.separator = fields, label, separator
        fresh.vocabulary, fresh.num_samples = Vocabulary.empty(self.keep_texts), 0
        learners, counts, rows = fresh._see(source, on_bad)
        if rows == 0:
            raise ValueError("cannot fit on a table without rows")
        fresh.fields = [learner.learned() for learner in learners]
        values, others, owners = [], [], []
        for field, learner in zip(fresh.fields, learners, strict=True):
            if field.has_values:
                found, rest = learner.values()
                values.append(found)
                if self.unseen:
                    owners.append((field, "unseen"))
                    others.append((field.number, rest))
            elif field.kind == "numeric" and field.transform != "quantiles":
                owners.append((field, "start"))
                others.append((field.number, learner.present))
        fresh.vocabulary, places = fresh.vocabulary.with_values(values, others)
        for (field, attribute), place in zip(owners, places, strict=True):
            setattr(field, attribute, place)
        for field, learner in zip(fresh.fields, learners, strict=True):
            block = learner.block(field)
            if block is not None:
                fresh.vocabulary, field.start = fresh.vocabulary.with_block(field.number, block)
        fresh.num_samples = rows
        self.__dict__.update(fresh.__dict__)
        return self

    def update(self, source, *, on_bad="error"):
        """Learns the values of more tables or files: new ones get indices, old ones keep theirs.

        New values that occur `min_count` times in this source get indices in the order of falling counts: first those
        that `evict` freed, then new ones at the end. Counts and `num_samples` grow. What `fit` learned of numbers, and
        the lengths of entries, stay. `DeepFM.resize` makes a model follow.

        Args:
            source: as for `fit`, with the columns that it was given.
            on_bad: as for `fit`.

        Returns:
            self.

        Raises:
            ValueError: not fitted, or saved by an older version, without counts; else what `fit` raises, and then
                nothing has changed.

        """
        self._require_fit()
        if self.num_samples is None:
            raise ValueError("this dictionary was saved by an older version, without counts: fit it again to update it")
        fresh = copy.copy(self)
        learners, counts, rows = fresh._see(source, on_bad)
        values, seen = [], counts != self.vocabulary.counts
        fresh.fields = [learner.updated() for learner in learners]
        for field, learner in zip(self.fields, learners, strict=True):
            if field.has_values:
                found, rest = learner.values()
                values.append(found)
                if field.unseen:
                    counts[field.unseen] += rest
            elif field.kind == "numeric" and field.transform != "quantiles":
                counts[field.start] += learner.present
            else:
                block = learner.block(field)
                counts[field.start : field.start + len(block)] += block
        fresh.vocabulary, _ = self.vocabulary.with_values(values, counts=counts, seen=seen)
        fresh.num_samples = self.num_samples + rows
        self.__dict__.update(fresh.__dict__)
        return self

    def evict(self, unused_for):
        """Frees the indices of the values that the last `unused_for` updates did not see.

        A freed value is an unseen one. Its index goes to a value of a later `update`; `DeepFM.resize` gives that a
        fresh row.

        Args:
            unused_for: number of updates, from 1 on.

        Returns:
            int, how many were freed.

        """
        self._require_fit()
        if not isinstance(unused_for, int | np.integer) or unused_for < 1:
            raise ValueError(f"unused_for must be a number of updates from 1 on, got {unused_for!r}")
        vocabulary = self.vocabulary
        with_values = [field.number for field in self.fields if field.has_values]
        kept = np.isin(vocabulary.columns, with_values, invert=True)
        kept[[0, *(field.unseen for field in self.fields)]] = True
        freed = np.flatnonzero(~kept & (vocabulary.generation - vocabulary.seen >= unused_for))
        if len(freed):
            self.vocabulary = vocabulary.without(freed)
        return len(freed)

    def _see(self, source, on_bad):
        """(what each field saw, counts of the known values, rows) of a source."""
        from deepfm_ops.data import sources

        sketch = None if self.sketch_bytes is None else native.Sketch(self.sketch_bytes)
        learners = [Learner(field, self.keep_texts, sketch, self.min_count) for field in self.fields]
        counts, rows = np.array(self.vocabulary.counts), 0
        reading = sources.Reading(source, self.needs(), on_bad, self.nonfinite, entries=self.entries(LONGEST))
        for table in reading.tables():
            rows += table.num_rows
            for learner in learners:
                learner.see(table, self.vocabulary, counts, self.nonfinite, self.separator)
        if rows == 0 and reading.bad.count:
            raise ValueError(f"nothing can be read: {reading.bad.summary(0)}")
        self.num_skipped = reading.bad.count
        reading.bad.report(rows)
        return learners, counts, rows

    def needs(self, label=False):
        """{column: what is read of it}: "text", "entries" or "numbers"; with the labels, if asked for."""
        kinds = {"categorical": "text", "multivalued": "entries", "numeric": "numbers"}
        found = {field.name: kinds[field.kind] for field in self.fields}
        return found | (dict.fromkeys(_labels(self.label), "label") if label else {})

    def entries(self, longest=None):
        """What `data.sources.Reading` has to know of the multi-valued columns; `longest`: where no max_length is."""
        fields = [field for field in self.fields if field.kind == "multivalued"]
        return {field.name: (self.separator, field.weighted, None if field.max_length else longest) for field in fields}

    def _require_fit(self):
        if not self.fields:
            raise ValueError("fit or load the FeatureDictionary first")

    def transform(self, df, *, on_bad="error", threads=None):
        """The feature matrices of a table, or of files that fit in memory.

        Of a multivalued entry, as many known values count as the longest one in `fit` had. Where more than half of the
        categories of a column are unknown, and `fit` saw some, a warning names the column and three of them.

        Args:
            df: a table with the columns that `fit` was given, tables or files, as for `fit`; other columns are ignored.
                A dict of plain values, one for each column, is a table of one row.
            on_bad: as for `fit`.
            threads: that look values up; None: all of the machine's.

        Returns:
            indices: int64 [rows, num_columns], in [0, num_features).
            values: float32 [rows, num_columns].

        Raises:
            KeyError: a column that df does not have.
            ValueError: not fitted, columns of unequal length, or a number that cannot be used (see `nonfinite`).
            TypeError: something that is no table, or values that cannot be numbers.

        """
        from deepfm_ops.data import sources

        self._require_fit()
        if not sources.is_more_than_a_table(df):
            indices, values, unknown = self.encode(df, threads)
        else:
            parts, unknown = [], {}
            reading = self.reading(df, False, on_bad)
            for table in reading.tables():
                *part, warned = self.encode_table(table, threads)
                parts.append(part)
                unknown |= warned
            self.num_skipped = reading.bad.count
            reading.bad.report(sum(len(part[0]) for part in parts))
            empty = np.zeros((0, self.num_columns))
            indices = np.concatenate([part[0] for part in parts] or [empty.astype(np.int64)])
            values = np.concatenate([part[1] for part in parts] or [empty.astype(np.float32)])
        for message in unknown.values():
            warnings.warn(message, stacklevel=2)
        return indices, values

    def encode(self, df, threads=1):
        """`transform` that warns nobody: (indices, values, {name of a column that is mostly unknown: what to say})."""
        self._require_fit()
        lists = [field.name for field in self.fields if field.kind == "multivalued"]
        return self.encode_table(Table(df, [field.name for field in self.fields], lists), threads)

    def encode_table(self, table, threads=1):
        """`encode` of a table that was read already."""
        threads = (os.cpu_count() or 1) if threads is None else threads
        indices, values = native.matrices(table.num_rows, self.num_columns)  # every field writes all of its columns
        unknown, column = {}, 0
        for field in self.fields:
            here = slice(column, column + field.size)
            options = (self.nonfinite, self.separator, threads)
            said = field.encode(table, self.vocabulary, indices[:, here], values[:, here], *options)
            if said:
                unknown[field.name] = said
            column += field.size
        return indices, values, unknown

    def fit_transform(self, df, **columns):
        """`fit(df, **columns)`, then `transform(df)`."""
        return self.fit(df, **columns).transform(df)

    # What a stream asks for.

    def fingerprint(self):
        """A text that another dictionary, or this one after an update, does not have."""
        return f"{self.num_features} of {self.num_fields} columns, update {self.vocabulary.generation}"

    def reading(self, source, labels, on_bad):
        """The source as `data.sources.Reading`, with the labels if asked for."""
        from deepfm_ops.data import sources

        found = sources.Reading(source, self.needs(labels), on_bad, self.nonfinite, True, self.entries())
        if isinstance(self.label, list):
            found.labels = dict.fromkeys(self.label, heads.MAYBE)
        return found

    def arrays(self, table, labels):
        """[indices, values] of a table that was read, and float32 labels [rows], or [rows, columns], if asked for."""
        found = list(self.encode_table(table)[:2])
        if labels:
            columns = [table.numbers(name).astype(np.float32) for name in _labels(self.label)]
            found.append(np.stack(columns, axis=1) if isinstance(self.label, list) else columns[0])
        return found

    def stream(self, source, batch_size, *, shuffle=False, seed=0, shard=(0, 1), **options):
        """Batches of a source of any size, for Keras's fit, evaluate and predict: see `data.stream.Stream`."""
        from deepfm_ops.data.stream import stream_class

        return stream_class()(self, source, batch_size, shuffle=shuffle, seed=seed, shard=shard, **options)

    def _field(self, column):
        for field in self.fields:
            if field.name == column:
                return field
        raise KeyError(f"column {column!r} is not in the dictionary; it has {[field.name for field in self.fields]}")

    def index(self, column, value=None) -> int:
        """The index of a value of a column; of a numeric column, which has one index, whatever the value.

        Of a column whose numbers are in quantile buckets, the index of the number's bucket.

        Returns:
            int; 0 for a value that is missing; for one that was not seen by `fit`, or not often enough, the index of
            the column's unseen values, 0 if there is none.

        Raises:
            KeyError: a column that is not in the dictionary.

        """
        field = self._field(column)
        if field.kind == "numeric":
            if field.transform != "quantiles" or value is None:
                return field.start
            bucket = field.transformed(np.array([value], np.float64))[0]
            return 0 if np.isnan(bucket) else field.start + int(bucket)
        if cells.is_missing(value):
            return 0
        try:
            text = cells.text(value)
        except (TypeError, ValueError):
            return field.unseen
        if field.buckets is not None:
            return field.start + int(native.Column.of_list([text]).buckets(field.buckets)[0])
        return self.vocabulary.id(field.number, text) or field.unseen

    def indices(self, column):
        """The indices of a column, int64 [n], ascending."""
        return self.vocabulary.of(self._field(column).number)

    def values(self, column):
        """The values of a column as canonical texts, in the order of their indices.

        Raises:
            KeyError: a column that is not in the dictionary.
            ValueError: texts were not kept.

        """
        return self.vocabulary.values(self._field(column).number)[0]

    def name(self, index):
        """(column, value) of an index: the inverse of `index`.

        A value is its canonical text; None of a numeric column, of hash buckets, of a column's unseen values, and where
        texts are not kept; of a quantile bucket it is "from a to b". Index 0, which stands for everything that is
        missing, and indices that were freed are (None, None).

        Raises:
            IndexError: an index outside [0, num_features).

        """
        index = operator.index(index)
        if not 0 <= index < self.num_features:
            raise IndexError(f"index {index} is not in [0, {self.num_features})")
        number = int(self.vocabulary.columns[index])
        if number == 0:
            return None, None
        field = self.fields[number - 1]
        if field.transform == "quantiles":
            edges = [-np.inf, *field.boundaries, np.inf]
            bucket = index - field.start
            return field.name, f"from {edges[bucket]:g} to {edges[bucket + 1]:g}"
        return field.name, self.vocabulary.text(index)

    def save(self, path):
        """Writes the dictionary to a file, replacing `path` whole or not at all; `load` maps it into memory."""
        if not self.fields:
            raise ValueError("fit the FeatureDictionary before saving it")
        dictionary_file.write(path, *self.state())

    def state(self, texts=True):
        """(what is not in arrays, JSON-ready; the arrays) of the dictionary, for `from_state`.

        Args:
            texts: False leaves the values' texts out.

        """
        arrays = self.vocabulary.arrays()
        if not texts:
            arrays.pop("texts", None)
        return self._manifest() | ({} if texts else {"keep_texts": False}), arrays

    def _manifest(self):
        for field in self.fields:
            if not isinstance(field.name, str | int):
                raise ValueError(f"column {field.name!r}: a name must be text to be saved")
        if self.num_columns > MOST_COLUMNS:
            raise ValueError(f"matrices of {self.num_columns:,} columns cannot be saved, {MOST_COLUMNS:,} are the most")
        settings = (
            "min_count",
            "nonfinite",
            "unseen",
            "keep_texts",
            "sketch_bytes",
            "separator",
            "label",
            "num_samples",
        )
        return {
            "format": self.FORMAT,
            **{name: getattr(self, name) for name in settings},
            "generation": self.vocabulary.generation,
            "fields": [dataclasses.asdict(field) for field in self.fields],
        }

    def to_config(self):
        """The dictionary as a JSON-ready dict, for `from_config`. Raises ValueError for names that JSON cannot hold."""
        arrays = self.vocabulary.arrays()
        if self.keep_texts:
            del arrays["slots"]  # they follow from the texts
        return self._manifest() | {"arrays": {name: _as_text(array) for name, array in arrays.items()}}

    @classmethod
    def from_config(cls, content):
        """The dictionary of `to_config`. Raises KeyError, TypeError or ValueError for anything else."""
        if content["format"] in dictionary_lists.FORMATS:
            return cls._of(*dictionary_lists.state_of(content))
        if content["format"] != cls.FORMAT:
            raise ValueError(f"format {content['format']}, this version reads up to {cls.FORMAT}")
        arrays = {
            name: np.frombuffer(_from_text(text), DTYPES.get(name, "u1")) for name, text in content["arrays"].items()
        }
        return cls.from_state(content, arrays)

    @classmethod
    def from_state(cls, content, arrays, blocks=None):
        """The dictionary of `state`, or of an older version's `to_config`; `blocks` checks mapped arrays."""
        if content["format"] != cls.FORMAT:
            return cls.from_config(content)
        return cls._of(content, arrays, blocks)

    @classmethod
    def _of(cls, content, arrays, blocks=None):
        dictionary_state.check(content, arrays)
        options = {name: content[name] for name in ("unseen", "keep_texts", "sketch_bytes")}
        loaded = cls(content["min_count"], content["nonfinite"], **options)
        for name in ("separator", "label", "num_samples"):
            setattr(loaded, name, content[name])
        loaded.fields = [Field(**field) for field in content["fields"]]
        loaded.vocabulary = Vocabulary(arrays, content["generation"], blocks)
        return loaded

    @classmethod
    def load(cls, path):
        """Maps what `save` wrote, or reads what an older version's did.

        A mapped file's content is compared with its checksums when it is first used, block by block; processes that
        load the same file share its memory. Replace it as a whole, never write into it.

        Raises:
            FileNotFoundError: no such file.
            DictionaryFileError: a ValueError: the file is damaged, of another format, or not a FeatureDictionary. What
                uses the dictionary later raises it too, where it meets damage.

        """
        try:
            if dictionary_file.is_one(path):
                loaded = cls.from_state(*dictionary_file.read(path))
                # Whatever is done once is done now, and not in a server's first request.
                loaded.transform({field.name: None for field in loaded.fields})
                return loaded
            content = container.parsed(pathlib.Path(path).read_bytes())
            return cls._of(*dictionary_lists.state_of(content))
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise DictionaryFileError(f"{path} is not a readable FeatureDictionary: {error}") from error


def _names(kind, names):
    """The names as a list; one name is a list of one."""
    if isinstance(names, str | int):
        return [names]
    if not isinstance(names, Iterable):
        raise TypeError(f"{kind} must be a name or a list of names, got {names!r}")
    return [name.item() if isinstance(name, np.generic) else name for name in names]


def _labels(label):
    """The columns of labels."""
    return label if isinstance(label, list) else [] if label is None else [label]


def _check_names(names, label):
    if not names:
        raise ValueError("fit needs at least one column name")
    if len(names) > MOST_FIELDS:
        raise ValueError(f"at most {MOST_FIELDS} columns, got {len(names)}")
    if label == []:
        raise ValueError("label must be None, a name, or a list of at least one")
    given = [*names, *_labels(label)]
    repeated = sorted({name for name in given if given.count(name) > 1})
    if repeated:
        raise ValueError(f"columns named more than once: {repeated}")


def _check_options(transforms, multivalued, hash_buckets, lengths, weighted, separator):
    if separator is not None and not (isinstance(separator, str) and separator):
        raise ValueError(f"separator must be text, or None for blanks, got {separator!r}")
    for name, transform in transforms.items():
        if transform not in TRANSFORMS:
            raise ValueError(f"column {name!r}: a numeric column is one of {', '.join(TRANSFORMS)}, got {transform!r}")
    for name, buckets in hash_buckets.items():
        if name in transforms or not isinstance(buckets, int | np.integer) or not 1 <= buckets < 2**31:
            raise ValueError(
                f"hash_buckets[{name!r}] must be a number from 1 on, of a column of categories, got {buckets!r}"
            )
    for name in itertools.chain(lengths, weighted):
        if name not in multivalued:
            raise ValueError(f"max_length and weighted are for multivalued columns, {name!r} is none")
    for name, length in lengths.items():
        if length is not None and (not isinstance(length, int | np.integer) or length < 1):
            raise ValueError(f"max_length of {name!r} must be a number from 1 on, got {length!r}")


def _as_text(array):
    return base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes(), 1)).decode()


def _from_text(text):
    try:
        return zlib.decompress(base64.b64decode(text, validate=True))
    except (ValueError, zlib.error) as error:  # binascii's error is a ValueError
        raise ValueError(f"its arrays cannot be read: {error}") from error
