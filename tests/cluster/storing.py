"""Processes that write and read checkpoints: `python storing.py killed|memory|server|chief ...`."""

import json
import os
import pathlib
import resource
import socket
import sys
import threading
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["GRPC_FAIL_FAST"] = "use_caller"

import numpy as np
import tensorflow as tf
from tensorflow.python.ops import script_ops

from deepfm_ops.cluster import remote, storage
from deepfm_ops.cluster.tables import Sharded


def killed(folder):
    """Writes one checkpoint, and stops in the middle of the second, until it is killed."""
    rows = tf.range(1 << 19, dtype=tf.float32)[:, None] * tf.ones((1, 16))
    table = Sharded("table", [tf.Variable(2 * rows), tf.Variable(2 * rows + 1)], 1 << 20)
    storage.write(folder, "epoch-1", [table], {}, {"step": 1})
    original, calls = storage.zlib.crc32, iter(range(13))

    def stops(*arguments):
        if next(calls, None) is None:
            print("in the middle", flush=True)
            time.sleep(100)
        return original(*arguments)

    storage.zlib.crc32 = stops
    storage.write(folder, "epoch-2", [table], {}, {"step": 2})


def memory(folder):
    """Prints by how many bytes the most memory grew while a part of 128 MB was written, and while it was read."""

    def most():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def table(name, rows):
        return Sharded(name, [tf.Variable(tf.ones((rows, 16)))], rows)

    small, large = table("small", 1 << 18), table("large", 1 << 21)
    storage.write(folder, "small", [small], {}, {})
    storage.read(storage.newest(folder), [small], {})
    before = most()
    storage.write(folder, "the large one", [large], {}, {})
    between = most()
    assert storage.read(storage.newest(folder), [large], {}) == {}
    print(json.dumps({"written": between - before, "read": most() - between}))


@remote.function(tf.bool)
def meets(folder, number):
    """Whether two processes are in here at once."""
    mine, other = (pathlib.Path(folder.decode()) / f"meets-{n}" for n in (number, 1 - number))
    mine.touch()
    deadline = time.monotonic() + 30
    while not other.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return other.exists()


@remote.function(tf.bool)
def refuses():
    time.sleep(0.3)
    raise ValueError("no")


@remote.function(tf.bool)
def takes_its_time():
    time.sleep(0.01)
    return True


@remote.function(tf.bool)
def dies():
    os._exit(1)


def server(spec, task):
    tf.distribute.Server(tf.train.ClusterSpec(json.loads(spec)), job_name="ps", task_index=int(task)).join()


def listens(address):
    try:
        with socket.create_connection(address.split(":"), 1):
            return True
    except OSError:
        return False


def chief(spec, folder):
    deadline = time.monotonic() + 60
    while not all(map(listens, json.loads(spec)["ps"])) and time.monotonic() < deadline:
        time.sleep(0.1)  # TensorFlow's own tries come seconds apart
    tf.config.experimental_connect_to_cluster(tf.train.ClusterSpec(json.loads(spec)), job_name="chief", protocol="grpc")
    script_ops._py_funcs._funcs.clear()  # what is written and read here is not by the servers
    whole = np.random.default_rng(0).normal(size=(100_003, 16)).astype("f")

    def split(parts, fill):
        found = []
        for i in range(parts):
            with tf.device(f"/job:ps/task:{i}/device:CPU:0"):
                found.append(tf.Variable(fill(whole[i::parts])))
        return Sharded("table", found, len(whole))

    storage.CHUNK, storage.CALL = 1 << 16, 1 << 18
    with tf.device("/job:ps/task:0/device:CPU:0"):
        kernel = tf.Variable([1.0, 2.0])
    storage.write(folder, "epoch-1", [split(2, np.asarray)], {"kernel": kernel}, {"step": 5})
    print("written by 2", flush=True)

    def meet(number):
        assert meets(folder, number)[0].numpy()
        yield

    storage._on_servers({f"/job:ps/replica:0/task:{number}/device:CPU:0": meet(number) for number in range(2)})
    print("at once", flush=True)
    errors = [[], []]

    def ask(number, function, times):
        with remote.on(f"/job:ps/replica:0/task:{number}/device:CPU:0"):
            for _ in range(times):
                try:
                    function()[0].numpy()
                except tf.errors.InvalidArgumentError as error:
                    errors[number].append(error)

    threads = [threading.Thread(target=ask, args=each) for each in ((0, takes_its_time, 60), (1, refuses, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    print(f"errors of {[len(each) for each in errors]}", flush=True)
    for parts in (2, 3):
        table = split(parts, np.zeros_like)
        kernel.assign([0.0, 0.0])
        assert storage.read(storage.newest(folder), [table], {"kernel": kernel}) == {"step": 5}
        assert kernel.numpy().tolist() == [1.0, 2.0]
        for i, part in enumerate(table.parts):
            assert part.device.startswith(f"/job:ps/replica:0/task:{i}/")
            np.testing.assert_array_equal(part.numpy(), whole[i::parts])
        print(f"equal over {parts}", flush=True)
    broken = pathlib.Path(folder) / "epoch-1" / "table-00001-of-00002"
    content = bytearray(broken.read_bytes())
    content[1000] ^= 1
    broken.write_bytes(content)
    try:
        storage.read(storage.newest(folder), [split(2, np.zeros_like)], {"kernel": kernel})
    except ValueError as error:
        print("the file is named" if str(error).startswith(f"{broken} has the CRC-32") else error, flush=True)
    broken.unlink()
    try:
        storage.read(storage.newest(folder), [split(2, np.zeros_like)], {"kernel": kernel})
    except ValueError as error:
        print("the server is named" if str(error).startswith(f"ps 1: {broken} is missing") else error, flush=True)

    def die():
        dies()[0].numpy()
        yield

    try:
        storage._on_servers({"/job:ps/replica:0/task:1/device:CPU:0": die()})
    except storage.ClusterError as error:
        print("lost" if str(error).startswith("ps 1 is lost (") else error, flush=True)
    try:
        storage.write(folder, "epoch-2", [table], {}, {})
    except storage.ClusterError as error:
        print("lost" if str(error).startswith("ps 1 is lost (") else error, flush=True)
    print("done", flush=True)
    os._exit(0)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
