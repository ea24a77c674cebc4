"""A zip of a JSON manifest and uncompressed .npy arrays, used where they lie; `numpy.load` reads it too."""

import io
import os
import struct
import zipfile

import numpy as np

MANIFEST = "manifest.json"
LONGEST_HEADER = 512  # of a .npy of ours
_ALIGNMENT = 64


def write_entry(archive, name, data, header=b""):
    """One entry whose data start at a multiple of the alignment."""
    info = zipfile.ZipInfo(name)
    fixed = archive.fp.tell() + 30 + len(name) + 20  # the local header, with the block that zip64 adds
    padding = -(fixed + 4 + len(header)) % _ALIGNMENT
    info.extra = struct.pack("<HH", 0xFFFF, padding) + bytes(padding)
    with archive.open(info, "w", force_zip64=True) as entry:
        entry.write(header)
        entry.write(data)


def write_array(archive, name, array):
    header = io.BytesIO()
    array = np.ascontiguousarray(array)
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    write_entry(archive, f"{name}.npy", array.reshape(-1).view(np.uint8).data, header.getvalue())


def seal(file, text):
    """Makes a text the zip's comment, the last bytes of the file; up to there all of it was covered by a digest."""
    comment = text.encode()
    file.seek(-2, os.SEEK_END)  # the length of the comment, which was none
    file.write(struct.pack("<H", len(comment)) + comment)


def data_start(content, entry):
    """Where an entry's data begin in the mapped file."""
    return entry.header_offset + 30 + sum(struct.unpack_from("<HH", content, entry.header_offset + 26))


def array(content, entry):
    """The array of an entry, where it lies."""
    start = data_start(content, entry)
    header = io.BytesIO(content[start : start + LONGEST_HEADER])
    np.lib.format.read_magic(header)
    shape, _, dtype = np.lib.format.read_array_header_1_0(header)
    return np.frombuffer(content, dtype, int(np.prod(shape)), start + header.tell()).reshape(shape)
