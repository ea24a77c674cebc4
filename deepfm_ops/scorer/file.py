"""The scorer's file: a zip of uncompressed .npy arrays and a JSON manifest, checksummed as a whole, mapped into memory.

`numpy.load` and any zip tool read it too. Every array starts at a multiple of 64 bytes, so that it can be used where it
lies and all processes share one copy. The zip's comment, the last bytes of the file, is

    deepfm_ops scorer <format> sha256 <hex digest>

and its digest is the SHA-256 of the SHA-256s of all bytes before the comment's length, in pieces of 16 MiB, which
threads compute side by side. The manifest has

    info      what `Scorer.info` shows
    plan      a `deepfm_ops.plan.Plan`, with the names of arrays for sources: of each lookup "table" and "weights"; of
              hidden layer i kernel_i and bias_i; linear_kernel, deep and bias
    features  `FeatureDictionary.state`, or null; its arrays are called "features_..." here
"""

import concurrent.futures
import hashlib
import mmap
import os
import re
import struct
import zipfile

from deepfm_ops import container
from deepfm_ops.container import MANIFEST
from deepfm_ops.files import replacing

FORMAT = 2
READABLE = (1, 2)  # 1: features are lists in the manifest
LARGEST_MANIFEST = 1 << 24  # bytes, from format 2 on, where arrays hold what is long
_PIECE = 1 << 24
_COMMENT = re.compile(rb"deepfm_ops scorer (\d+) sha256 ([0-9a-f]{64})\Z")
_COMMENT_START = b"deepfm_ops scorer "
_LONGEST_COMMENT = 200


class ScorerFileError(ValueError):
    """A file that is not a scorer's, is damaged, is of a format that this version does not read, or holds no model."""


def _digest(content):
    """Hex digest of a buffer, see above."""
    pieces = [content[start : start + _PIECE] for start in range(0, len(content), _PIECE)]
    sha256 = lambda piece: hashlib.sha256(piece).digest()  # noqa: E731
    if len(pieces) == 1:
        return hashlib.sha256(sha256(pieces[0])).hexdigest()
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return hashlib.sha256(b"".join(pool.map(sha256, pieces))).hexdigest()


def write(path, manifest, arrays):
    """Writes the file, replacing what is at `path` whole or not at all.

    Args:
        path: of the file.
        manifest: a dict for JSON.
        arrays: {name: NumPy array}.

    """
    with replacing(path) as fresh, open(fresh, "x+b") as file:
        with zipfile.ZipFile(file, "w") as archive:
            container.write_manifest(archive, manifest, LARGEST_MANIFEST)
            for name, array in arrays.items():
                container.write_array(archive, name, array)
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content, memoryview(content) as view:
            with view[:-2] as covered:  # the last two bytes are the length of the comment
                digest = _digest(covered)
        container.seal(file, f"deepfm_ops scorer {FORMAT} sha256 {digest}")


def _checked(path, content):
    """(digest, format) of the mapped file, once it is known to be right."""
    tail = content[-_LONGEST_COMMENT:]
    comment = tail[tail.rfind(_COMMENT_START) :] if _COMMENT_START in tail else b""
    known = _COMMENT.match(comment)
    version = re.match(rb"deepfm_ops scorer (\d{1,9}) ", comment)
    if version and int(version[1]) > FORMAT:
        raise ScorerFileError(
            f"{path} is of format {int(version[1])}, this version of deepfm_ops reads {FORMAT}: upgrade deepfm_ops, or "
            "export the model with this version"
        )
    if not known or int(known[1]) not in READABLE:
        if content[:4] == b"PK\x03\x04" and content[30 : 30 + len(MANIFEST)] == MANIFEST.encode():
            raise ScorerFileError(f"{path} is damaged: it was cut off, or its end was changed")
        raise ScorerFileError(f"{path} is not a scorer file; deepfm_ops.export_scorer writes them")
    end = len(content) - len(comment) - 2
    with memoryview(content) as view, view[:end] as covered:
        found = _digest(covered)
    if found != known[2].decode() or content[end : end + 2] != struct.pack("<H", len(comment)):
        raise ScorerFileError(f"{path} is damaged: its checksum is {found}, it should be {known[2].decode()}")
    return found, int(known[1])


def read(path):
    """(manifest, {name: array}, digest) of a file that `write` wrote; the arrays are read-only views of the mapping.

    Raises:
        FileNotFoundError: no such file.
        ScorerFileError: the file cannot be used; the text says why.

    """
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ScorerFileError(f"{path} is empty")
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        digest, version = _checked(path, content)
    try:
        manifest, entries = container.entries(content)
        arrays = {name: container.array(content, entry) for name, entry in entries.items()}
        largest = container.LARGEST_MANIFEST if version == 1 else LARGEST_MANIFEST
        return container.manifest(content, manifest, largest), arrays, digest
    except ValueError as error:  # whole, but of another writer
        raise ScorerFileError(f"{path} does not hold a model: {error}") from error
