"""The scorer's file: a zip of uncompressed .npy arrays and a JSON manifest, checksummed as a whole, mapped into memory.

`numpy.load` and any zip tool read it too. Every array starts at a multiple of 64 bytes, so that it can be used where it
lies and all processes share one copy. The zip's comment, the last bytes of the file, is

    deepfm_ops scorer <format> sha256 <hex digest>

and its digest is the SHA-256 of the SHA-256s of all bytes before the comment's length, in pieces of 16 MiB, which
threads compute side by side. The manifest has

    info      what `Scorer.info` shows
    plan      a `deepfm_ops.plan.Plan`, with the names of arrays for sources: of each lookup "table" and "weights"; of
              hidden layer i kernel_i and bias_i; of second order i, where there are several heads or classes,
              second_order_i, and with field_weights field_weights_i; linear_kernel, deep and bias
    features  `FeatureDictionary.state`, or null; its arrays are called "features_..." here
    shards    {"name": ..., "digests": [...]} of a file whose tables are in N others beside it; else it is not there

Row r of a table is row r // N of shard r % N, a file of the same form, whose arrays have the tables' names and whose
manifest is {"shard": {"index": r % N, "count": N}}. It is called <name>-<index>-of-<N>-<16 digits of its digest>, so
that the shards of a new export do not replace those that are in use.
"""

import concurrent.futures
import hashlib
import mmap
import os
import pathlib
import re
import secrets
import shutil
import struct
import zipfile
from typing import NamedTuple

from deepfm_ops import container
from deepfm_ops.container import MANIFEST
from deepfm_ops.files import replacing
from deepfm_ops.scorer.rows import Sharded

FORMAT = 2  # of a file that has no shards
SHARDED = 3  # of one that has them, and of each shard
HEADS = 4  # of one of several heads, or of classes
NEWEST = 5  # of one with an order of 3, or with field weights
READABLE = (1, 2, 3, 4, 5)  # 1: features are lists in the manifest
LARGEST_MANIFEST = 1 << 24  # bytes, from format 2 on, where arrays hold what is long
MOST_SHARDS = 1 << 12
_READS = 8  # of a file that is replaced again and again while its shards are opened
_PIECE = 1 << 24
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[^/\\\x00-\x1f\x7f]{1,255}")  # of a file in the same folder
_LONGEST_COMMENT = 200


class _Kind(NamedTuple):
    """What a file is, as its comment says."""

    word: str
    newest: int
    readable: tuple
    called: str
    writer: str
    content: str


_SCORER = _Kind("scorer", NEWEST, READABLE, "a scorer file", "deepfm_ops.export_scorer", "a model")
_ITEMS = _Kind("items", 1, (1,), "a file of items", "Items.save", "items")


class ScorerFileError(ValueError):
    """A file that is not a scorer's, is damaged, is of a format that this version does not read, or holds no model.

    Or that is none of items, which `Items.load` reads.
    """


class _Lost(ScorerFileError):
    """A shard that is not there, perhaps because its file was replaced after it was read."""


def _digest(content):
    """Hex digest of a buffer, see above."""
    sha256 = lambda start: hashlib.sha256(content[start : start + _PIECE]).digest()  # noqa: E731
    starts = range(0, len(content), _PIECE)
    if len(starts) == 1:
        return hashlib.sha256(sha256(0)).hexdigest()
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return hashlib.sha256(b"".join(pool.map(sha256, starts))).hexdigest()


class _Written:
    """The bytes of a file, read when they are asked for: mapped pages would count as memory of the process."""

    def __init__(self, file, size):
        self._file, self._size = file, size

    def __len__(self):
        return self._size

    def __getitem__(self, piece):
        start, stop, _ = piece.indices(self._size)
        return os.pread(self._file.fileno(), stop - start, start)


def _write(path, manifest, arrays, version, kind=_SCORER):
    """Writes a new file, and returns its digest."""
    with open(path, "x+b") as file:
        with zipfile.ZipFile(file, "w") as archive:
            container.write_manifest(archive, manifest, LARGEST_MANIFEST)
            for name, array in arrays.items():
                container.write_array(archive, name, array)
        file.flush()
        digest = _digest(_Written(file, os.fstat(file.fileno()).st_size - 2))  # without the length of the comment
        container.seal(file, f"deepfm_ops {kind.word} {version} sha256 {digest}")
    return digest


def write(path, manifest, arrays, digests=()):
    """Writes the file, replacing what is at `path` whole or not at all. The shards of what was there are removed.

    Args:
        path: of the file.
        manifest: a dict for JSON.
        arrays: {name: NumPy array or `container.Rows`}.
        digests: what `write_shard` returned for each shard, by index, if the tables are in shards.

    Raises:
        ValueError: a shard that is not there, or too many.

    """
    path = pathlib.Path(os.path.realpath(path))
    shards = {shard_path(path, index, len(digests), digest) for index, digest in enumerate(digests)}
    for shard in shards:
        if not shard.exists():
            raise ValueError(f"{shard} is not there: write_shard must have written it before")
    if digests:
        manifest = {**manifest, "shards": {"name": path.name, "digests": list(digests)}}
    with replacing(path) as fresh:
        _write(fresh, manifest, arrays, _oldest(manifest))
        before = _shards_in_use(path)
    for shard in before - shards:
        shard.unlink(missing_ok=True)


def _oldest(manifest):
    """The oldest format that has what a manifest says."""
    info, plan = manifest.get("info", {}), manifest.get("plan", {})
    if plan.get("order", 2) != 2 or plan.get("field_weights"):
        return NEWEST
    if not isinstance(info.get("task", ""), str):
        return HEADS
    return SHARDED if "shards" in manifest else FORMAT


def write_shard(path, index, count, arrays):
    """Writes a shard of the file that `write` will write; any process can, if it sees the folder.

    Args:
        path: of the file, not of the shard, which lies beside it.
        index: of the shard, in [0, count).
        count: how many shards there are, 4,096 at most.
        arrays: {name: array or `container.Rows`}, rows index, index + count, .. of each table, as `rows.stored` makes
            them.

    Returns:
        The digest of the shard, for `write`.

    """
    if not (0 <= index < count <= MOST_SHARDS):
        raise ValueError(f"index must be in [0, count), and count at most {MOST_SHARDS:,}, got {index} and {count}")
    path = pathlib.Path(os.path.realpath(path))
    draft = path.with_name(f"{path.name}-{index:05}-of-{count:05}.{os.getpid()}-{secrets.token_hex(4)}.new")
    try:
        digest = _write(draft, {"shard": {"index": index, "count": count}}, arrays, SHARDED)
        if path.exists():
            shutil.copymode(path, draft)
        with replacing(shard_path(path, index, count, digest)) as fresh:
            os.replace(draft, fresh)
    finally:
        draft.unlink(missing_ok=True)
    return digest


def discard_shards(path, count, digests):
    """Removes shards of an export that failed, but none that the file at `path` names."""
    path = pathlib.Path(os.path.realpath(path))
    shards = {shard_path(path, index, count, digest) for index, digest in enumerate(digests)}
    for shard in shards - _shards_in_use(path):
        shard.unlink(missing_ok=True)


def shard_path(path, index, count, digest):
    """Where the shard of a file lies."""
    path = pathlib.Path(path)
    return path.with_name(f"{path.name}-{index:05}-of-{count:05}-{digest[:16]}")


def _shards_in_use(path):
    """The paths of the shards that the file at `path` names as its own, unchecked; none for another file, or none."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            entry, _ = container.entries(content)
            name, digests = _named(container.manifest(content, entry, LARGEST_MANIFEST))
    except (OSError, ValueError):
        return set()
    mine = digests if name == path.name else []
    return {shard_path(path, index, len(mine), digest) for index, digest in enumerate(mine)}


def _named(manifest):
    """(name, digests) of the shards that a manifest names; no digests if there are none. Raises ValueError."""
    shards = manifest.get("shards") if isinstance(manifest, dict) else None
    if shards is None:
        return "", []
    if isinstance(shards, dict) and len(shards) == 2:
        name, digests = shards.get("name"), shards.get("digests")
        if isinstance(name, str) and _NAME.fullmatch(name) and isinstance(digests, list):
            good = all(isinstance(digest, str) and _DIGEST.fullmatch(digest) for digest in digests)
            if good and 0 < len(digests) <= MOST_SHARDS:
                return name, digests
    raise ValueError(f"it cannot have shards {shards!r:.100}: a name and 1 to {MOST_SHARDS:,} digests")


def _checked(path, content, kind):
    """(digest, format) of the mapped file, once it is known to be right."""
    tail, start = content[-_LONGEST_COMMENT:], f"deepfm_ops {kind.word} ".encode()
    comment = tail[tail.rfind(start) :] if start in tail else b""
    known = re.match(start + rb"(\d+) sha256 ([0-9a-f]{64})\Z", comment)
    version = re.match(start + rb"(\d{1,9}) ", comment)
    if version and int(version[1]) > kind.newest:
        raise ScorerFileError(
            f"{path} is of format {int(version[1])}, this version of deepfm_ops reads {kind.newest}: upgrade "
            f"deepfm_ops, or write {kind.content} with this version"
        )
    if not known or int(known[1]) not in kind.readable:
        is_ours = content[:4] == b"PK\x03\x04" and content[30 : 30 + len(MANIFEST)] == MANIFEST.encode()
        if is_ours and not re.search(rb"deepfm_ops [a-z]+ \d+ sha256 [0-9a-f]{64}\Z", tail):
            raise ScorerFileError(f"{path} is damaged: it was cut off, or its end was changed")
        raise ScorerFileError(f"{path} is not {kind.called}; {kind.writer} writes them")
    end = len(content) - len(comment) - 2
    with memoryview(content) as view, view[:end] as covered:
        found = _digest(covered)
    if found != known[2].decode() or content[end : end + 2] != struct.pack("<H", len(comment)):
        raise ScorerFileError(f"{path} is damaged: its checksum is {found}, it should be {known[2].decode()}")
    return found, int(known[1])


def read(path):
    """(manifest, {name: array}, digest) of a file that `write` wrote; the arrays are read-only views of the mapping.

    Tables that are in shards are `rows.Sharded`.

    Raises:
        FileNotFoundError: no such file.
        ScorerFileError: the file, or a shard, cannot be used; the text says why.

    """
    for _ in range(_READS):
        before = os.stat(path)
        try:
            return _read(path)
        except _Lost:  # a new export removes the shards of the old one
            now = os.stat(path)
            if (now.st_ino, now.st_mtime_ns) == (before.st_ino, before.st_mtime_ns):
                raise
    raise ScorerFileError(f"{path} was replaced {_READS} times while it was read: load it when that ends")


def _read(path):
    real = pathlib.Path(os.path.realpath(path))  # shards lie beside the file, and not beside a link to it
    manifest, arrays, digest = read_alone(real, path)
    if isinstance(manifest, dict) and "shard" in manifest:
        raise ScorerFileError(f"{path} is one shard of a scorer's file: load the file that it lies beside")
    try:
        name, digests = _named(manifest)
        shards = [_shard(path, real.with_name(name), index, digests) for index in range(len(digests))]
        for table in shards[0] if shards else ():
            if table in arrays:
                raise ValueError(f"array {table!r:.100} is in its shards too")
            arrays[table] = Sharded([shard.get(table) for shard in shards])
    except ScorerFileError:
        raise
    except ValueError as error:
        raise ScorerFileError(f"{path} does not hold a model: {error}") from error
    return manifest, arrays, digest


def _shard(path, named, index, digests):
    """The arrays of a shard of the file at `path`."""
    shard = shard_path(named, index, len(digests), digests[index])
    try:
        manifest, arrays, digest = read_alone(shard, shard)
    except ScorerFileError as error:
        raise ScorerFileError(f"{path} cannot be used, a shard of it is wrong: {error}") from error
    except (OSError, ValueError) as error:  # ValueError: a name that the file system cannot have
        raise _Lost(f"{path} cannot be used without its shard {shard}: {error!r}") from error
    if digest != digests[index] or manifest != {"shard": {"index": index, "count": len(digests)}}:
        raise ScorerFileError(
            f"{path} cannot be used: {shard} is not the shard that it names, but of another export, or another of its "
            f"shards; its digest is {digest}, it should be {digests[index]}"
        )
    return arrays


def write_items(path, manifest, arrays):
    """Writes a file of items, of the same form but for the comment, replacing what is at `path` whole or not at all."""
    with replacing(path) as fresh:
        _write(fresh, manifest, arrays, _ITEMS.newest, _ITEMS)


def read_items(path):
    """(manifest, {name: array}) of what `write_items` wrote; the arrays can be written to, in this process's memory.

    Raises: what `read` raises.

    """
    return read_alone(path, path, _ITEMS, mmap.ACCESS_COPY)[:2]


def read_alone(path, called, kind=_SCORER, access=mmap.ACCESS_READ):
    """What `read` gives, of a file or a shard by itself; errors name it as `called`."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ScorerFileError(f"{called} is empty")
        content = mmap.mmap(file.fileno(), 0, access=access)
        digest, version = _checked(called, content, kind)
    try:
        manifest, entries = container.entries(content)
        arrays = {name: container.array(content, entry) for name, entry in entries.items()}
        largest = container.LARGEST_MANIFEST if version == 1 else LARGEST_MANIFEST
        return container.manifest(content, manifest, largest), arrays, digest
    except ValueError as error:  # whole, but of another writer
        raise ScorerFileError(f"{called} does not hold {kind.content}: {error}") from error
