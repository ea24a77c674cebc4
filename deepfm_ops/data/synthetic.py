"""A click log of Criteo's form, of any size, whose true model is known. Imports neither TensorFlow nor pyarrow.

What a value does to a label follows from a hash of its text, so that nothing has to be kept of tens of millions of
values, and any chunk of rows can be drawn by itself.
"""

import collections.abc
import gzip
import itertools
import operator
import pathlib
from typing import NamedTuple

import numpy as np

from deepfm_ops.files import replacing

CHUNK_ROWS = 16_384  # drawn at a time: a column then stays in a processor's cache
FORMATS = ("tsv", "tsv.gz", "csv", "parquet")
NUMERIC = tuple(f"I{i}" for i in range(1, 14))
CATEGORICAL = tuple(f"C{i}" for i in range(1, 27))

# Median, deviation of the logarithm, and missing share of I1 to I13. They are log-normal, cut to integers, which comes
# near the quartiles of the 200 rows of Criteo's log that DeepCTR ships.
_NUMBERS = (
    (1.3, 1.6, 0.45),
    (6.0, 2.2, 0),
    (6.5, 1.7, 0.21),
    (5.0, 1.1, 0.22),
    (2800, 1.9, 0.03),
    (32, 1.6, 0.22),
    (3.5, 1.8, 0.04),
    (8.0, 1.1, 0.0005),
    (38, 1.4, 0.04),
    (0.9, 0.8, 0.45),
    (1.6, 1.4, 0.04),
    (0.5, 1.4, 0.77),
    (5.0, 1.2, 0.22),
)
_MEDIAN, _SPREAD, _MISSING_NUMBERS = np.array(_NUMBERS, np.float32).T[:, :, None]  # [13, 1] each
_LOWEST = np.array([[-1 if name == "I2" else 0] for name in NUMERIC], np.int32)
_HIGHEST = 9_999_999  # float32 holds it, and 8 characters do

# Values and missing share of C1 to C26, as in Criteo's log of 45 million rows.
_VALUES = (
    (1460, 0),
    (583, 0),
    (10131227, 0.034),
    (2202608, 0.034),
    (305, 0),
    (24, 0.12),
    (12517, 0),
    (633, 0),
    (3, 0),
    (93145, 0),
    (5683, 0),
    (8351593, 0.034),
    (3194, 0),
    (27, 0),
    (14992, 0),
    (5461306, 0.034),
    (10, 0),
    (5652, 0),
    (2173, 0.44),
    (4, 0.44),
    (7046547, 0.034),
    (18, 0.76),
    (15, 0),
    (286181, 0.034),
    (105, 0.44),
    (142572, 0.44),
)
_CARDINALITY, _MISSING_VALUES = np.array(_VALUES).T[:, :, None]  # [26, 1] each
_IS_LARGE = _CARDINALITY >= 5000  # their values come and go, as those of users and advertisements do
_LIFE = 16  # days that a value of theirs has its rank

# The true model. Over day 0 its logit is about normal, with this mean and deviation: a base rate of a quarter, and an
# AUC of .80 to .81 for the model itself. How far which kind of model comes is decided by the shares of the variance.
_MEAN, _DEVIATION = -1.45, 1.4
_SHARES = {"values": 0.5, "numbers": 0.2, "pairs": 0.3}
_OF_LARGE = (
    0.5  # effect of a large column's values, in that of another's: half of their rows hold values too rare to learn
)
_CLASS_BITS = 14  # of a value's hash that pick its effects: so many can be kept, and are drawn once
_FACTORS = 4
_CURVATURE = 0.25  # deviation of a number's quadratic effect, in that of its linear one
_TURN = 0.06  # radians a day: the effects of days d apart are correlated by cos(d * _TURN)


class _Rows(NamedTuple):
    numbers: np.ndarray  # int32 [13, n]
    values: np.ndarray  # uint32 [26, n], what their 8 digits say
    present: np.ndarray  # bool [39, n]; what is drawn where it is False is not shown
    luck: np.ndarray  # float64 [n]: the label is 1 where it is below the probability


class ClickLog:
    """Days of a click log in the form of Criteo's, drawn from a true model that drifts.

    A row is a label (0 or 1), 13 integers and 26 categories of 8 hexadecimal digits; integers and categories may be
    missing. The frequency of a value is the inverse of its rank (Zipf's law). Every day, one in 16 ranks of the twelve
    largest columns goes to a value that never was there before, and values that were rare before turn up anyway.

    The true logit adds up a bias, an effect of every value, products of factors of every two values of the fourteen
    smaller columns, and a linear and a quadratic effect of the logarithm of every number. What is missing has no
    effect. Effects and factors change slowly from day to day, each for itself: after 6 days they are correlated by .94
    with what they were, after 26 by nothing. They come from a hash of seed, column and text.

    Row n of a day follows from seed, scale, day and n alone: the same in whatever chunks and files it is asked for. On
    another kind of processor, or with another NumPy, some may differ.

    Args:
        seed: int from 0 on: of the values, the true model and the rows.
        scale: cardinality of the columns in Criteo's, in (0, 100]; columns of up to 100 values keep theirs, and
            no other falls below 100.

    Example:
        >>> log = ClickLog(seed=1, scale=0.01)
        >>> columns, probabilities = log.chunk(day=0, number=0, rows=1000)
        >>> list(columns) == list(log.columns), columns["C1"].dtype, columns["I1"].dtype, probabilities.shape
        (True, dtype('S8'), dtype('int32'), (1000,))
        >>> 0.79 < log.ceiling(day=0, rows=50_000) < 0.83
        True

    Attributes:
        columns: names, the label first.
        numeric, categorical: names.
        cardinalities: {name: values that a column has on one day, of which rows show the most frequent first}.

    Raises:
        ValueError: seed or scale out of range.

    """

    columns = ("label", *NUMERIC, *CATEGORICAL)
    numeric = NUMERIC
    categorical = CATEGORICAL

    def __init__(self, seed=0, scale=1.0):
        self.seed = _at_least("seed", seed, 0)
        if not 0 < scale <= 100:
            raise ValueError(f"scale must be in (0, 100], got {scale!r}")
        self.scale = scale
        scaled = np.maximum(np.rint(_CARDINALITY * scale), 100)
        self._cardinality = np.where(_CARDINALITY > 100, scaled, _CARDINALITY).astype(np.uint32)
        self.cardinalities = dict(zip(CATEGORICAL, self._cardinality[:, 0].tolist(), strict=True))
        rng = np.random.default_rng([self.seed, 1])
        self._keys = rng.integers(2**32, size=(26, 1), dtype=np.uint32)
        # Two draws of the first-order effect and the factors of a class, between which it turns.
        self._effects = rng.standard_normal((2, 2**_CLASS_BITS, 1 + _FACTORS), np.float32)
        self._effects[:, 0] = 0  # the class of what is missing
        terms = self._terms(self._draw(0, 0), 0)
        weights = np.sqrt([[share] for share in _SHARES.values()]) / terms.std(axis=1, keepdims=True)
        logits = (weights * terms).sum(axis=0)
        self._weights = weights * (_DEVIATION / logits.std())
        self._bias = _MEAN - logits.mean() * (_DEVIATION / logits.std())

    def chunk(self, day, number, rows=CHUNK_ROWS, model_day=None):
        """Rows of a day: the first ones of CHUNK_ROWS (16,384), which are drawn together.

        Args:
            day: int from 0 on.
            number: of the chunk, from 0 on.
            rows: from 1 to CHUNK_ROWS.
            model_day: day whose true model the probabilities are of; None: `day`, from whose the labels are drawn.

        Returns:
            columns: {name: array [rows]}, the label int32, numbers masked int32, categories masked bytes.
            probabilities: float64 [rows], of the label 1.

        Raises:
            ValueError: day, number, rows or model_day out of range.

        """
        day, number = _at_least("day", day, 0), _at_least("number", number, 0)
        if not 1 <= rows <= CHUNK_ROWS:
            raise ValueError(f"rows must be from 1 to {CHUNK_ROWS}, got {rows!r}")
        ((drawn, labels),) = self._pieces(day, number * CHUNK_ROWS, number * CHUNK_ROWS + rows)
        texts = _texts(drawn)
        columns = {"label": labels}
        for name, cells, present in zip(NUMERIC, drawn.numbers, drawn.present[:13], strict=True):
            columns[name] = np.ma.array(cells, mask=~present)
        for name, text, present in zip(CATEGORICAL, texts[13:], drawn.present[13:], strict=True):
            columns[name] = np.ma.array(text.view("S8"), mask=~present)
        return columns, self._probabilities(drawn, day if model_day is None else _at_least("model_day", model_day, 0))

    def write(self, folder, days, rows_per_day, files_per_day=1, format="tsv"):
        """Writes days to files, each of them whole or not at all, in memory that does not grow with the rows.

        Args:
            folder: to write to; it is made if it is not there.
            days: days from 0 on, such as range(7).
            rows_per_day: int.
            files_per_day: files to share the rows of a day out to, in their order.
            format: "tsv" (as Criteo's: no names, nothing where a cell is missing), "tsv.gz", "csv" (the same with
                commas and a line of names) or "parquet" (int32 and text, with nulls).

        Returns:
            The paths, such as folder/day-00-part-00.tsv, by day and part.

        Raises:
            ValueError: an argument out of range.
            TypeError: days is one number.
            ImportError: format is "parquet", and pyarrow is not installed.

        """
        if format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
        if not isinstance(days, collections.abc.Iterable):
            raise TypeError(f"days must be a list or a range of days, got {days!r}")
        days = [_at_least("days", day, 0) for day in days]
        rows_per_day = _at_least("rows_per_day", rows_per_day, 1)
        files_per_day = _at_least("files_per_day", files_per_day, 1)
        write = _write_parquet if format == "parquet" else _write_text
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for day, part in itertools.product(days, range(files_per_day)):
            start, stop = (rows_per_day * p // files_per_day for p in (part, part + 1))
            paths.append(folder / f"day-{day:02}-part-{part:02}.{format}")
            with replacing(paths[-1]) as fresh:
                write(fresh, self._pieces(day, start, stop), format)
        return paths

    def ceiling(self, day, rows, model_day=None):
        """The AUC that the true probabilities reach on the first rows of a day: more can only be luck.

        Args:
            day: int from 0 on.
            rows: int.
            model_day: day whose true model is asked; None: `day`. That of an earlier day is the ceiling of a model that
                has learned that day perfectly and nothing since.

        Returns:
            The AUC, expected over the labels: what labels were drawn makes no difference.

        Raises:
            ValueError: an argument out of range.

        """
        day, rows = _at_least("day", day, 0), _at_least("rows", rows, 1)
        of_days = day, day if model_day is None else _at_least("model_day", model_day, 0)
        pieces = ([self._probabilities(drawn, of) for of in of_days] for drawn, _ in self._pieces(day, 0, rows))
        return auc(*np.concatenate(list(pieces), axis=1))

    def _pieces(self, day, start, stop):
        """Rows from start to stop of a day and their labels, int32 [n], by chunk."""
        for number in range(start // CHUNK_ROWS, -(-stop // CHUNK_ROWS)):
            first = number * CHUNK_ROWS
            part = np.s_[..., max(start - first, 0) : stop - first]
            drawn = _Rows(*(array[part] for array in self._draw(day, number)))
            yield drawn, (drawn.luck < self._probabilities(drawn, day)).astype(np.int32)

    def _draw(self, day, number):
        """CHUNK_ROWS rows."""
        rng = np.random.default_rng([self.seed, 0, day, number])
        luck = rng.random(CHUNK_ROWS)
        present = rng.random((39, CHUNK_ROWS), np.float32) >= np.concatenate([_MISSING_NUMBERS, _MISSING_VALUES])
        numbers = np.exp(rng.standard_normal((13, CHUNK_ROWS), np.float32) * _SPREAD) * _MEDIAN
        numbers = np.minimum(numbers, _HIGHEST).astype(np.int32) + _LOWEST
        # Ranks from 0 on whose logarithms are even: the frequency of one is the inverse of it.
        ranks = np.exp(rng.random((26, CHUNK_ROWS)) * np.log(self._cardinality + 1.0)).astype(np.uint32) - np.uint32(1)
        lives = (np.uint32(day) + ranks % np.uint32(_LIFE)) // np.uint32(_LIFE)
        values = ranks + lives * (self._cardinality * _IS_LARGE).astype(np.uint32)
        return _Rows(numbers, _mixed(values ^ self._keys), present, luck)

    def _terms(self, rows, day):
        """The parts of the logit, float32 [3, n], in the order of _SHARES and in no unit."""
        angle = _TURN * day
        effects = np.float32(np.cos(angle)) * self._effects[0] + np.float32(np.sin(angle)) * self._effects[1]
        first, factors = effects[:, 0].copy(), effects[:, 1:].copy()
        squares = np.square(factors).sum(axis=1)
        # From the text, so that all that the model depends on can be seen; hashed again, so that digits tell nothing.
        classes = _mixed(rows.values + self._keys) >> np.uint32(32 - _CLASS_BITS)
        classes *= rows.present[13:]
        values, own = np.zeros((2, rows.luck.size), np.float32)
        vector = np.zeros((rows.luck.size, _FACTORS), np.float32)
        for column, is_large in zip(classes, _IS_LARGE[:, 0], strict=True):
            if is_large:
                values += np.float32(_OF_LARGE) * first.take(column)
            else:
                values += first.take(column)
                vector += factors.take(column, axis=0)
                own += squares.take(column)
        pairs = np.square(vector).sum(axis=1) - own  # twice the sum over pairs, as in a factorization machine
        logs = (np.log1p(rows.numbers - _LOWEST, dtype=np.float32) - np.log1p(_MEDIAN)) / _SPREAD * rows.present[:13]
        slopes = factors[1:14]  # they may as well be those of some class
        numbers = (slopes[:, :1] * logs + _CURVATURE * slopes[:, 1:2] * np.square(logs)).sum(axis=0)
        return np.stack([values, numbers, pairs])

    def _probabilities(self, rows, day):
        # No matrix product: its bits would depend on the number of threads.
        return 1 / (1 + np.exp(-self._bias - (self._weights * self._terms(rows, day)).sum(axis=0)))


def auc(truth, scores):
    """The area under the ROC curve: how often a row of label 1 has a higher score than one of label 0; a tie is a half.

    Args:
        truth: [n], labels, or probabilities of the label 1; the AUC is then the one expected.
        scores: [n].

    Returns:
        float; NaN where there is no pair.

    """
    truth = np.asarray(truth, np.float64)
    levels, level = np.unique(scores, return_inverse=True)
    ones, zeros = (np.bincount(level, weight, len(levels)) for weight in (truth, 1 - truth))
    with_itself = (truth * (1 - truth)).sum()  # a row makes no pair
    won = (ones * (np.cumsum(zeros) - zeros / 2)).sum() - with_itself / 2
    pairs = ones.sum() * zeros.sum() - with_itself
    return float(won / pairs) if pairs > 0 else float("nan")


def _at_least(name, value, least):
    number = operator.index(value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return number


def _mixed(x):
    """x, uint32, hashed in place by MurmurHash3's finalizer: two values never become one."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    x ^= x >> np.uint32(16)
    return x


# Texts are 8 bytes in a uint64, the first character in the lowest; zero bytes are none, wherever they stand. They are
# put together from halves that are looked up.
_DIGITS = np.frombuffer(b"0123456789abcdef", np.uint8)
_HEX = _DIGITS[np.arange(2**16)[:, None] >> [12, 8, 4, 0] & 15].view(np.uint32)[:, 0].astype(np.uint64)
_BELOW_10000 = np.arange(10_000).astype("S4")
_SHORT, _PADDED = (texts.view(np.uint32).astype(np.uint64) for texts in (_BELOW_10000, np.char.zfill(_BELOW_10000, 4)))
_UPPER = np.concatenate([[np.uint64(0)], _SHORT[1:]])  # number // 10,000, no digits if it is 0
_LOWER = np.concatenate(
    [_SHORT, _PADDED]
)  # number % 10,000, its zeros shown, from 10,000 on, if there is more before it
_MINUS_ONE = np.frombuffer(b"-1\0\0\0\0\0\0", np.uint64)[0]  # the only negative number
_HALF = np.uint64(32)


def _texts(rows):
    """Texts of the cells, uint64 [39, n], 0 where one is missing."""
    texts = np.empty(rows.present.shape, np.uint64)
    upper = rows.numbers // 10_000
    lower = rows.numbers - upper * 10_000 + 10_000 * (upper > 0)
    texts[:13] = np.where(rows.numbers < 0, _MINUS_ONE, _UPPER.take(upper) | _LOWER.take(lower) << _HALF)
    texts[13:] = _HEX.take(rows.values >> np.uint32(16)) | _HEX.take(rows.values & np.uint32(0xFFFF)) << _HALF
    texts *= rows.present
    return texts


_CELL = np.dtype([("separator", "u1"), ("text", "u8")])
_LINE = np.dtype([("label", "u1"), ("cells", _CELL, 39), ("end", "u1")])


def _write_text(path, pieces, format):
    separator = "," if format == "csv" else "\t"
    with open(path, "wb") as raw:
        # Without name and time, so that equal rows are equal bytes; level 6 saves a tenth in three times the time.
        file = gzip.GzipFile("", "wb", 1, raw, mtime=0) if format == "tsv.gz" else raw
        if format == "csv":
            file.write((separator.join(ClickLog.columns) + "\n").encode())
        for rows, labels in pieces:
            lines = np.empty(len(labels), _LINE)
            lines["label"] = labels + ord("0")
            lines["cells"]["separator"] = ord(separator)
            lines["cells"]["text"] = _texts(rows).T
            lines["end"] = ord("\n")
            file.write(lines.tobytes().translate(None, b"\0"))
        if file is not raw:
            file.close()


_GROUP_CHUNKS = 8  # of a row group: 131,072 rows


def _write_parquet(path, pieces, format):
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(f"parquet needs pyarrow: pip install deepfm_ops[data] ({error})") from error

    def table(rows, labels):
        arrays = [pa.array(labels)]
        for numbers, present in zip(rows.numbers, rows.present[:13], strict=True):
            arrays.append(pa.array(numbers, mask=~present))
        starts = pa.py_buffer(np.arange(0, 8 * len(labels) + 1, 8, np.int32))
        for text, present in zip(_texts(rows)[13:], rows.present[13:], strict=True):
            bits = np.packbits(present, bitorder="little")
            buffers = [pa.py_buffer(bits), starts, pa.py_buffer(text)]
            arrays.append(pa.Array.from_buffers(pa.string(), len(labels), buffers))
        return pa.Table.from_arrays(arrays, list(ClickLog.columns))

    types = [pa.int32()] * 14 + [pa.string()] * 26
    with pq.ParquetWriter(path, pa.schema(list(zip(ClickLog.columns, types, strict=True)))) as writer:
        while group := [table(*piece) for piece in itertools.islice(pieces, _GROUP_CHUNKS)]:
            writer.write_table(pa.concat_tables(group))
