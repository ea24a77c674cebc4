"""What surrounds the kernels: forks, threads, kept memory and signals. Every script runs in a process of its own."""

import os
import pathlib

import pytest
from testing import REFERENCE_MODE, run_python, run_with_tensorflow

pytest.importorskip("deepfm_ops._kernels", reason="a pure-Python install has no kernels")

needs_op = pytest.mark.skipif(REFERENCE_MODE, reason="the fallback has no op of its own")


def huge_pages():
    """What the system says of them, its choice in brackets."""
    file = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return file.read_text() if file.exists() else "[never]"


FORKS = int(os.environ.get("DEEPFM_OPS_FORKS", 60))

# work(threads) goes through everything that shares threads or kept memory, and returns the bits of its results.
WORK = """
import faulthandler, os, signal, sys, threading, time
import numpy as np
from deepfm_ops import kernels
from deepfm_ops._kernels import LibsvmParser, tables

rng = np.random.default_rng(0)
table, indices = rng.random((1000, 16), np.float32), rng.integers(0, 1000, (3000, 20))
texts = tables.Column.of_list([b"%d" % number for number in range(40_000)])
words = tables.Table(tables.slots(tables.keys(1, texts), np.arange(1, 40_001, dtype=np.uint32)))

def work(threads=2):
    y, sums, embeddings, _ = kernels.fm_forward(table, indices, return_embeddings=True, threads=threads)
    results = [y, sums, embeddings, *kernels.fm_gradient(table, indices, None, sums, y, threads=threads)[:2]]
    results.append(np.zeros(len(texts), np.int64))
    words.find(1, texts, results[-1], threads=threads)
    return b"".join(result.tobytes() for result in results)

expected = work(1)

def status_of(child, seconds):
    "What waitpid says of a child; one that does not end is killed."
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "it hangs"

def fail(text):
    "Ends the process, whatever its threads do."
    print(text, file=sys.stderr, flush=True)
    os._exit(1)

def load():
    "A thread that keeps the kernels busy, with results that are held and dropped."
    few, (y, sums, _, _) = indices[:10], kernels.fm_forward(table, indices[:10])
    held = [kernels.fm_forward(table, few, return_embeddings=True) for _ in range(5000)]
    del held
    def run():
        while not done.is_set():
            work()
            for _ in range(500):
                kernels.fm_gradient(table, few, None, sums, y)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread

done = threading.Event()
"""


def test_children_of_a_busy_process():
    """A fork copies locks as they are: one that another thread holds would stay locked in the child."""
    run_python(
        WORK
        + f"""
loads = [load(), load()]
for number in range({FORKS}):
    child = os.fork()
    if child == 0:
        os._exit(0 if work() == expected else 1)
    status = status_of(child, 20)
    if status != 0:
        fail(f"child {{number}}: {{status}}")
done.set()
for thread in loads:
    thread.join()
assert work() == expected
"""
    )


def test_children_of_children_of_a_busy_process():
    run_python(
        WORK
        + f"""
def descend(depth):
    "Works, with a thread that works too, and lets a child do the same."
    load(), load()
    if work() != expected:
        return 2
    if depth:
        child = os.fork()
        if child == 0:
            os._exit(descend(depth - 1))
        status = status_of(child, 20 * depth)
        if status != 0:
            fail(f"{{depth}} generations from the last: {{status}}")
    return 0 if work() == expected else 2

for _ in range(max(1, {FORKS} // 8)):
    child = os.fork()
    if child == 0:
        os._exit(descend(2))
    status = status_of(child, 60)
    if status != 0:
        fail(f"a child: {{status}}")
"""
    )


def test_a_pool_of_forked_processes():
    run_python(
        WORK
        + f"""
import multiprocessing

load(), load()
context = multiprocessing.get_context("fork")
for _ in range(max(1, {FORKS} // 10)):
    with context.Pool(2) as pool:
        for result in pool.map_async(work, [1, 2, 2, 3]).get(timeout=30):
            assert result == expected
os._exit(0)  # at once, whatever the threads do
"""
    )


def test_threads_are_as_many_as_cores_and_end():
    """However many are asked for; and those that have nothing to do end."""
    run_python(
        WORK
        + """
def threads():
    return len(os.listdir("/proc/self/task"))

before = threads()
work(1000)
assert threads() <= before + os.cpu_count(), f"{threads() - before} threads on {os.cpu_count()} cores"
deadline = time.monotonic() + 60
while threads() > before and time.monotonic() < deadline:
    time.sleep(0.1)
assert threads() <= before, f"{threads() - before} idle threads stay"
assert work(2) == expected  # there are threads again
"""
    )


def test_same_bits_for_absurd_numbers_of_threads():
    run_python(
        WORK
        + """
import resource

# Threads that should not be are refused their stacks, and no trouble of the machine's.
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 2**30,) * 2)
for threads in (1, 2, 3, 1000, 2**29 + 1, 2**30, 2**31 - 1):
    assert work(threads) == expected, threads
"""
    )


def test_results_that_are_held_and_dropped_do_not_slow_the_next():
    """Free blocks by the ten thousand: a search through them all takes a multiple of the call."""
    run_python(
        """
import time
import numpy as np
from deepfm_ops import kernels

table, indices = np.ones((10, 4), "f"), np.zeros((1, 2), np.int64)

def call():
    return kernels.fm_forward(table, indices, return_embeddings=True, threads=1)

def best():
    "Of many repeats, the median of a call: no other process disturbs them all."
    medians = []
    for _ in range(20):
        times = []
        for _ in range(50):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        medians.append(np.median(times))
    return min(medians)

call()
before = best()
held = [call() for _ in range(60_000)]
del held
after = best()
assert after < 10 * before, f"{after / before:.0f} times slower"
"""
    )


INTERRUPTED = """
def interrupted(call, seconds):
    "Calls until a signal has arrived in a call; it is raised at the latest when that returns."
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        for _ in range(100_000):
            call()
    except KeyboardInterrupt:
        timer.join()
        return
    raise AssertionError("no KeyboardInterrupt")
"""


def test_interrupted_kernels():
    """Ctrl-C in a call: KeyboardInterrupt after it, and nothing is left locked."""
    run_python(
        WORK
        + INTERRUPTED
        + """
faulthandler.dump_traceback_later(120, exit=True)
lines = b"".join(b"1 %d:0.5 %d:1\\n" % (i, i + 1) for i in range(20_000))
cells = [str(number) for number in range(40_000)]

def parse():
    parser = LibsvmParser(False, False)
    parser.parse(lines, 0, 2**62)
    parser.take()

def count():
    tables.Counter(1).add(texts)

def find():
    words.find(1, texts, np.zeros(len(texts), np.int64), threads=2)

large = np.tile(indices, (100, 1))
sums = kernels.fm_forward(table, large)[1]
calls = [
    lambda: kernels.fm_forward(table, large, threads=2),
    lambda: kernels.fm_gradient(table, large, None, sums, sums[:, :1].copy(), threads=2),
    work, parse, count, find, lambda: tables.Column.of_list(cells),
]
for seconds in (0.001, 0.02, 0.05):
    for call in calls:
        interrupted(call, seconds)
        assert work(2) == work(3) == expected
"""
    )


@needs_op
def test_an_interrupted_op():
    run_with_tensorflow(
        """
import faulthandler, os, signal, threading
import numpy as np
import tensorflow as tf
import deepfm_ops
from deepfm_ops import optimizers
import keras
"""
        + INTERRUPTED
        + """
faulthandler.dump_traceback_later(240, exit=True)
rng = np.random.default_rng(0)
variable = keras.Variable(rng.random((1000, 16), np.float32))
indices = tf.constant(rng.integers(0, 1000, (200_000, 20)))
optimizer = optimizers.Adagrad(0.0)
optimizer.build([variable])

def step(indices=indices):
    with tf.GradientTape() as tape:
        y = deepfm_ops.fm_interaction(variable.value, indices)
    gradient = tape.gradient(y, variable.value)
    optimizer.apply([gradient], [variable])
    return y.numpy(), gradient.values.numpy()

few = indices[:3000]
expected = step(few)
for seconds in (0.001, 0.02, 0.05, 0.2):
    interrupted(step, seconds)
    for got, want in zip(step(few), expected):
        np.testing.assert_array_equal(got, want)
"""
    )


def test_the_process_ends_while_a_daemon_thread_is_in_a_kernel():
    """Python ends such a thread where it asks for the GIL again, which is no reason to abort the process."""
    run_python(
        WORK
        + """
many = np.tile(indices, (20, 1))

def run():
    while True:
        kernels.fm_forward(table, many, threads=1)

threading.Thread(target=run, daemon=True).start()
time.sleep(0.2)
"""
    )


@needs_op
def test_one_variable_as_table_and_weights_while_a_writer_waits():
    """A reader that locks the variable twice waits for the writer that waits for the reader."""
    run_with_tensorflow(
        """
import faulthandler, threading
import tensorflow as tf
from deepfm_ops import arguments, ops

faulthandler.dump_traceback_later(60, exit=True)
table = tf.Variable(tf.ones((4, 1)))
pairs = arguments.Pairs(tf.constant([[0, 1]]), None, None)
done = threading.Event()

def repeated(times, call):
    "A graph that calls so often, so that no GIL holds the threads apart."
    def body(i):
        call()
        return i + 1
    return tf.function(lambda: tf.while_loop(lambda i: i < times, body, [0], parallel_iterations=1))

read = repeated(20_000, lambda: ops.interaction(table, pairs, "scalar", weights=table))
write = repeated(100, lambda: table.assign(tf.ones((4, 1))))

def writer():
    while not done.is_set():
        write()

threads = [threading.Thread(target=writer) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(3):
    read()
done.set()
for thread in threads:
    thread.join()
"""
    )


@needs_op
@pytest.mark.skipif("[never]" in huge_pages(), reason="this system has no huge pages")
def test_a_table_that_is_only_read_is_in_huge_pages():
    """The first forward asks for them; its mapping says so."""
    run_with_tensorflow(
        """
import re
import numpy as np
import tensorflow as tf
import deepfm_ops

table = tf.Variable(tf.ones((2**20, 16)))

def asked():
    "Whether the mapping that holds the middle of the table was advised to be in huge pages."
    address = np.asarray(memoryview(table.read_value())).ctypes.data + 2**25
    for mapping in re.split(r"\\n(?=[0-9a-f]+-)", open("/proc/self/smaps").read()):
        start, stop = (int(number, 16) for number in mapping.split(maxsplit=1)[0].split("-"))
        if start <= address < stop:
            return "hg" in re.search("VmFlags:(.*)", mapping)[1].split()

deepfm_ops.fm_interaction(table, [[0, 1]])
assert asked()
"""
    )
