"""(column, text) to index and back, in flat arrays that can be mapped from a file: the state of a feature dictionary.

`csrc/tables/vocabulary.h` has the hash table; `plain` stands in for it where nothing was compiled.
"""

import contextlib
import dataclasses

import numpy as np

try:
    from deepfm_ops._kernels import tables as native
except ImportError:  # a pure-Python install
    from deepfm_ops.features import plain as native

NO_TEXT = np.iinfo(np.uint64).max
SLOT = np.dtype([("key", "<u8"), ("id", "<u4"), ("count", "<u4")])
# What there is of each index.
DTYPES = {
    "columns": "<u2",  # the number of its field, from 1 on; 0: of index 0, and of one that was freed
    "counts": "<i8",  # how often it occurred
    "seen": "<i4",  # the generation, of `fit` (0) or an update, that saw it last
    "changed": "<i4",  # the generation that gave it to its value, or freed it
    "text_starts": "<u8",  # where its text stands; NO_TEXT: it has none
    "text_sizes": "<u2",
}


class DictionaryFileError(ValueError):
    """A file that is not a FeatureDictionary's, is damaged, or is of a format that this version does not read."""


@dataclasses.dataclass
class Values:
    """Values that a column counted, in the order in which they came.

    Attributes:
        column: number of the field.
        keys, counts: uint64 [n].
        text_ends: uint64 [n], or [0] if texts are not kept.
        texts: uint8, one after the other.

    """

    column: int
    keys: np.ndarray
    counts: np.ndarray
    text_ends: np.ndarray
    texts: np.ndarray


class Vocabulary:
    """The indices of a dictionary, and what is known of each.

    Args:
        arrays: {name: array [size]} of DTYPES, "texts" (uint8, or missing: they were not kept) and "slots" (or missing:
            they follow from the texts).
        generation: number of the last update; 0 of `fit`.
        blocks: what checks the mapped file in which the slots lie, or None.

    """

    def __init__(self, arrays, generation=0, blocks=None):
        if "slots" not in arrays:
            arrays = {**arrays, "slots": slots_of(arrays)}
        self._arrays, self.generation = arrays, generation
        # Of a mapped file get checks nothing: the table checks what it looks up, against the blocks.
        self._table = native.Table(arrays.get("slots"), blocks)

    @classmethod
    def empty(cls, keep_texts=True):
        """Index 0 alone."""
        arrays = {name: np.zeros(1, dtype) for name, dtype in DTYPES.items()}
        arrays["text_starts"][0] = NO_TEXT
        arrays["slots"] = native.slots(np.zeros(0, np.uint64), np.zeros(0, np.uint32))
        if keep_texts:
            arrays["texts"] = np.zeros(0, np.uint8)
        return cls(arrays)

    def __getattr__(self, name):
        arrays = self.__dict__.get("_arrays", {})
        if name in DTYPES:
            return arrays[name]
        raise AttributeError(name)

    def __getstate__(self):
        return {"arrays": {name: np.array(self._arrays[name]) for name in self._arrays}, "generation": self.generation}

    def __setstate__(self, state):
        self.__init__(state["arrays"], state["generation"])

    @property
    def size(self):
        return len(self._arrays["columns"])

    @property
    def keeps_texts(self):
        return "texts" in self._arrays

    def arrays(self):
        """What `__init__` takes, for a file."""
        return {name: self._arrays[name] for name in self._arrays}

    def find(self, column, texts, ids, values=None, unseen=0, threads=1):
        """Writes the index of each cell of a column to `ids`; returns how many cells are missing, and unknown."""
        with self._damage():
            return self._table.find(column, texts, ids, values, unseen, threads)

    def id(self, column, text):
        """The index of a text, 0 if it is unknown."""
        with self._damage():
            return self._table.id(column, text.encode("utf-8", "surrogatepass"))

    def count(self, counter, texts, counts):
        """Counts a column: known values in `counts`, others in the counter; the first bad row, or -1."""
        with self._damage():
            return counter.add(texts, self._table if self.size > 1 else None, counts)[2]

    @contextlib.contextmanager
    def _damage(self):
        """Inside, what the table says of a damaged file is an error that names it."""
        try:
            yield
        except RuntimeError as error:
            raise DictionaryFileError(f"{getattr(self._arrays, 'path', 'a file')}: {error}") from None

    def of(self, column):
        """The indices of a column, ascending."""
        return np.flatnonzero(self.columns == column)

    def text(self, index):
        """The text of an index, or None."""
        start = self.text_starts[index]
        if start == NO_TEXT or not self.keeps_texts:
            return None
        start = int(start)
        return bytes(self._arrays["texts"][start : start + int(self.text_sizes[index])]).decode(
            "utf-8", "surrogatepass"
        )

    def values(self, column):
        """(texts, their indices) of a column's values, by index; raises ValueError if texts were not kept."""
        if not self.keeps_texts:
            raise ValueError("this dictionary was made with keep_texts=False: it knows no value's text")
        ids = self.of(column)
        ids = ids[self.text_starts[ids] != NO_TEXT]
        content = self._arrays["texts"].tobytes()
        starts = self.text_starts[ids].astype(np.int64)
        ends = starts + self.text_sizes[ids]
        pairs = zip(starts.tolist(), ends.tolist(), strict=True)
        return [content[start:end].decode("utf-8", "surrogatepass") for start, end in pairs], ids

    def with_values(self, values, others=(), counts=None, seen=None):
        """A vocabulary of the next generation, with values and other indices added.

        Values get indices in the order of falling counts; first those that were freed, ascending.

        Args:
            values: list of `Values`.
            others: [(column, count)] of indices without a text, each with a place in that order.
            counts: int64 [size], of what was known; None: as they were.
            seen: [size] bool, what this generation saw; None: nothing.

        Returns:
            (the vocabulary, the indices of `others`).

        """
        generation = self.generation + 1 if self.size > 1 else 0
        columns = np.concatenate([np.full(len(part.keys), part.column, np.uint32) for part in values] or [[]])
        columns = columns.astype(np.uint32)
        keys = _joined([part.keys for part in values], np.uint64)
        number = _joined([part.counts for part in values], np.uint64)
        ends, sizes, texts = None, np.zeros(len(keys), np.int64), np.zeros(0, np.uint8)
        if self.keeps_texts:
            sizes = _joined([np.diff(part.text_ends.astype(np.int64), prepend=0) for part in values], np.int64)
            texts, ends = _joined([part.texts for part in values], np.uint8), np.cumsum(sizes).astype(np.uint64)
        for array in (number, columns, keys, texts, *([] if ends is None else [ends])):
            array.flags.writeable = False  # or it would be copied
        order = native.order(number, columns, keys, ends, texts)
        freed = np.flatnonzero(self.columns == 0)[1:]
        if others:
            # Of falling counts the others go before values of the same column, if equal; they are numbered behind all.
            falling, places = -number[order].astype(np.int64), []
            for column, count in others:
                first, last = np.searchsorted(falling, [-count, -count + 1])
                places.append(first + np.searchsorted(columns[order[first:last]], column))
            order = np.insert(order, places, len(keys) + np.arange(len(others)))
            columns = np.concatenate([columns, np.array([column for column, _ in others], np.uint32)])
            number = np.concatenate([number, np.array([count for _, count in others], np.uint64)])
        reused = freed[: len(order)]
        size = self.size + len(order) - len(reused)
        ids = np.concatenate([reused, np.arange(self.size, size)])
        starts = np.full(len(columns), NO_TEXT)
        lengths = np.zeros(len(columns), np.uint16)
        if self.keeps_texts:
            starts[: len(keys)] = len(self._arrays["texts"]) + np.cumsum(sizes) - sizes
            lengths[: len(keys)] = sizes
        found = {"columns": columns, "counts": number, "text_starts": starts, "text_sizes": lengths}
        arrays = {name: _grown(self._arrays[name], size) for name in DTYPES}
        if counts is not None:
            arrays["counts"][: self.size] = counts
        if seen is not None:
            arrays["seen"][: self.size][seen] = generation
        split = len(reused)
        for name, content in found.items():
            arrays[name][reused], arrays[name][self.size :] = content[order[:split]], content[order[split:]]
        for name in ("seen", "changed"):
            arrays[name][reused] = arrays[name][self.size :] = generation
        if self.keeps_texts:
            arrays["texts"] = np.concatenate([self._arrays["texts"], texts])
        id_of = np.empty(len(columns), np.uint32)
        id_of[order] = ids
        known = self._taken_slots()
        arrays["slots"] = native.slots(
            np.concatenate([known["key"], keys]), np.concatenate([known["id"], id_of[: len(keys)]])
        )
        return Vocabulary(arrays, generation), id_of[len(keys) :].tolist()

    def with_block(self, column, counts):
        """A vocabulary with a run of indices without texts at its end; returns it and the first of them."""
        size = self.size + len(counts)
        arrays = {name: _grown(self._arrays[name], size) for name in DTYPES}
        fresh = slice(self.size, size)
        arrays["columns"][fresh], arrays["counts"][fresh], arrays["text_starts"][fresh] = column, counts, NO_TEXT
        for name in ("seen", "changed"):
            arrays[name][fresh] = self.generation
        arrays |= {name: self._arrays[name] for name in ("texts", "slots") if name in self._arrays}
        return Vocabulary(arrays, self.generation), self.size

    def without(self, ids):
        """The vocabulary with indices freed; that changes them for the next generation."""
        arrays = {name: np.array(self._arrays[name]) for name in DTYPES}
        for name, value in (("columns", 0), ("counts", 0), ("text_starts", NO_TEXT), ("text_sizes", 0)):
            arrays[name][ids] = value
        arrays["changed"][ids] = self.generation + 1
        kept = self._taken_slots()
        kept = kept[arrays["columns"][kept["id"]] != 0]
        arrays["slots"] = native.slots(np.ascontiguousarray(kept["key"]), np.ascontiguousarray(kept["id"]))
        if self.keeps_texts:
            arrays["texts"] = _packed(arrays, self._arrays["texts"])
        return Vocabulary(arrays, self.generation)

    def keys(self):
        """uint64 [size]: the key of each index that has one, else 0."""
        known = self._taken_slots()
        keys = np.zeros(self.size, np.uint64)
        keys[known["id"]] = known["key"]
        return keys

    def _taken_slots(self):
        slots = self._arrays["slots"].view(SLOT)
        taken = slots[slots["key"] != 0]
        if taken["id"].max(initial=0) >= self.size:
            raise DictionaryFileError(f"a value has index {taken['id'].max()}, there are {self.size}")
        return taken


def slots_of(arrays):
    """The slots of the values whose texts are there."""
    starts = arrays["text_starts"]
    ids = np.flatnonzero(starts != NO_TEXT)
    columns = arrays["columns"][ids]
    begins = starts[ids].astype(np.int64)
    ends = begins + arrays["text_sizes"][ids]
    keys = np.zeros(len(ids), np.uint64)
    for column in np.unique(columns).tolist():
        here = columns == column
        keys[here] = native.keys(column, native.Column(begins[here], ends[here], arrays["texts"]))
    return native.slots(keys, ids.astype(np.uint32))


def _joined(parts, dtype):
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)


def _grown(array, size):
    grown = np.zeros(size, array.dtype)
    grown[: len(array)] = array
    return grown


def _packed(arrays, texts):
    """The texts without those that nothing points to; moves the starts."""
    with_text = np.flatnonzero(arrays["text_starts"] != NO_TEXT)
    order = with_text[np.argsort(arrays["text_starts"][with_text])]
    sizes = arrays["text_sizes"][order].astype(np.int64)
    starts = np.cumsum(sizes) - sizes
    if (arrays["text_starts"][order] > len(texts) - sizes).any() or sizes.sum() > len(texts):
        raise DictionaryFileError(f"values' texts lie outside of their {len(texts)} bytes")
    taken = np.repeat(arrays["text_starts"][order].astype(np.int64) - starts, sizes) + np.arange(sizes.sum())
    arrays["text_starts"][order] = starts
    return texts[taken]
