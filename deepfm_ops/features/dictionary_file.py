"""The file of a FeatureDictionary: a zip of uncompressed .npy arrays and a JSON manifest, mapped into memory.

It is the scorer's container (`scorer/file.py`), checked piece by piece instead of as a whole, so that ten million
values are open in milliseconds. Its last array, sums.npy, holds the checksums of the blocks of 4 KiB of everything
before it, each compared when the block is first used; the zip's comment, the last bytes of the file, is

    deepfm_ops features <format> sha256 <hex digest of all bytes from sums.npy's header to the comment's length>
"""

import hashlib
import mmap
import re
import struct
import zipfile

import numpy as np

from deepfm_ops import container
from deepfm_ops.features.vocabulary import DictionaryFileError, native
from deepfm_ops.files import replacing

_COMMENT = re.compile(rb"deepfm_ops features (\d{1,9}) sha256 ([0-9a-f]{64})\Z")
_FORMAT = 1
_LONGEST_COMMENT = 200
_PIECE = 1 << 26  # bytes of the file whose checksums are made at a time; whole blocks


def is_one(path):
    """Whether the file is a zip; older dictionaries are JSON."""
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def write(path, manifest, arrays):
    """Writes the file, replacing what is at `path` whole or not at all."""
    with replacing(path) as fresh, open(fresh, "x+b") as file:
        with zipfile.ZipFile(file, "w") as archive:
            container.write_manifest(archive, manifest)
            for name, array in arrays.items():
                container.write_array(archive, name, array)
            file.flush()
            end, sums = file.tell(), []
            file.seek(0)
            for start in range(0, end, _PIECE):
                sums.append(native.sums(np.frombuffer(file.read(min(_PIECE, end - start)), np.uint8)))
            file.seek(end)
            container.write_array(archive, "sums", np.concatenate(sums))
        file.seek(end)
        digest = hashlib.sha256(file.read()[:-2]).hexdigest()
        container.seal(file, f"deepfm_ops features {_FORMAT} sha256 {digest}")


class _Arrays(dict):
    """The arrays of a file, each checked when it is first asked for; `get` gives one unchecked."""

    def __init__(self, arrays, places, blocks, path):
        super().__init__(arrays)
        self._unchecked = set(arrays)
        self._places = places
        self._blocks = blocks
        self.path = path

    def __getitem__(self, name):
        if name in self._unchecked:
            start = self._places[name]
            check(self._blocks, start, start + super().__getitem__(name).nbytes, self.path)
            self._unchecked.discard(name)
        return super().__getitem__(name)


def check(blocks, start, end, path):
    bad = blocks.first_bad(start, end)
    if bad >= 0:
        raise DictionaryFileError(f"{path} is damaged: the 4 KiB from byte {bad} on are not what their checksum says")


def read(path):
    """(manifest, arrays, what checks the slots) of a file that `write` wrote.

    Raises:
        ValueError: a file that is damaged, of another format, or no dictionary's.

    """
    with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        tail = content[-_LONGEST_COMMENT:]
        at = tail.rfind(b"deepfm_ops features ")
        known = _COMMENT.match(tail[at:]) if at >= 0 else None
        if known is None:
            raise ValueError("it is damaged, cut off, or not written by FeatureDictionary.save")
        if int(known[1]) > _FORMAT:
            raise ValueError(f"it is of format {int(known[1])}, this version of deepfm_ops reads {_FORMAT}: upgrade it")
    manifest_entry, entries = container.entries(content)
    if not entries or list(entries)[-1] != "sums":
        raise ValueError("it is damaged: it has no checksums")
    last = entries.pop("sums")
    digest = hashlib.sha256(content[last.header : len(content) - len(tail[at:]) - 2]).hexdigest()
    if digest != known[2].decode() or tail[at - 2 : at] != struct.pack("<H", len(tail) - at):
        raise ValueError("it is damaged: the end of the file is not what its digest says")
    whole = np.frombuffer(content, np.uint8)
    blocks = native.Blocks(whole[: last.header], container.array(content, last))
    check(blocks, 0, manifest_entry.end, path)
    arrays, places = {}, {}
    for name, entry in entries.items():
        check(blocks, entry.header, min(entry.end, entry.start + container.LONGEST_HEADER), path)
        arrays[name] = container.array(content, entry)
        places[name] = arrays[name].ctypes.data - whole.ctypes.data
    return container.manifest(content, manifest_entry), _Arrays(arrays, places, blocks, path), blocks
