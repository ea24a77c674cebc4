"""Checkpoints of split tables: equal bits over any number of parts, and whole ones only."""

import errno
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorflow as tf
from testing import LIGHT

from deepfm_ops.cluster import remote, storage
from deepfm_ops.cluster.checkpoints import Checkpoint
from deepfm_ops.cluster.tables import Sharded

SCRIPT = pathlib.Path(__file__).parent / "storing.py"
DTYPES = ["float32", "float64", "bfloat16", "float16", "int32", "int64"]


def split(name, whole, parts):
    return Sharded(name, [tf.Variable(whole[i::parts]) for i in range(parts)], len(whole))


def joined(table):
    first = table.parts[0]
    whole = np.zeros((table.rows, *first.shape[1:]), first.dtype.as_numpy_dtype)
    for i, part in enumerate(table.parts):
        whole[i :: len(table.parts)] = part.numpy()
    return whole


def bits(array):
    return np.ascontiguousarray(array).view(np.uint8)


def made(rows=1003, columns=(5,), dtype="float32", seed=0):
    values = np.random.default_rng(seed).normal(size=(rows, *columns)) * 100
    return values.astype(tf.as_dtype(dtype).as_numpy_dtype)


def saved(folder, name="epoch-1", tables=None, dense=None, state=None):
    tables = [split("embeddings", made(), 2)] if tables is None else tables
    storage.write(folder, name, tables, dense or {}, {} if state is None else state)
    return storage.newest(folder)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def empty_like_saved():
    return [split("embeddings", np.zeros((1003, 5), "f"), 3)]


@pytest.fixture(name="small", autouse=True)
def _small(monkeypatch):
    """Several chunks for a call, and several calls for a file."""
    monkeypatch.setattr(storage, "CHUNK", 256)
    monkeypatch.setattr(storage, "CALL", 1024)


@pytest.mark.parametrize(("before", "after"), [(2, 3), (4, 16), (16, 4), (3, 7), (1, 1), (5, 1), (1, 5), (6, 4)])
@pytest.mark.parametrize("rows", [1003, 2, 0], ids="{} rows".format)
def test_bits_over_another_number_of_parts(tmp_path, before, after, rows):
    wholes = {"embeddings": made(rows), "linear/w": made(rows, ()), "counts": made(rows, (1,), "int64")}
    path = saved(tmp_path, tables=[split(name, whole, before) for name, whole in wholes.items()], state={"step": 7})
    tables = [split(name, np.zeros_like(whole), after) for name, whole in wholes.items()]
    assert storage.read(path, tables, {}) == {"step": 7} == storage.state(path)
    for table in tables:
        np.testing.assert_array_equal(bits(joined(table)), bits(wholes[table.name]))


@pytest.mark.parametrize("columns", [(), (3,)], ids=["rank 1", "rank 2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_every_dtype(tmp_path, dtype, columns):
    whole = made(100, columns, dtype)
    dense = {"kernel": tf.Variable(made(3, (2,), dtype)), "file": tf.Variable(tf.cast(5, dtype))}
    path = saved(tmp_path, tables=[split("table", whole, 2)], dense=dense)
    tables, others = [split("table", np.zeros_like(whole), 3)], {"file": tf.Variable(tf.cast(0, dtype))}
    others["kernel"] = tf.Variable(tf.zeros((3, 2), dtype))  # in another order
    storage.read(path, tables, others)
    np.testing.assert_array_equal(bits(joined(tables[0])), bits(whole))
    for name, variable in dense.items():
        np.testing.assert_array_equal(bits(others[name].numpy()), bits(variable.numpy()))


def test_nothing_but_the_rows_is_written(tmp_path):
    path = saved(tmp_path, tables=[split("a/b", made(5), 2)], dense={"w": tf.Variable([1.0])})
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    assert sizes.pop("manifest.json") < 1000
    assert sizes == {"a%2Fb-00000-of-00002": 60, "a%2Fb-00001-of-00002": 40, "dense": 4}


def test_newest_and_keep(tmp_path):
    assert storage.newest(tmp_path / "nowhere") is None and storage.newest(tmp_path) is None
    for number in (1, 3, 2):
        saved(tmp_path, f"epoch-{number}", [split("t", np.full((4, 1), number), 2)])
    (tmp_path / "epoch-9").mkdir()  # somebody else's
    assert storage.newest(tmp_path).name == "epoch-3"
    storage.keep(tmp_path, 2)
    assert names(tmp_path) == ["epoch-2", "epoch-3", "epoch-9"]
    saved(tmp_path, "epoch-3", [split("t", np.full((4, 1), 7), 1)])
    (tables,) = [[split("t", np.zeros((4, 1), int), 2)]]
    storage.read(storage.newest(tmp_path), tables, {})
    assert joined(tables[0]).tolist() == [[7]] * 4


@pytest.mark.parametrize("at", ["token", "rows", "dense", "manifest"])
def test_a_write_that_failed_is_ignored_and_removed(tmp_path, monkeypatch, at):
    whole = made()
    saved(tmp_path, tables=[split("t", whole, 2)])
    functions = {"token": "_check_shared", "rows": "_write_parts", "dense": "_write_dense", "manifest": "replacing"}
    with monkeypatch.context() as patch:
        original = getattr(storage, functions[at])

        def fails(*arguments):
            if at != "manifest":
                list(original(*arguments) or [])  # done, and the next one never begins
            raise KeyError("killed")

        patch.setattr(storage, functions[at], fails)
        with pytest.raises(KeyError, match="killed"):
            saved(tmp_path, "epoch-2")
    assert (tmp_path / "epoch-2" / "unfinished").exists()
    assert storage.newest(tmp_path).name == "epoch-1"
    saved(tmp_path, "epoch-3")
    assert names(tmp_path) == ["epoch-1", "epoch-3"]


@pytest.mark.parametrize("calls", range(6))
def test_removing_can_be_cut_off_anywhere(tmp_path, monkeypatch, calls):
    saved(tmp_path, "epoch-1")
    saved(tmp_path, "epoch-2")
    left = iter(range(calls))

    def counted(original):
        def call(*arguments, **keywords):
            next(left)
            return original(*arguments, **keywords)

        return call

    for owner, name in ((os, "replace"), (pathlib.Path, "unlink"), (pathlib.Path, "rmdir")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    with pytest.raises(StopIteration):
        storage.keep(tmp_path, 1)
    monkeypatch.undo()
    assert names(tmp_path) == ["epoch-1", "epoch-2"] and storage.newest(tmp_path).name == "epoch-2"
    for path in storage._whole(tmp_path):
        storage.read(path, empty_like_saved(), {})
    saved(tmp_path, "epoch-3")
    storage.keep(tmp_path, 1)
    assert names(tmp_path) == (["epoch-3"] if calls < 5 else ["epoch-1", "epoch-3"])  # an empty folder may stay


def script(*arguments, **keywords):
    keywords = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **keywords}
    keywords["env"] = {**os.environ, **LIGHT}
    return subprocess.Popen([sys.executable, str(SCRIPT), *map(str, arguments)], **keywords)


def test_killed_while_it_writes(tmp_path, monkeypatch):
    monkeypatch.undo()  # chunks of the usual size
    process = script("killed", tmp_path)
    try:
        watch = threading.Timer(100, process.kill)
        watch.start()
        assert process.stdout.readline() == "in the middle\n", process.stderr.read()[-3000:]
    finally:
        watch.cancel()
        process.kill()
        process.communicate(timeout=30)
    partial = tmp_path / "epoch-2"
    assert (partial / "unfinished").exists() and 0 < sum(file.stat().st_size for file in partial.iterdir()) < 64 << 20
    tables = [split("table", np.zeros((1 << 20, 16), "f"), 3)]
    assert storage.read(storage.newest(tmp_path), tables, {}) == {"step": 1}
    np.testing.assert_array_equal(joined(tables[0]), np.arange(1 << 20)[:, None] * np.ones((1, 16), "f"))
    saved(tmp_path, "epoch-3")
    assert names(tmp_path) == ["epoch-1", "epoch-3"]


def test_no_second_copy_in_memory(tmp_path):
    """A part of 128 MB is written and read in less than half of that beside it."""
    output, errors = script("memory", tmp_path).communicate(timeout=100)
    assert output, errors[-3000:]
    for what, grown in json.loads(output).items():
        assert grown < 64 << 20, what


@pytest.mark.parametrize("file", ["embeddings-00000-of-00002", "embeddings-00001-of-00002", "dense", "manifest.json"])
@pytest.mark.parametrize("damage", ["changed", "shorter", "longer", "missing"])
def test_damage_is_found_before_anything_changes(tmp_path, file, damage):
    path = saved(tmp_path, dense={"w": tf.Variable([1.0, 2.0])})
    content = bytearray((path / file).read_bytes())
    if damage == "missing":
        (path / file).unlink()
    else:
        content[len(content) // 2] ^= damage == "changed"
        (path / file).write_bytes(content[: len(content) - (damage == "shorter")] + b" " * (damage == "longer"))
    if file == "manifest.json" and damage == "missing":
        assert storage.newest(tmp_path) is None
        return
    if file == "manifest.json" and damage == "longer":
        return  # a blank at its end
    tables, dense = [split("embeddings", np.zeros((1003, 5), "f"), 3)], {"w": tf.Variable([0.0, 0.0])}
    with pytest.raises(ValueError, match=f"{file} .* damaged; remove the folder {path}") as error:
        storage.read(path, tables, dense)
    assert "\n" not in str(error.value)
    assert not joined(tables[0]).any() and not dense["w"].numpy().any()


def test_other_models(tmp_path):
    kernel = {"kernel": tf.Variable([[1.0]])}
    path = saved(tmp_path, tables=[split("table", made(), 2)], dense=kernel)
    for tables, dense, message in [
        (
            [split("other", made(), 2)],
            kernel,
            "has table that the model lacks, and lacks other that the model has",
        ),
        ([], kernel, "has table that the model lacks, and lacks none that"),
        ([split("table", made(), 2)], {}, "has kernel that the model lacks, and lacks none"),
        (
            [split("table", made(1200), 2)],
            kernel,
            "1,003 rows of table, the model has 1,200: num_features changed",
        ),
        (
            [split("table", made(1003, (8,)), 2)],
            kernel,
            r"of shape \[5\], the model's are float32 of shape \[8\]",
        ),
        ([split("table", made(1003, ()), 2)], kernel, r"float32 of shape \[5\], the model's are float32 of shape \[\]"),
        ([split("table", made(dtype="bfloat16"), 2)], kernel, r"float32 of shape \[5\], the model's are bfloat16"),
        (
            [split("table", made(), 2)],
            {"kernel": tf.Variable([1.0])},
            r"kernel are float32 of shape \[1, 1\]",
        ),
    ]:
        before = [joined(table) for table in tables]
        with pytest.raises(ValueError, match=message) as error:
            storage.read(path, tables, dense)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
        for table, whole in zip(tables, before, strict=True):
            np.testing.assert_array_equal(joined(table), whole)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["format"] = 2
    del manifest["crc32"]
    manifest["crc32"] = storage.zlib.crc32(json.dumps(manifest).encode())
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="has format 2, this version of deepfm_ops reads 1"):
        storage.state(path)


def test_folders_that_are_not_shared(tmp_path, monkeypatch):
    """As a server sees them that has another folder of that name."""
    path, exists = saved(tmp_path), pathlib.Path.exists
    for file, call in [
        ("unfinished-", lambda: saved(tmp_path, "epoch-2")),
        ("manifest", lambda: storage.read(path, empty_like_saved(), {})),
    ]:
        monkeypatch.setattr(pathlib.Path, "exists", lambda path, file=file: exists(path) and file not in path.name)
        with pytest.raises(ValueError, match=f"this process does not see .*{file}.* as the chief does; give a"):
            call()
    monkeypatch.undo()
    sees = storage._sees
    monkeypatch.setattr(storage, "_sees", lambda path, checksum: sees(path, checksum + 1))  # another file of that name
    with pytest.raises(ValueError, match="does not see .*manifest.json as the chief does"):
        storage.read(path, empty_like_saved(), {})


@pytest.mark.parametrize(
    ("number", "advice"), [(errno.ENOSPC, "make room"), (errno.EACCES, "let the user"), (errno.EIO, "see to the disk")]
)
def test_disks_that_refuse(tmp_path, monkeypatch, number, advice):
    saved(tmp_path)

    def fails(file):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(ValueError, match=f"epoch-2/embeddings.*: {os.strerror(number)}; {advice}") as error:
        saved(tmp_path, "epoch-2")
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert saved(tmp_path, "epoch-3").name == "epoch-3" and not (tmp_path / "epoch-2").exists()


def test_full_disks_and_folders_that_are_none(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file: (Not a directory|File exists); "):
        saved(tmp_path / "file")
    monkeypatch.setattr(storage, "_file", lambda *arguments: "/dev/full")
    with pytest.raises(ValueError, match="/dev/full: No space left on device; make room, then start again"):
        saved(tmp_path)


def test_what_fails_elsewhere_names_the_server():
    device = "/job:ps/replica:0/task:3/device:CPU:0"
    text = "ValueError: /x: No space\nTraceback (most recent call last):\n\nValueError: /x: No space\n\n\t [[{{node"
    error = storage.explained(device, tf.errors.InvalidArgumentError(None, None, text))
    assert isinstance(error, ValueError) and str(error) == "ps 3: /x: No space"
    for kind, text in (
        (tf.errors.UnavailableError, "is lost (Socket closed)"),
        (tf.errors.InternalError, "failed (Socket"),
    ):
        error = storage.explained(device, kind(None, None, "Socket closed\nmore"))
        assert isinstance(error, storage.ClusterError) and str(error).startswith(f"ps 3 {text}"), str(error)


def test_no_wait_without_an_end(monkeypatch):
    monkeypatch.setattr(storage, "LIMIT", 0.1)
    ended = threading.Event()

    def hangs():
        ended.wait(60)
        yield

    with pytest.raises(storage.ClusterError, match="this process did not answer within 0.1 seconds; start"):
        storage._on_servers({"/job:localhost/device:CPU:0": hangs()})
    ended.set()


@remote.function(tf.bool)
def _meets():
    barrier.wait(60)
    return True


barrier = threading.Barrier(2)


def test_servers_work_at_once():
    def meets():
        assert _meets()[0].numpy()
        yield

    storage._on_servers({"/job:localhost/device:CPU:0": meets(), "/job:localhost/task:0/device:CPU:0": meets()})


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [found.getsockname()[1] for found in sockets]
    for found in sockets:
        found.close()
    return ports


def test_two_servers_write_and_three_read(tmp_path):
    """Processes of their own; whatever they say is in the error."""
    spec = json.dumps({"ps": [f"127.0.0.1:{port}" for port in free_ports(3)]})
    servers = [script("server", spec, i, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for i in range(3)]
    try:
        output, errors = script("chief", spec, tmp_path).communicate(timeout=100)
    finally:
        for server in servers:
            server.kill()
            server.wait(timeout=30)
    said = ["written by 2", "at once", "errors of [0, 1]", "equal over 2", "equal over 3"]
    said += ["the file is named", "the server is named", "lost", "lost", "done"]
    assert output.splitlines() == said, errors[-3000:]


class Model:
    """What Checkpoint asks of a model."""

    def __init__(self, parts=2, rate=0.1, rows=40):
        self.table = split("table", np.zeros((rows, 2), "f"), parts)
        self.dense = {"iterations": tf.Variable(0, dtype=tf.int64)}
        self.rate, self.at = rate, {"epoch": 0, "step": 0}

    def sharded(self):
        return [self.table]

    def dense_variables(self):
        return self.dense

    @property
    def step(self):
        return self.at["step"]

    def progress(self):
        return dict(self.at)

    def restore_progress(self, progress):
        self.at = progress

    def identity(self):
        return {"optimizer": "LazyAdam", "rates": (self.rate, 1)}

    def fit(self, callback, epochs, steps=5, until=None):
        callback.set_model(self)
        callback.on_train_begin()
        for epoch in range(self.at["epoch"], epochs):
            callback.on_epoch_begin(epoch)
            for batch in range(self.at["step"], steps):
                for part in self.table.parts:
                    part.assign_add(tf.ones_like(part))
                self.dense["iterations"].assign_add(1)
                self.at = {"epoch": epoch, "step": batch + 1}
                callback.on_train_batch_end(batch)
                if (epoch, batch + 1) == until:
                    return
            self.at = {"epoch": epoch + 1, "step": 0}
            callback.on_epoch_end(epoch)
        callback.on_train_end()


def test_resumes_where_it_stopped(tmp_path):
    Model().fit(Checkpoint(tmp_path, every_steps=2, keep=2), 3, until=(1, 5))
    assert names(tmp_path) == ["epoch-00000001-000000000002", "epoch-00000001-000000000004"]
    model, checkpoint = Model(parts=3), Checkpoint(tmp_path, every_steps=2, keep=4)
    model.fit(checkpoint, 2)
    assert checkpoint.epoch == 1 and model.at == {"epoch": 2, "step": 0}
    assert (joined(model.table) == 10).all() and int(model.dense["iterations"]) == 10
    assert names(tmp_path)[2:] == ["epoch-00000002"]
    model.fit(checkpoint, 3)
    assert names(tmp_path) == [f"epoch-0000000{at}" for at in ("2", "2-000000000002", "2-000000000004", "3")]


def test_every_and_other_models(tmp_path):
    Model().fit(Checkpoint(tmp_path, every=2), 3)
    assert names(tmp_path) == ["epoch-00000002"]
    with pytest.raises(ValueError, match=r"written with rates \[0.1, 1\], the model has \[0.2, 1\]: take that"):
        Model(rate=0.2).fit(Checkpoint(tmp_path), 3)
    with pytest.raises(ValueError, match="40 rows of table, the model has 41: num_features changed"):
        Model(rows=41).fit(Checkpoint(tmp_path), 3)
    for arguments in ({"every": 0}, {"keep": 0}, {"every_steps": 0}, {"keep": None}):
        with pytest.raises(ValueError, match=f"{[*arguments][0]} must be at least 1, got"):
            Checkpoint(tmp_path, **arguments)
