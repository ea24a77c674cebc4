"""What `csrc/tables` does, in Python: for installs without a compiler. Every result is the same, bit for bit."""

import itertools
import re
import struct

import numpy as np

LONGEST_TEXT = 65535
BLOCK = 4096
A, B, C = 0xC3A5C85C97CB3127, 0xB492B66FBE98F273, 0x9AE16A3B2F90404F
GOLDEN = 0x9E3779B97F4A7C15
WORD = 2**64 - 1
MISSING = (b"", b"NA", b"N/A", b"NaN", b"nan", b"NULL", b"null", b"None", b"\\N", b"-")
NUMBER = re.compile(rb"[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|inf(inity)?|(?P<nan>nan(\(\w*\))?))", re.IGNORECASE)
DAMAGED = "the vocabulary's file is damaged: a block is not what its checksum says"


def _rotate(x, by):
    x &= WORD
    return (x >> by | x << (64 - by)) & WORD


def _fold(x):
    x &= WORD
    return x ^ x >> 47


def _mix(u, v, mul):
    return _fold((v ^ _fold((u ^ v) * mul)) * mul) * mul


def _ends(first, last, mul, first_mul):
    (a, b), (d, c) = first, last
    a, c, d = a * first_mul, c * mul, d * C
    return _rotate(a + b, 43) + _rotate(c, 30) + d, a + _rotate(b + C, 18) + c


def _weak(a, b, words):
    a += words[0]
    b = _rotate(b + a + words[3], 21)
    total = a + words[1] + words[2]
    return total + words[3], b + _rotate(total, 44) + a


def _step(state, s, at, mul, times):
    """Takes 64 bytes in."""
    x, y, z, v, w = state
    words = struct.unpack_from("<8Q", s, at)
    x = _rotate(x + y + v[0] + words[1], 37) * mul
    y = _rotate(y + v[1] + words[6], 42) * mul
    x ^= w[1] * times
    y += v[0] * times + words[5]
    z = _rotate(z + w[0], 33) * mul
    v = _weak(v[1] * mul, x + w[0], words[:4])
    w = _weak(z + w[1], y + words[2], words[4:])
    return z & WORD, y & WORD, x & WORD, tuple(i & WORD for i in v), tuple(i & WORD for i in w)


def fingerprint(s):
    """Fingerprint64 of bytes, by csrc/tables/fingerprint.h. Sums and products are cut to 64 bits where it matters."""
    n, mul = len(s), C + 2 * len(s)
    if n > 64:
        y = 81 * B + 113
        state = (81 * C + struct.unpack_from("<Q", s)[0], y, _fold(y * C + 113) * C, (0, 0), (0, 0))
        for at in range(0, (n - 1) // 64 * 64, 64):
            state = _step(state, s, at, B, 1)
        x, y, z, v, w = state
        mul = B + ((z & 0xFF) << 1)
        first = v[0] + w[0] + (n - 1) % 64
        state = (x, y, z, (first, v[1]), (first + w[0] + (n - 1) % 64, w[1]))
        x, y, z, v, w = _step(state, s, n - 64, mul, 9)
        found = _mix(_mix(v[0], w[0], mul) + _fold(y) * A + z, _mix(v[1], w[1], mul) + x, mul)
    elif n > 32:
        head, tail = struct.unpack_from("<4Q", s), struct.unpack_from("<4Q", s, n - 32)
        y, v = _ends(head[:2], tail[2:], mul, C)
        z = _mix(y, v, mul)
        e, g, h = head[2] * mul, (y + tail[0]) * mul, (z + tail[1]) * mul
        u = _rotate(e + head[3], 43) + _rotate(g, 30) + h
        found = _mix(u, e + _rotate(head[3] + head[0] * C, 18) + g, mul)
    elif n > 16:
        found = _mix(*_ends(struct.unpack_from("<2Q", s), struct.unpack_from("<2Q", s, n - 16), mul, B), mul)
    elif n >= 8:
        a, b = struct.unpack_from("<Q", s)[0] + C, struct.unpack_from("<Q", s, n - 8)[0]
        found = _mix(_rotate(b, 37) * mul + a, (_rotate(a, 25) + b) * mul, mul)
    elif n >= 4:
        found = _mix(n + (struct.unpack_from("<I", s)[0] << 3), struct.unpack_from("<I", s, n - 4)[0], mul)
    elif n:
        found = _fold((s[0] + (s[n // 2] << 8)) * C ^ (n + (s[-1] << 2)) * A) * C
    else:
        found = C
    return found & WORD


def _key(column, text):
    return fingerprint(text) ^ (column + 1) * GOLDEN & WORD or 1


def _number(text):
    """The number that bytes spell, NaN if they say that it is missing, None if they do neither."""
    text = text.strip()
    spelled = NUMBER.fullmatch(text)
    if text in MISSING or (spelled and spelled["nan"]):
        return np.nan
    return float(text) if spelled else None  # float() alone would take 1_000


def _is_text(cell):
    try:
        cell.decode()
    except UnicodeDecodeError:
        return False
    return len(cell) <= LONGEST_TEXT


def _check(name, array, dtype, contiguous=True):
    good = isinstance(array, np.ndarray) and array.dtype == dtype and array.ndim == 1 and array.flags.aligned
    if not good or (contiguous and not array.flags.c_contiguous):
        raise TypeError(f"{name} must be a vector of {np.dtype(dtype)}, got {array!r:.80}")


def _vector(array, dtype):
    """What may be cast without loss, cast."""
    return array.astype(dtype, casting="safe", copy=False) if isinstance(array, np.ndarray) else np.array(array, dtype)


class Column:
    """A column of text, as a list of bytes; None where a cell is missing."""

    def __init__(self, starts, ends, data, validity=None, first_bit=0, empty_is_missing=False):
        offset = np.int64 if isinstance(starts, np.ndarray) and starts.dtype == np.int64 else np.int32
        for name, array, dtype in (("starts", starts, offset), ("ends", ends, offset), ("data", data, np.uint8)):
            _check(name, array, dtype)
        if len(starts) != len(ends):
            raise ValueError("starts and ends must be equally long")
        if ((starts < 0) | (starts > ends) | (ends > len(data))).any():
            raise ValueError("a cell lies outside the data")
        content, there = data.tobytes(), np.ones(len(starts), bool)
        if validity is not None:
            _check("validity", validity, np.uint8)
            if not 0 <= first_bit <= 8 * len(validity) - len(starts):
                raise ValueError("validity has not enough bits")
            there = np.unpackbits(validity, bitorder="little")[first_bit:][: len(starts)]
        if empty_is_missing:
            there = there & (starts < ends)
        cells = zip(starts.tolist(), ends.tolist(), there.tolist(), strict=True)
        self.cells = [content[start:end] if is_there else None for start, end, is_there in cells]

    @classmethod
    def _of(cls, cells):
        column = cls.__new__(cls)
        column.cells = cells
        return column

    @classmethod
    def of_list(cls, cells):
        """Packs cells: str, bytes, or None, which is missing."""
        if not isinstance(cells, list):
            raise TypeError(f"cells must be a list, got {type(cells).__name__}")
        found = []
        for i, cell in enumerate(cells):
            if not isinstance(cell, str | bytes | None):
                raise TypeError(f"cell {i} must be str, bytes or None, got {type(cell).__name__}")
            # UTF-8 has no bytes for surrogates: they are kept apart from every text.
            found.append(cell.encode("utf-8", "surrogatepass") if isinstance(cell, str) else cell)
        return cls._of(found)

    @classmethod
    def of_integers(cls, numbers, missing=None):
        """The canonical texts of integers; `missing` says which are not there."""
        numbers = _vector(numbers, np.int64)
        missing = np.zeros(len(numbers), bool) if missing is None else _vector(missing, bool)
        if numbers.ndim != 1 or missing.shape != numbers.shape:
            raise ValueError("numbers must be a vector, missing as long")
        cells = zip(numbers.tolist(), missing.tolist(), strict=True)
        return cls._of([None if gone else b"%d" % number for number, gone in cells])

    def split(self, separator, weighted=False):
        """(row_splits, the pieces as a column, weights or None, the first row whose weight is no number or -1)."""
        separator = separator.encode() if isinstance(separator, str) else separator
        row_splits, pieces, weights, bad = [0], [], [], -1
        for row, cell in enumerate(self.cells):
            for piece in (cell or b"").split(separator or None):
                weight = 1.0
                if weighted and b":" in piece:
                    piece, _, spelled = piece.rpartition(b":")
                    weight = _number(spelled)
                    if weight is None or not abs(weight) <= 2.0**32:  # as of every number: cells.py says why
                        weight, bad = 1.0, row if bad < 0 else bad
                if piece:
                    pieces.append(piece)
                    weights.append(weight)
            row_splits.append(len(pieces))
        with np.errstate(over="ignore"):
            weights = np.array(weights).astype(np.float32) if weighted else None
        return np.array(row_splits), self._of(pieces), weights, bad

    def numbers(self):
        """(float64, NaN where a cell is missing; the first row that is no number, or -1)."""
        found = [np.nan if cell is None else _number(cell) for cell in self.cells]
        return np.array(found, np.float64), found.index(None) if None in found else -1

    def buckets(self, buckets):
        if buckets < 1:
            raise ValueError(f"buckets must be at least 1, got {buckets}")
        return np.array([-1 if cell is None else fingerprint(cell) % buckets for cell in self.cells], np.int64)

    def first_bad(self):
        """The first row that is not UTF-8 or too long, or -1."""
        return next((row for row, cell in enumerate(self.cells) if cell is not None and not _is_text(cell)), -1)

    @property
    def longest(self):
        """Bytes of the longest cell."""
        return max((len(cell) for cell in self.cells if cell is not None), default=0)

    def __getitem__(self, i):
        if i < 0:
            raise IndexError
        return self.cells[i]

    def __len__(self):
        return len(self.cells)


class Blocks:
    """Bytes of a mapped file, which are compared with their checksums when a block of them is first used."""

    def __init__(self, content, sums):
        _check("content", content, np.uint8)
        _check("sums", sums, np.uint64)
        if len(sums) != -(-len(content) // BLOCK):
            raise ValueError("one sum per block is needed")
        self.content = content
        self._sums, self._good = sums, set()

    def good(self, at):
        block = at // BLOCK
        if block not in self._good:
            if fingerprint(self.content[block * BLOCK : (block + 1) * BLOCK].tobytes()) != self._sums[block]:
                return False
            self._good.add(block)
        return True

    def first_bad(self, begin, end):
        if begin < 0 or end > len(self.content):
            raise IndexError
        return next((at for at in range(begin // BLOCK * BLOCK, end, BLOCK) if not self.good(at)), -1)


class Table:
    """(column, text) to id."""

    def __init__(self, slots, blocks=None):
        _check("slots", slots, np.uint8)
        if len(slots) % 16 or not len(slots) or slots.ctypes.data % 8:
            raise ValueError("slots must be whole ones of 16 bytes, aligned")
        self._words, self._blocks, self._start = memoryview(slots).cast("Q"), blocks, 0
        if blocks:
            self._start = slots.ctypes.data - blocks.content.ctypes.data
            if self._start < 0 or self._start + len(slots) > len(blocks.content) or self._start % 16:
                raise ValueError("slots must lie in the blocks, at a multiple of 16")

    def id_of(self, key):
        capacity = len(self._words) // 2
        home = key * capacity >> 64
        for j in itertools.chain(range(home, capacity), range(home)):
            if self._blocks and not self._blocks.good(self._start + 16 * j):
                raise RuntimeError(DAMAGED)
            if self._words[2 * j] in (key, 0):
                return self._words[2 * j + 1] & 0xFFFFFFFF if self._words[2 * j] else 0
        return 0  # slots of somebody else's, of which none is empty

    def id(self, column, text):
        return self.id_of(_key(column, text.encode() if isinstance(text, str) else text))

    def find(self, column, texts, ids, values=None, unseen=0, threads=1):
        """Writes the ids of cells to `ids`, and to `values` 1 where one is not 0, else 0; (missing, unknown)."""
        _check("ids", ids, np.int64, contiguous=False)
        if values is not None:
            _check("values", values, np.float32, contiguous=False)
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        if len(ids) != len(texts) or (values is not None and len(values) != len(texts)):
            raise ValueError("ids and values must be as long as the column")
        known = {cell: 0 if cell is None else self.id_of(_key(column, cell)) for cell in set(texts.cells)}
        found = np.array([known[cell] for cell in texts.cells], np.int64)
        missing = np.array([cell is None for cell in texts.cells], bool)
        unknown = (found == 0) & ~missing
        ids[:] = np.where(unknown, unseen, found)
        if values is not None:
            values[:] = ids != 0
        return int(missing.sum()), int(unknown.sum())


class Sketch:
    """Counters that a value must pass before it gets memory of its own; they never count too little."""

    def __init__(self, bytes):
        self._lines = max(1, bytes // 64)
        self._counts = bytearray(64 * self._lines)

    def add(self, key):
        line = 64 * (key * self._lines >> 64)
        places = line + (key & 63), line + (key >> 6 & 63)
        seen = min(255, min(self._counts[place] for place in places) + 1)
        for place in places:
            self._counts[place] = max(self._counts[place], seen)
        return seen


class Counter:
    """Counts the values of one column that a vocabulary does not have."""

    def __init__(self, column, keep_texts=True, sketch=None, least=1):
        self._column, self._keep_texts, self._sketch = column, keep_texts, sketch
        self._least = min(least, 255)  # the sketch counts no further
        self._counts, self._texts, self.total, self.nbytes = {}, {}, 0, 0

    def add(self, texts, known=None, counts=None):
        """Counts cells; (missing, unknown, the first row whose text is not UTF-8 or too long, or -1)."""
        if known is not None:
            _check("counts", counts, np.int64)
        missing, before, keys = 0, self.total, {}
        for row, cell in enumerate(texts.cells):
            if cell is None:
                missing += 1
                continue
            if cell not in keys:
                key = _key(self._column, cell)
                keys[cell] = key, known.id_of(key) if known else 0
            key, id = keys[cell]
            if id:
                if counts is None or id >= len(counts):
                    raise ValueError("counts must have an entry for every id")
                counts[id] += 1
                continue
            self.total += 1
            if not self._count(key, cell):
                return missing, self.total - before, row
        return missing, self.total - before, -1

    def _count(self, key, text):
        if key in self._counts:
            self._counts[key] = min(self._counts[key] + 1, 2**32 - 1)
            return True
        seen = self._sketch.add(key) if self._sketch else 1
        if self._sketch and seen < self._least:
            return True
        if not _is_text(text):
            return False
        self._counts[key] = seen
        if self._keep_texts:
            self._texts[key] = text
        self.nbytes += 200 + len(text) * self._keep_texts  # about what an entry of two dicts takes
        return True

    def finish(self, least=1):
        """(keys, counts, text_ends, texts) of the values that were seen so often, as they came."""
        counts = {key: count for key, count in self._counts.items() if count >= least}
        texts = [self._texts[key] for key in counts] if self._keep_texts else []
        return (
            np.array(list(counts), np.uint64),
            np.array(list(counts.values()), np.uint64),
            np.cumsum([len(text) for text in texts], dtype=np.uint64),
            np.frombuffer(b"".join(texts), np.uint8),
        )

    def __len__(self):
        return len(self._counts)


def slots(keys, ids):
    """The slots of keys and ids, as bytes [capacity * 16]."""
    keys, ids = _vector(keys, np.uint64), _vector(ids, np.uint32)
    if keys.size != ids.size:
        raise ValueError("keys and ids must be equally long")
    if not keys.all():
        raise ValueError("a key of 0 is that of a missing cell")
    capacity = max(8, len(keys) + len(keys) // 2 + 1)
    found = np.zeros(2 * capacity, np.uint64)
    words = memoryview(found)
    for key, id in zip(keys.tolist(), ids.tolist(), strict=True):
        j = key * capacity >> 64
        while words[2 * j]:
            j = (j + 1) % capacity
        words[2 * j], words[2 * j + 1] = key, id
    return found.view(np.uint8)


def keys(column, texts):
    """uint64: the keys of a column's cells, 0 where they are missing."""
    return np.array([0 if cell is None else _key(column, cell) for cell in texts.cells], np.uint64)


def order(counts, columns, keys, text_ends, texts):
    """The order of ids: falling counts; of equal counts columns ascending, then texts, or keys without texts."""
    counts, columns, keys = _vector(counts, np.uint64), _vector(columns, np.uint32), _vector(keys, np.uint64)
    texts, last = _vector(texts, np.uint8), keys.tolist()
    good = len(counts) == len(columns) == len(keys)
    if good and text_ends is not None:
        ends = [0, *_vector(text_ends, np.uint64).tolist()]
        good = len(ends) == len(counts) + 1 and ends == sorted(ends) and ends[-1] <= len(texts)
        last = [texts[start:end].tobytes() for start, end in zip(ends, ends[1:], strict=False)]
    if not good:
        raise ValueError("counts, columns, keys and texts do not fit")
    counts, columns = counts.tolist(), columns.tolist()
    return np.array(sorted(range(len(counts)), key=lambda i: (-counts[i], columns[i], last[i])), np.int64)


def fill_bags(row_splits, ids, weights, indices, values):
    """Writes rows' first ids that are not 0 to matrices [rows, size]; a value is its weight, or 1 / their number."""
    row_splits, ids = _vector(row_splits, np.int64), _vector(ids, np.int64)
    weights = None if weights is None else _vector(weights, np.float32)
    rows = len(row_splits) - 1
    if not (indices.dtype == np.int64 and values.dtype == np.float32 and indices.shape == values.shape) or (
        indices.ndim != 2 or len(indices) != rows
    ):
        raise TypeError("indices and values must be int64 and float32 [rows, size]")
    good = row_splits[0] >= 0 and row_splits[-1] <= len(ids) and (np.diff(row_splits) >= 0).all()
    if not good or (weights is not None and len(weights) != len(ids)):
        raise ValueError("row_splits do not fit the ids")
    indices[:], values[:] = 0, 0
    for row in range(rows):
        taken = row_splits[row] + np.flatnonzero(ids[row_splits[row] : row_splits[row + 1]])[: indices.shape[1]]
        indices[row, : len(taken)] = ids[taken]
        if len(taken):
            values[row, : len(taken)] = 1 / len(taken) if weights is None else weights[taken]


def sums(content):
    """uint64 [blocks]: the checksums of the blocks of 4 KiB."""
    _check("content", content, np.uint8)
    blocks = [content[at : at + BLOCK].tobytes() for at in range(0, len(content), BLOCK)]
    return np.array([fingerprint(block) for block in blocks], np.uint64)


def is_utf8(content):
    """Whether bytes are UTF-8."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def matrices(rows, columns):
    """(int64, float32) [rows, columns], uninitialized."""
    return np.empty((rows, columns), np.int64), np.empty((rows, columns), np.float32)
