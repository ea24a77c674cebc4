"""A zip of a JSON manifest and uncompressed .npy arrays, used where they lie; `numpy.load` reads it too.

Entries lie one behind the other from the file's first byte, the manifest first: each a local header whose last 20 bytes
are its size in zip64's form, and its data. They are read in exactly this form, from those headers; whatever else a zip
or an .npy may be is an error, so that a file that somebody else made cannot ask for memory out of proportion to its
bytes.
"""

import io
import json
import math
import os
import re
import struct
import zipfile
from typing import NamedTuple

import numpy as np

MANIFEST = "manifest.json"
LONGEST_HEADER = 512  # of a .npy of ours
LARGEST_MANIFEST = 1 << 28  # bytes; a vocabulary of ten million texts fits
MOST_ENTRIES = 1 << 16
DEEPEST = 16  # lists and objects within each other
_ALIGNMENT = 64
_BLOCK = 1 << 24  # bytes of an array that are written at a time
_NAME = re.compile(r"[^/\\\x00-\x1f\x7f]{1,300}\.npy")
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00(..)"
    rb"\{'descr': '(<f4|<f8|<i4|<i8|<u2|<u4|<u8|\|u1)', 'fortran_order': False, 'shape': "
    rb"\((\d{1,15},|\d{1,15}, \d{1,15})\), \} *\n",
    re.DOTALL,
)


class Rows:
    """An array that need not be in memory as a whole: it is written block by block.

    Args:
        shape: of the array, its rows first.
        dtype: of the array.
        chunks: a function without arguments that gives the blocks, NumPy arrays of consecutive rows from the first
            row on, however many rows each has. It is called again for each pass over the rows.

    """

    def __init__(self, shape, dtype, chunks):
        self.shape, self.dtype = tuple(int(size) for size in shape), np.dtype(dtype)
        self.chunks = chunks

    @classmethod
    def of(cls, array):
        """The rows of an array that is there; what has rows already as it is."""
        if isinstance(array, cls):
            return array
        step = max(1, _BLOCK // max(1, array.nbytes // max(1, len(array))))
        return cls(
            array.shape, array.dtype, lambda: (array[start : start + step] for start in range(0, len(array), step))
        )

    def blocks(self):
        """The blocks, C-contiguous and of the dtype. Raises ValueError for others than the shape says."""
        seen = 0
        for block in self.chunks():
            block = np.ascontiguousarray(block, self.dtype)
            seen += len(block)
            if block.shape[1:] != self.shape[1:] or seen > self.shape[0]:
                raise ValueError(f"a source of shape {self.shape} gave a block {block.shape} up to row {seen:,}")
            yield block
        if seen != self.shape[0]:
            raise ValueError(f"a source of shape {self.shape} ended after {seen:,} rows")

    def shard(self, index, count):
        """Every `count`th row from row `index` on; a pass over them is one over all rows."""

        def chunks():
            start = 0
            for block in self.blocks():
                yield block[(index - start) % count :: count]
                start += len(block)

        return Rows((len(range(index, self.shape[0], count)), *self.shape[1:]), self.dtype, chunks)


class Entry(NamedTuple):
    """Where an entry lies in the file: its local header, its data, and what comes after."""

    header: int
    start: int
    end: int


def write_entry(archive, name, data, header=b""):
    """One entry whose data start at a multiple of the alignment."""
    _write_entry(archive, name, [data], header)


def _write_entry(archive, name, blocks, header):
    info = zipfile.ZipInfo(name)
    fixed = archive.fp.tell() + 30 + len(name.encode()) + 20  # the local header, with the block that zip64 adds
    padding = -(fixed + 4 + len(header)) % _ALIGNMENT
    info.extra = struct.pack("<HH", 0xFFFF, padding) + bytes(padding)
    with archive.open(info, "w", force_zip64=True) as entry:
        entry.write(header)
        for block in blocks:
            entry.write(block)


def write_manifest(archive, manifest, largest=LARGEST_MANIFEST):
    """The first entry. Raises ValueError for one that is larger than `manifest` reads."""
    content = json.dumps(manifest, default=lambda x: x.item()).encode()
    if len(content) > largest:
        raise ValueError(f"the manifest has {len(content):,} bytes, {largest:,} is the most")
    write_entry(archive, MANIFEST, content)


def write_array(archive, name, array):
    """The entry of an array, or of `Rows`, which are asked for once."""
    header, rows = io.BytesIO(), Rows.of(array)
    descr = np.lib.format.dtype_to_descr(rows.dtype)
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": rows.shape})
    blocks = (block.reshape(-1).view(np.uint8).data for block in rows.blocks())
    _write_entry(archive, f"{name}.npy", blocks, header.getvalue())


def seal(file, text):
    """Makes a text the zip's comment, the last bytes of the file; up to there all of it was covered by a digest."""
    comment = text.encode()
    file.seek(-2, os.SEEK_END)  # the length of the comment, which was none
    file.write(struct.pack("<H", len(comment)) + comment)


def entries(content):
    """(Entry of the manifest, {name of an array: Entry}) of a mapped file. Raises ValueError for another layout."""
    found, at = {}, 0
    while content[at : at + 4] == b"PK\x03\x04":
        name, entry = _entry(content, at)
        if not (_NAME.fullmatch(name) if found else name == MANIFEST):
            raise ValueError(f"entry {len(found)} has the name {name[:100]!r}")
        if name in found:
            raise ValueError(f"entry {name!r} is there twice")
        if len(found) > MOST_ENTRIES:
            raise ValueError(f"it has more than {MOST_ENTRIES:,} arrays")
        found[name] = entry
        at = entry.end
    if not found or content[at : at + 4] != b"PK\x01\x02":
        raise ValueError(f"at byte {at} there is no entry, and no zip's directory")
    manifest = found.pop(MANIFEST)
    return manifest, {name.removesuffix(".npy"): entry for name, entry in found.items()}


def _entry(content, at):
    """(name, Entry) of the local header at a place."""
    header = content[at : at + 30]
    if len(header) < 30:
        raise ValueError(f"the entry at byte {at} is cut off")
    _, flags, method, *_, name_size, extra_size = struct.unpack("<4x5H3I2H", header)
    if flags & ~0x800 or method:  # 0x800: the name is UTF-8
        raise ValueError(f"the entry at byte {at} is compressed or encrypted: flags {flags}, method {method}")
    start = at + 30 + name_size + extra_size
    name = content[at + 30 : at + 30 + name_size].decode("utf-8")
    size_block = content[max(at + 30 + name_size, start - 20) : start]
    if len(size_block) < 20:
        raise ValueError(f"entry {name[:100]!r} has no size of 64 bits")
    tag, length, size, stored = struct.unpack("<HHQQ", size_block)
    if (tag, length, stored) != (1, 16, size) or start + size > len(content):
        raise ValueError(f"entry {name[:100]!r} has {size} bytes, stored as {stored}, which the file does not have")
    return name, Entry(at, start, start + size)


def manifest(content, entry, largest=LARGEST_MANIFEST):
    """The manifest, parsed. Raises ValueError for one that is not JSON, too large, or too deep.

    Parsing can take twenty times its bytes.
    """
    size = entry.end - entry.start
    if size > largest:
        raise ValueError(f"the manifest has {size:,} bytes, {largest:,} is the most")
    return parsed(content[entry.start : entry.end])


def parsed(text):
    """JSON from text or UTF-8. Raises ValueError for anything else, and for lists and objects that lie too deep."""
    try:
        value = json.loads(text)
    except RecursionError:
        value = None
    if value is None or not _is_shallow(value, DEEPEST):
        raise ValueError(f"its JSON is null, or holds lists and objects more than {DEEPEST} deep")
    return value


def _is_shallow(value, depth):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > 0 and all(_is_shallow(part, depth - 1) for part in inner if isinstance(part, dict | list))


def array(content, entry):
    """The array of an entry, where it lies. Raises ValueError for an .npy of another form than ours."""
    known = _NPY.match(content[entry.start : min(entry.end, entry.start + LONGEST_HEADER)])
    if not known or known.end() != 10 + int.from_bytes(known[1], "little"):
        raise ValueError(f"the entry at byte {entry.header} is no .npy array of this package's form")
    dtype, shape = np.dtype(known[2].decode()), tuple(int(size) for size in known[3].split(b",") if size)
    start, count = entry.start + known.end(), math.prod(shape)
    if start % _ALIGNMENT or count * dtype.itemsize != entry.end - start:
        raise ValueError(f"at byte {start} {dtype} of shape {shape} does not fit {entry.end - start} aligned bytes")
    return np.frombuffer(content, dtype, count, start).reshape(shape)
