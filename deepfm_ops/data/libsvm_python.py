"""What csrc/tables/libsvm.h does, in Python: where that is not compiled, and for the tests to compare with. Slow."""

import re

import numpy as np

TOKEN = re.compile(rb"[^ \t\r,]+")  # between separators
NUMBER = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
LARGEST = {"field": 2**31 - 1, "index": 2**63 - 1}


def integer(name, text):
    """A field or an index; None where it is none."""
    if not text.isdigit():
        return None
    text = text.lstrip(b"0") or b"0"
    return int(text) if len(text) < 20 and int(text) <= LARGEST[name] else None


def number(text):
    """A value or a label as float32; None where it is not finite, or none."""
    if not NUMBER.fullmatch(text):
        return None
    with np.errstate(over="ignore"):
        value = np.float32(float(text))
    return value if np.isfinite(value) else None


class LibsvmParser:
    def __init__(self, has_fields, skip):
        self._names = ("field", "index") if has_fields else ("index",)
        self._skip = skip
        self.lines = self.skipped = 0
        self.bad = None
        self._start()

    def _start(self):
        self._labels, self._row_splits, self._pairs = [], [0], []

    @property
    def num_rows(self):
        return len(self._labels)

    def parse(self, data, begin, max_rows):
        while begin < len(data) and self.num_rows < max_rows:
            end = data.index(b"\n", begin)
            bad = self._read(bytes(data[begin:end]).partition(b"#")[0])
            if bad and not self._skip:
                self.bad = (self.lines + 1, *bad)
                break
            self.skipped += bad is not None
            self.lines += 1
            begin = end + 1
        return begin

    def _read(self, line):
        """Keeps the row of a line; or returns where its first bad token is, whether it is the label, and itself."""
        label, pairs = None, []
        for match in TOKEN.finditer(line):
            token, is_label = match.group(), label is None
            if is_label:
                label = number(token)
            else:
                *ids, value = token.split(b":")
                if len(ids) == len(self._names):
                    pairs.append([*map(integer, self._names, ids), number(value)])
                else:
                    pairs.append([None])
            if label is None or (pairs and None in pairs[-1]):
                return match.start() + 1, is_label, token
        if label is not None:
            self._labels.append(label)
            self._pairs += pairs
            self._row_splits.append(len(self._pairs))
        return None

    def take(self):
        columns = list(zip(*self._pairs, strict=True)) or [()] * (len(self._names) + 1)
        fields = np.array(columns[0], np.int32) if len(self._names) == 2 else None
        indices, values = (np.array(x, dtype) for x, dtype in zip(columns[-2:], (np.int64, np.float32), strict=True))
        taken = np.array(self._labels, np.float32), np.array(self._row_splits, np.int64), fields, indices, values
        self._start()
        return taken


def most_pairs(row_splits, fields, num_fields):
    most = np.zeros(num_fields, np.int64)
    for begin, end in zip(row_splits[:-1], row_splits[1:], strict=True):
        most = np.maximum(most, np.bincount(fields[begin:end], minlength=num_fields))
    return most


def pad_rows(row_splits, fields, indices, values, field_splits, to_indices, to_values):
    starts, ends = np.asarray(field_splits)[:-1].tolist(), np.asarray(field_splits)[1:].tolist()
    for row, (begin, end) in enumerate(zip(row_splits[:-1], row_splits[1:], strict=True)):
        to = list(starts)
        for pair in range(begin, end):
            field = 0 if fields is None else fields[pair]
            if not 0 <= field < len(to) or to[field] == ends[field]:
                return row
            to_indices[row, to[field]] = indices[pair]
            to_values[row, to[field]] = values[pair]
            to[field] += 1
    return -1
