"""Checkpoints of tables whose rows are split over servers: each server writes and reads its own, a few MB at a time.

A checkpoint is a folder that all servers share:

    manifest.json             shapes, dtypes, the size and CRC-32 of every file, and the state; written last
    dense                     the variables that are not split, one behind the other in the manifest's order
    embeddings-00001-of-00004 the rows 1, 5, 9, ... of a table as they lie in memory
    unfinished                there while the others are written

Without a manifest it is no checkpoint; with `unfinished` and without a manifest it is what a write that was cut off has
left, and the next write removes it. CRC-32, because it is to find damage and not malice, and goes on from a number:
the function that writes a chunk keeps nothing.
"""

import contextlib
import errno
import functools
import itertools
import json
import math
import os
import pathlib
import queue
import re
import secrets
import threading
import urllib.parse
import zlib

import numpy as np
import tensorflow as tf

from deepfm_ops import container
from deepfm_ops.cluster import remote
from deepfm_ops.cluster.config import ClusterError
from deepfm_ops.files import replacing, to_disk

FORMAT = 1
MANIFEST, DENSE, UNFINISHED = "manifest.json", "dense", "unfinished"
CHUNK = 1 << 22  # bytes that a server holds beside its variables
CALL = 1 << 26  # bytes that a server writes or reads for one request of the chief
LIMIT = 120  # seconds in which some server has to answer one
_AGAIN = "start the job again, it goes on from its last checkpoint"
_ADVICE = {
    **dict.fromkeys([errno.ENOSPC, errno.EDQUOT], "make room, then start again"),
    **dict.fromkeys(
        [errno.EACCES, errno.EPERM, errno.EROFS],
        "let the user of this process read and write there, or take another folder",
    ),
}


@contextlib.contextmanager
def one_line(path):
    """Makes an OSError a ValueError that says what to do."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno, "see to the disk or its connection, then start again")
        raise ValueError(f"{error.filename or path}: {error.strerror or error}; {advice}") from error


def _damaged(path, what):
    path = pathlib.Path(path)
    return ValueError(
        f"{path} {what}, so this checkpoint is damaged; remove the folder {path.parent}, then the one before it is used"
    )


@remote.function(tf.bool)
def _sees(path, checksum):
    path = pathlib.Path(path.decode())
    with one_line(path):
        return path.exists() and zlib.crc32(path.read_bytes()) == checksum


@remote.function(tf.int64)
def _write_rows(path, begin, checksum, rows, last):
    """Writes bytes at a place of a file, and waits for the disk if they are the last; returns the CRC-32 up to them."""
    path = path.decode()
    with one_line(path), open(path, "r+b" if begin else "wb") as file:
        file.seek(begin)
        file.write(rows)
        if last:
            file.flush()
            os.fsync(file.fileno())
    return np.int64(zlib.crc32(rows, checksum))


@remote.function(tf.int64)
def _checksum(path, size, begin, end, checksum):
    """The CRC-32 up to `end` of a file that has to have `size` bytes, where `checksum` is that up to `begin`."""
    path = path.decode()
    with one_line(path):
        try:
            file = open(path, "rb")
        except FileNotFoundError:
            raise _damaged(path, "is missing") from None
        with file:
            if (found := os.fstat(file.fileno()).st_size) != size:
                raise _damaged(path, f"has {found:,} bytes instead of {size:,}")
            file.seek(begin)
            while begin < end:
                chunk = file.read(min(CHUNK, end - begin))
                if not chunk:
                    raise _damaged(path, f"ends at byte {begin:,}")
                checksum, begin = zlib.crc32(chunk, checksum), begin + len(chunk)
    return np.int64(checksum)


@remote.function(tf.uint8)
def _read_rows(path, row_bytes, first, step, count):
    """Every `step`-th row of a file from row `first` on, [count, row_bytes].

    Read and not mapped: a mapped file that cannot be read ends the process.
    """
    path, rows = path.decode(), (count - 1) * step + 1
    with one_line(path):
        found = np.fromfile(path, np.uint8, rows * row_bytes, offset=first * row_bytes)
    if found.size != rows * row_bytes:
        raise _damaged(path, f"ends at byte {first * row_bytes + found.size:,}")
    return np.ascontiguousarray(found.reshape(rows, row_bytes)[::step])


def _scalars(*dtypes):
    return [tf.TensorSpec([], dtype) for dtype in dtypes]


@functools.cache
def _writing(dtype):
    """A function that writes the rows [first, last) of a variable, `step` at a time; it runs where it is called."""

    @tf.function(input_signature=_scalars(tf.resource, tf.string, *[tf.int64] * 5), autograph=False)
    def write(handle, path, row_bytes, first, last, step, checksum):
        def chunk(begin, checksum):
            end = tf.minimum(begin + step, last)
            rows = tf.raw_ops.ResourceGather(resource=handle, indices=tf.range(begin, end), dtype=dtype)
            rows = tf.bitcast(rows, tf.uint8)
            (checksum,) = _write_rows(path, begin * row_bytes, checksum, rows, tf.equal(end, last))
            return end, tf.ensure_shape(checksum, [])

        # The first chunk outside of the loop: a part without rows is a file without bytes.
        return tf.while_loop(
            lambda begin, checksum: begin < last, chunk, chunk(first, checksum), parallel_iterations=1
        )[1]

    with tf.device(None):
        return write.get_concrete_function()


@functools.cache
def _reading(dtype):
    """A function that reads `count` rows of a file, `chunk` at a time, into those of a variable; it runs where called.

    Of the file these are the rows source[0], source[0] + source[1], ..., of the variable target[0], and so on.
    """
    size = np.array([dtype.size], np.int64)

    @tf.function(
        input_signature=[
            *_scalars(tf.resource, tf.string, *[tf.int64] * 3),
            *[tf.TensorSpec(shape, tf.int64) for shape in ([None], [2], [2])],
        ],
        autograph=False,
    )
    def read(handle, path, row_bytes, count, step, shape, source, target):
        def chunk(begin):
            end = tf.minimum(begin + step, count)
            (rows,) = _read_rows(path, row_bytes, source[0] + begin * source[1], source[1], end - begin)
            rows = tf.bitcast(tf.reshape(rows, tf.concat([[end - begin], shape, size], 0)), dtype)
            where = target[0] + target[1] * tf.range(begin, end)
            tf.raw_ops.ResourceScatterUpdate(resource=handle, indices=where, updates=rows)
            return (end,)

        return tf.while_loop(lambda begin: begin < count, chunk, (tf.zeros([], tf.int64),), parallel_iterations=1)

    with tf.device(None):
        return read.get_concrete_function()


def _server(device):
    """A process as users know it: "ps 1"."""
    spec = tf.DeviceSpec.from_string(device)
    return "this process" if spec.job in (None, "localhost") else f"{spec.job} {spec.task}"


def _on_servers(tasks):
    """Runs generators, each in a thread of its own and on its device; they yield after every request.

    Args:
        tasks: {device: generator}.

    Raises:
        ValueError, ClusterError: as soon as a server has failed.

    """
    answers = queue.SimpleQueue()

    def run(device, task):
        try:
            with remote.on(device):
                for _ in task:
                    answers.put((device, False))
            answers.put((device, True))
        except Exception as error:
            answers.put((device, error))

    for task in tasks.items():
        threading.Thread(target=run, args=task, daemon=True).start()
    waiting = set(tasks)
    while waiting:
        try:
            device, answer = answers.get(timeout=LIMIT)
        except queue.Empty:
            names = ", ".join(sorted(map(_server, waiting)))
            raise ClusterError(f"{names} did not answer within {LIMIT} seconds; {_AGAIN}") from None
        if isinstance(answer, Exception):
            raise explained(device, answer) from None
        if answer:
            waiting.remove(device)


def explained(device, error):
    """The error of an op on a server, of which the text is one line."""
    name = _server(device)
    if isinstance(error, tf.errors.InvalidArgumentError) and (text := re.search(r"ValueError: (.*)", error.message)):
        return ValueError(f"{name}: {text[1]}")
    if isinstance(error, tf.errors.OpError):
        text = (error.message.strip() or type(error).__name__).splitlines()[0]
        what = "is lost" if isinstance(error, tf.errors.UnavailableError) else "failed"
        return ClusterError(f"{name} {what} ({text}); {_AGAIN}")
    return error


def _by_device(sharded):
    """{device: [(Sharded, number of the part, the part)]}."""
    found = {}
    for table in sharded:
        for i, part in enumerate(table.parts):
            found.setdefault(part.device, []).append((table, i, part))
    return found


def _visit(variables, call):
    """Calls `call(name, variable)` for each of a dict, on its server."""
    names = {}
    for name, variable in variables.items():
        names.setdefault(variable.device, []).append(name)

    def task(names):
        for name in names:
            call(name, variables[name])
            yield

    _on_servers({device: task(found) for device, found in names.items()})


def _row_bytes(part):
    return math.prod(part.shape[1:]) * part.dtype.size


def _file(name, i, parts):
    return f"{urllib.parse.quote(name, safe='')}-{i:05d}-of-{parts:05d}"


def _check_shared(path, devices):
    """Raises ValueError where a server does not see a file as the chief does."""
    checksum = zlib.crc32(path.read_bytes())

    def check(device):
        if not _sees(str(path), np.int64(checksum))[0].numpy():
            raise ValueError(
                f"{_server(device)} does not see {path} as the chief does; give a folder that all servers share and "
                "may read and write"
            )
        yield

    _on_servers({device: check(device) for device in devices})


def write(folder, name, sharded, dense, state):
    """Writes the checkpoint `folder/name`; every server writes its parts, all of them at once.

    One of that name is replaced. Nothing may change the variables until it returns.

    Args:
        folder: that all servers share; one model's only. It is made where it is not there.
        name: of the checkpoint. The newest is the last one in the order of names.
        sharded: list of Sharded, of float32, float64, bfloat16, float16, int32 or int64.
        dense: {name: variable} of those that are not split.
        state: what JSON can hold.

    Raises:
        ValueError: a folder that the servers do not share, or may not write to; a disk that is full.
        ClusterError: a server that is lost.

    """
    folder = pathlib.Path(folder).absolute()
    path, devices = folder / name, _by_device(sharded)
    with one_line(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.iterdir():
            whole, cut_off = (left / MANIFEST).exists(), (left / UNFINISHED).exists()
            if whole and left == path or cut_off and not whole:
                _remove(left)
        path.mkdir(exist_ok=True)
        # By a name and content that no server can have seen before.
        token = path / f"{UNFINISHED}-{secrets.token_hex(8)}"
        (path / UNFINISHED).touch()
        token.write_text(token.name)
        _check_shared(token, devices)
        token.unlink()
    written = {}
    _on_servers({device: _write_parts(path, parts, written) for device, parts in devices.items()})
    tables = {
        table.name: {
            "rows": table.rows,
            "shape": list(table.parts[0].shape[1:]),
            "dtype": table.parts[0].dtype.name,
            "parts": [written[table.name, i] for i in range(len(table.parts))],
        }
        for table in sharded
    }
    with one_line(path):
        manifest = {"format": FORMAT, "tables": tables, "dense": _write_dense(path, dense), "state": state}
        manifest["crc32"] = zlib.crc32(json.dumps(manifest).encode())
        with replacing(path / MANIFEST) as fresh:
            fresh.write_text(json.dumps(manifest))
        to_disk(folder)
        (path / UNFINISHED).unlink()


def _write_parts(path, parts, written):
    for table, i, part in parts:
        name, row_bytes = _file(table.name, i, len(table.parts)), _row_bytes(part)
        rows = len(range(i, table.rows, len(table.parts)))
        chunk, call, checksum = max(1, CHUNK // row_bytes), max(1, CALL // row_bytes), 0
        for first in range(0, max(1, rows), call):
            numbers = [row_bytes, first, min(rows, first + call), chunk, checksum]
            checksum = int(
                _writing(part.dtype)(part.handle, tf.constant(str(path / name)), *[np.int64(x) for x in numbers])
            )
            yield
        written[table.name, i] = {"file": name, "bytes": rows * row_bytes, "crc32": checksum}


def _write_dense(path, dense):
    read = {}
    _visit(dense, lambda name, variable: read.update({name: variable.read_value().numpy()}))
    arrays = {name: read[name] for name in dense}
    content = b"".join(array.tobytes() for array in arrays.values())
    (path / DENSE).write_bytes(content)
    to_disk(path / DENSE)
    variables = {name: {"shape": list(array.shape), "dtype": array.dtype.name} for name, array in arrays.items()}
    return {"bytes": len(content), "crc32": zlib.crc32(content), "variables": variables}


def _whole(folder):
    """The checkpoints of a folder in the order of their names."""
    with one_line(folder):
        folder = pathlib.Path(folder).absolute()
        return sorted(path for path in folder.iterdir() if (path / MANIFEST).is_file()) if folder.is_dir() else []


def newest(folder):
    """The path of a folder's last checkpoint, or None."""
    return next(reversed(_whole(folder)), None)


def keep(folder, k):
    """Removes all but the last `k` checkpoints."""
    with one_line(folder):
        for path in _whole(folder)[:-k]:
            _remove(path)


def _remove(path):
    """Removes a checkpoint; what is half removed is no checkpoint, and the next write removes the rest."""
    if (path / MANIFEST).exists():
        os.replace(path / MANIFEST, path / UNFINISHED)
    for file in path.iterdir():
        if file.name != UNFINISHED:
            file.unlink()
    (path / UNFINISHED).unlink(missing_ok=True)
    path.rmdir()


def state(path):
    """The state of the checkpoint at `path`. Raises ValueError as `read` does for a manifest that is damaged."""
    return _manifest(pathlib.Path(path).absolute())["state"]


def _manifest(path):
    with one_line(path):
        content = (path / MANIFEST).read_bytes()
    try:
        manifest = container.parsed(content)
        whole = manifest.pop("crc32") == zlib.crc32(json.dumps(manifest).encode())
    except (ValueError, KeyError, AttributeError, TypeError):
        whole = False
    if not whole:
        raise _damaged(path / MANIFEST, "does not hold what was written")
    if manifest["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {manifest['format']}, this version of deepfm_ops reads {FORMAT}: take the version that "
            "wrote it, or another folder"
        )
    return manifest


def read(path, sharded, dense):
    """Reads the checkpoint at `path` into variables, over as many servers as there are now.

    Every server checks its share of the files first, and then reads, of the files, the rows that are its own.

    Args:
        path: of the checkpoint, on a folder that all servers share.
        sharded: list of Sharded, as in `write`; the number of parts may be another one.
        dense: {name: variable}, as in `write`.

    Returns:
        The state that was written.

    Raises:
        ValueError: a file that is missing or damaged, tables or variables that are not the model's, a folder that the
            servers do not share or may not read. Nothing has been changed then.
        ClusterError: a server that is lost.

    """
    path = pathlib.Path(path).absolute()
    manifest, devices = _manifest(path), _by_device(sharded)
    _check_model(path, manifest, sharded, dense)
    _check_shared(path / MANIFEST, devices)
    files = [part for table in manifest["tables"].values() for part in table["parts"]]
    _on_servers({device: _check_files(path, files[i :: len(devices)]) for i, device in enumerate(devices)})
    arrays = _read_dense(path, manifest["dense"])
    _on_servers({device: _read_parts(path, manifest["tables"], parts) for device, parts in devices.items()})
    _visit(dense, lambda name, variable: variable.assign(arrays[name]))
    return manifest["state"]


def _check_model(path, manifest, sharded, dense):
    """Raises ValueError where the tables and variables of a checkpoint are not the model's."""
    tables, variables = manifest["tables"], manifest["dense"]["variables"]
    own = {table.name: table for table in sharded}
    for found, mine in ((tables, own), (variables, dense)):
        if found.keys() != mine.keys():
            only = [", ".join(sorted(a - b)) or "none" for a, b in itertools.permutations([found.keys(), mine.keys()])]
            raise ValueError(
                f"{path} is of another model: it has {only[0]} that the model lacks, and lacks {only[1]} that "
                "the model has; take another folder"
            )
    for name, table in own.items():
        if tables[name]["rows"] != table.rows:
            raise ValueError(
                f"{path} has {tables[name]['rows']:,} rows of {name}, the model has {table.rows:,}: num_features "
                "changed; take that of the checkpoint (and resize the model afterwards), or another folder"
            )
    shapes = [(f"rows of {name}", tables[name], t.parts[0].shape[1:], t.parts[0].dtype) for name, t in own.items()]
    shapes += [(name, variables[name], variable.shape, variable.dtype) for name, variable in dense.items()]
    for name, found, shape, dtype in shapes:
        if (found["dtype"], found["shape"]) != (dtype.name, list(shape)):
            raise ValueError(
                f"{path} is of another model: {name} are {found['dtype']} of shape {found['shape']}, the model's are "
                f"{dtype.name} of shape {list(shape)}; take another folder"
            )


def _check_files(path, files):
    for file in files:
        checksum, size = 0, file["bytes"]
        for begin in range(0, max(1, size), CALL):
            numbers = [size, begin, min(size, begin + CALL), checksum]
            checksum = int(_checksum(str(path / file["file"]), *[np.int64(x) for x in numbers])[0])
            yield
        if checksum != file["crc32"]:
            raise _damaged(path / file["file"], f"has the CRC-32 {checksum:08x} instead of {file['crc32']:08x}")


def _read_dense(path, found):
    """{name: array}."""
    path = path / DENSE
    with one_line(path):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise _damaged(path, "is missing") from None
    if (len(content), zlib.crc32(content)) != (found["bytes"], found["crc32"]):
        raise _damaged(path, "does not hold what was written")
    arrays, at = {}, 0
    for name, variable in found["variables"].items():
        dtype, count = tf.as_dtype(variable["dtype"]).as_numpy_dtype, math.prod(variable["shape"])
        arrays[name] = np.frombuffer(content, dtype, count, at).reshape(variable["shape"])
        at += arrays[name].nbytes
    return arrays


def _read_parts(path, tables, parts):
    for table, j, part in parts:
        files, now, row_bytes = tables[table.name]["parts"], len(table.parts), _row_bytes(part)
        before, shape = len(files), np.array(list(part.shape[1:]), np.int64)
        apart = math.lcm(before, now)
        for i, file in enumerate(files):
            first = next((row for row in range(i, apart, before) if row % now == j), table.rows)
            count = len(range(first, table.rows, apart))
            chunk = max(1, CHUNK // row_bytes * before // apart)  # all rows between are read
            call = max(1, CALL // row_bytes * before // apart)
            for begin in range(0, count, call):
                row = first + begin * apart
                numbers = [row_bytes, min(call, count - begin), chunk]
                _reading(part.dtype)(
                    part.handle,
                    tf.constant(str(path / file["file"])),
                    *[np.int64(x) for x in numbers],
                    shape,
                    np.array([row // before, apart // before], np.int64),
                    np.array([row // now, apart // now], np.int64),
                )[0].numpy()
                yield
