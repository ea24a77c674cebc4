"""Arrays that somebody else, a thread or a process, changes while native code reads them.

What comes out is anybody's guess, and IndexError or ValueError are fine. To read or write outside the arrays is not:
they lie between pages that nobody may touch, so that the process of the script would die.
"""

import os

import pytest
from testing import REFERENCE_MODE, run_python

pytest.importorskip("deepfm_ops._kernels", reason="a pure-Python install has no kernels")

CALLS = int(os.environ.get("DEEPFM_OPS_CHANGING_CALLS", 1000))
SECONDS = CALLS / 4000  # that calls go on at least: the shorter they are, the more of them it takes

# while_changing(call, ...) calls, while another process changes the arrays, whose memory it shares.
CHANGING = f"""
import contextlib, ctypes, mmap, os, signal, threading, time
import numpy as np

libc, rng = ctypes.CDLL(None), np.random.default_rng(0)

def guarded(array):
    "A copy that begins and ends with a page, if its size allows, between two pages that nobody may touch."
    array, page = np.ascontiguousarray(array), mmap.PAGESIZE
    size = -(-array.nbytes // page) * page
    memory = mmap.mmap(-1, size + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for edge in (start, start + page + size):
        assert libc.mprotect(ctypes.c_void_p(edge), ctypes.c_size_t(page), 0) == 0
    copy = np.frombuffer(memory, array.dtype, array.size, page + size - array.nbytes).reshape(array.shape)
    copy[...] = array
    return copy

def wild(good):
    "Arrays with some numbers just out, and far out, of what they may be."
    last = np.iinfo(good.dtype).max
    for _ in range(8):
        bad = good.copy()
        numbers = 3 * [-1, int(good.max()) + 1, last, last // 2 + 1, -last - 1, -last // 3, 2**20]
        bad.ravel()[rng.integers(0, good.size, len(numbers))] = rng.permutation(numbers)
        yield bad

def while_changing(call, *changes, calls={CALLS}, seconds={SECONDS}):
    "changes: (array, what it holds before and after, what in between by turns)."
    parent, changes = os.getpid(), [(array, good, list(others)) for array, good, *others in changes]
    child = os.fork()
    while child == 0 and os.getppid() == parent:
        for array, good, others in changes:
            for other in others:
                np.copyto(array, other)
                for _ in range(rng.integers(1, 20)):  # good for long enough to pass the checks
                    np.copyto(array, good)
    if child == 0:
        os._exit(0)
    try:
        end = time.monotonic() + seconds
        while calls > 0 or time.monotonic() < end:
            calls -= 1
            with contextlib.suppress(IndexError, ValueError):
                call()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    for array, good, _ in changes:
        np.copyto(array, good)
"""

KERNELS = (
    CHANGING
    + """
from deepfm_ops import kernels

V, B, P = 4096, 2048, 16

def inputs(dim, index_dtype, flat=False, rows="float32"):
    table = rng.random((V, dim), np.float32)
    if rows == "uint8":
        table = rng.integers(0, 60, (V, dim + 6)).astype(np.uint8)
    indices = rng.integers(0, V, B * P if flat else (B, P)).astype(index_dtype)
    return guarded(table), indices, guarded(indices)

def each():
    for dim in (1, 16, 130):
        for index_dtype in (np.int32, np.int64):
            yield dim, index_dtype

SHAPES = list(each())
calls = CALLS // len(SHAPES) + 1
splits = np.arange(0, B * P + 1, P)
"""
).replace("CALLS", str(CALLS))

FORWARD = {
    "dense": """
for dim, index_dtype in SHAPES:
    table, good, indices = inputs(dim, index_dtype)
    weights = guarded(rng.random((V, 1), np.float32))
    call = lambda: kernels.fm_forward(table, indices, weights=weights, return_embeddings=True, threads=2)
    while_changing(call, (indices, good, *wild(good)), calls=3 * calls)
""",
    "field_splits": """
for dim, index_dtype in SHAPES:
    table, good, indices = inputs(dim, index_dtype)
    call = lambda: kernels.fm_forward(table, indices, field_splits=[0, 1, 9, 16], threads=2)
    while_changing(call, (indices, good, *wild(good)), calls=3 * calls)
""",
    "rows of uint8": """
for dim, index_dtype in SHAPES:
    table, good, indices = inputs(dim, index_dtype, rows="uint8")
    while_changing(lambda: kernels.fm_forward(table, indices, threads=2), (indices, good, *wild(good)), calls=calls)
""",
    "ragged": """
for dim, index_dtype in SHAPES:
    table, good, indices = inputs(dim, index_dtype, flat=True)
    row_splits, values = guarded(splits), guarded(rng.random(B * P, np.float32))
    call = lambda: kernels.fm_forward(
        table, indices, values, row_splits=row_splits, return_embeddings=True, threads=2)
    while_changing(call, (indices, good, *wild(good)), calls=calls)
    while_changing(call, (row_splits, splits, *wild(splits)), calls=calls)
""",
}

GRADIENT = {
    "dense": """
for dim, index_dtype in SHAPES:
    table, good, indices = inputs(dim, index_dtype)
    values = guarded(rng.random((B, P), np.float32))
    y, sums, _, _ = kernels.fm_forward(table, good, values)
    call = lambda: kernels.fm_gradient(table, indices, values, sums, y, need_values=True, threads=2)
    while_changing(call, (indices, good, *wild(good)), calls=calls)
""",
    "few": """
for dim, index_dtype in SHAPES:
    table, good, _ = inputs(dim, index_dtype)
    good = good[:60].copy()  # sorted by comparisons, not by their digits
    indices = guarded(good)
    y, sums, _, _ = kernels.fm_forward(table, good)
    call = lambda: kernels.fm_gradient(table, indices, None, sums, y, threads=2)
    while_changing(call, (indices, good, *wild(good)), calls=10 * calls)
""",
    "ascending": """
V = 2**16
for dim, index_dtype in SHAPES[:4]:
    table = guarded(rng.random((V, dim), np.float32))
    good = np.arange(V, dtype=index_dtype).reshape(-1, P)  # not sorted at all
    indices = guarded(good)
    y, sums, _, _ = kernels.fm_forward(table, good)
    call = lambda: kernels.fm_gradient(table, indices, None, sums, y, threads=2)
    while_changing(call, (indices, good, *wild(good)), calls=6 * calls)
""",
    "field_splits": """
for dim, index_dtype in SHAPES:
    table, good, indices = inputs(dim, index_dtype)
    fields = {"field_splits": [0, 1, 9, 16]}
    y, sums, embeddings, _ = kernels.fm_forward(table, good, return_embeddings=True, **fields)
    call = lambda: kernels.fm_gradient(
        table, indices, None, sums, y, embeddings=embeddings, d_embeddings=embeddings, threads=2, **fields)
    while_changing(call, (indices, good, *wild(good)), calls=calls)
""",
    "ragged": """
for dim, index_dtype in SHAPES:
    table, good, indices = inputs(dim, index_dtype, flat=True)
    row_splits = guarded(splits)
    y, sums, _, _ = kernels.fm_forward(table, good, row_splits=splits)
    d_embeddings = np.ones((B * P, dim), np.float32)
    call = lambda: kernels.fm_gradient(
        table, indices, None, sums, y, d_embeddings=d_embeddings, row_splits=row_splits, threads=2)
    while_changing(call, (indices, good, *wild(good)), calls=calls)
    while_changing(call, (row_splits, splits, *wild(splits)), calls=calls)
""",
}


def run(code):
    run_python(code, PYTHONFAULTHANDLER="1")  # says where it died


@pytest.mark.parametrize("form", FORWARD)
def test_forward(form):
    run(KERNELS + FORWARD[form])


@pytest.mark.parametrize("form", GRADIENT)
def test_gradient(form):
    run(KERNELS + GRADIENT[form])


# Of what Arrow's buffers hold: offsets, validity, text.
TEXTS = (
    CHANGING
    + """
from deepfm_ops._kernels import tables

COUNT = 4096
data = guarded(rng.choice(np.frombuffer(b"ab|:1 .", np.uint8), 8 * COUNT))
good = {dtype: np.arange(0, 8 * COUNT + 1, 8).astype(dtype) for dtype in (np.int32, np.int64)}

def columns():
    "Columns that were made while all was well, and whose offsets change then."
    for dtype, offsets in good.items():
        held = guarded(offsets)
        yield tables.Column(held[:-1], held[1:], data), (held, offsets, *wild(offsets))

def of_texts():
    column = tables.Column(good[np.int64][:-1], good[np.int64][1:], data)
    return tables.Table(tables.slots(tables.keys(1, column), np.arange(1, COUNT + 1, dtype=np.uint32)))
"""
)

USES = {
    "find": "lambda column: of.find(1, column, ids, values, threads=2)",
    "count": "lambda column: tables.Counter(1).add(column, of, counts)",
    "keys": "lambda column: tables.keys(1, column)",
    "buckets": "lambda column: column.buckets(1000)",
    "numbers": "lambda column: column.numbers()",
    "first_bad": "lambda column: column.first_bad()",
    "split": "lambda column: column.split('|', True)",
    "split at blanks": "lambda column: column.split('')",
    "cells": "lambda column: [column[i] for i in range(COUNT)]",
}


@pytest.mark.parametrize("use", USES)
def test_offsets_of_a_column(use):
    run(
        TEXTS
        + f"""
of, use = of_texts(), {USES[use]}
ids, values = np.zeros(COUNT, np.int64), np.zeros(COUNT, np.float32)
counts = np.zeros(COUNT + 1, np.int64)
for column, change in columns():
    while_changing(lambda: use(column), change, calls={CALLS // 2})
"""
    )


def test_offsets_that_changed_after_the_column_was_made():
    """No thread is needed."""
    run(
        TEXTS
        + """
for column, (held, offsets, *_) in columns():
    for far in (-1, 2**30, 2**31 - 1, -(2**31)):
        held[:] = far
        with contextlib.suppress(IndexError, ValueError):
            assert (column[7] or b"") in data.tobytes(), far
        held[::2] = 0
        tables.keys(1, column), column.first_bad(), column.numbers(), column.split("|")
"""
    )


def test_texts_and_validity_of_a_column():
    """They decide what is read, not where."""
    run(
        TEXTS
        + """
validity, offsets = guarded(np.full(COUNT // 8, 255, np.uint8)), good[np.int32]
column, of = tables.Column(offsets[:-1], offsets[1:], data, validity), of_texts()
ids, texts = np.zeros(COUNT, np.int64), data.copy()

def use():
    of.find(1, column, ids, threads=2)
    tables.Counter(1).add(column)
    column.numbers(), column.split("|", True), column.split(""), column.first_bad(), column.buckets(7)

others = rng.integers(0, 256, data.size).astype(np.uint8)
some = rng.integers(0, 256, validity.size).astype(np.uint8)
while_changing(use, (data, texts, others), (validity, some), calls=CALLS)
""".replace("CALLS", str(CALLS // 8))
    )


def test_slots_of_a_table():
    run(
        TEXTS
        + """
column = tables.Column(good[np.int64][:-1], good[np.int64][1:], data)
slots = tables.slots(tables.keys(1, column), np.arange(1, COUNT + 1, dtype=np.uint32))
held, ids, counts = guarded(slots), np.zeros(COUNT, np.int64), np.zeros(COUNT + 1, np.int64)
table = tables.Table(held)

def use():
    table.find(1, column, ids, threads=2)
    tables.Counter(1).add(column, table, counts)

full = rng.integers(1, 256, slots.size).astype(np.uint8)
while_changing(use, (held, slots, full), calls=100)
"""
    )


def test_keys_that_become_slots():
    run(
        TEXTS
        + """
keys, ids = rng.integers(1, 2**63, COUNT).astype(np.uint64), np.arange(COUNT, dtype=np.uint32)
held = guarded(keys)
while_changing(lambda: tables.slots(held, ids), (held, keys, keys // 3, np.zeros_like(keys)), calls=CALLS)
""".replace("CALLS", str(CALLS // 4))
    )


def test_counts_and_texts_that_are_put_in_order():
    run(
        TEXTS
        + """
counts = rng.integers(0, 100, COUNT).astype(np.uint64)
columns, keys = rng.integers(0, 2, COUNT).astype(np.uint32), rng.integers(1, 2**63, COUNT).astype(np.uint64)
ends = good[np.int64][1:].astype(np.uint64)
held = [guarded(array) for array in (counts, columns, keys, ends, data)]
changes = [
    (held[0], counts, counts[::-1].copy(), counts * 2**40, counts % 3),
    (held[1], columns, columns[::-1].copy()),
    (held[2], keys, keys // 3),
    (held[3], ends, ends * 2**40, ends[::-1].copy()),
    (held[4], data.copy(), data[::-1].copy()),
]
for change in changes:
    while_changing(lambda: tables.order(*held), change, calls=CALLS)
""".replace("CALLS", str(CALLS // 8))
    )


def test_row_splits_of_bags():
    run(
        TEXTS
        + """
splits, ids = good[np.int64] // 8 * 2, rng.integers(0, 3, 2 * COUNT)
held, to = guarded(splits), (guarded(np.zeros((COUNT, 3), np.int64)), guarded(np.zeros((COUNT, 3), np.float32)))
held_ids, weights = guarded(ids), guarded(rng.random(2 * COUNT, np.float32))
call = lambda: tables.fill_bags(held, held_ids, weights, *to)
while_changing(call, (held, splits, *wild(splits)), (held_ids, ids, ids[::-1].copy()), seconds=5 * SECONDS)
""".replace("SECONDS", str(SECONDS))
    )


LIBSVM = (
    CHANGING
    + """
from deepfm_ops._kernels import LibsvmParser, most_pairs, pad_rows

R, F = 2**14, 4
row_splits, fields = np.arange(0, 4 * R + 1, 4), np.tile(np.arange(4, dtype=np.int32), R)
held_splits, held_fields = guarded(row_splits), guarded(fields)
"""
)


@pytest.mark.parametrize("has_fields", [False, True])
def test_lines_of_libsvm(has_fields):
    line = b"1 0:3:0.5 1:20:1 2:7:10000000000000000000000\\n" if has_fields else b"1 3:0.5 20:1 7:1e-3\\n"
    run(
        LIBSVM
        + f"""
line = b"{line.decode()}"
lines = np.frombuffer(line * (2**16 // len(line)), np.uint8)
held = guarded(lines)
changes = [np.full_like(lines, byte) for byte in b" 0.1:,"]
changes.append(np.frombuffer(b"0 1:1 ".ljust(lines.size, b"1"), np.uint8))
for skip in (False, True):
    def parse():
        parser = LibsvmParser({has_fields}, skip)
        parser.parse(memoryview(held), 0, 2**62)
        parser.take()
    while_changing(parse, (held, lines, *changes), calls={CALLS})
"""
    )


def test_a_parser_that_two_threads_use():
    run(
        LIBSVM
        + f"""
parser, lines = LibsvmParser(False, True), b"1 3:0.5 20:1 7:1e-3\\n" * 5000
errors = []

def use():
    for _ in range({CALLS}):
        with contextlib.suppress(ValueError, RuntimeError):
            parser.parse(lines, 0, 2**62)
            labels, row_splits, _, indices, values = parser.take()
            if len(row_splits) != len(labels) + 1 or row_splits[-1] != len(indices) or len(indices) != len(values):
                errors.append("rows that do not fit")

threads = [threading.Thread(target=use) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not errors, errors[0]
"""
    )


def test_rows_that_are_padded():
    run(
        LIBSVM
        + f"""
field_splits, indices, values = np.arange(F + 1), np.arange(4 * R), rng.random(4 * R, np.float32)
held_columns, to = guarded(field_splits), (guarded(np.zeros((R, F), np.int64)), guarded(np.zeros((R, F), np.float32)))
pad = lambda: pad_rows(held_splits, held_fields, indices, values, held_columns, *to)
for change in [
    (held_splits, row_splits, *wild(row_splits)),
    (held_fields, fields, *wild(fields)),
    (held_columns, field_splits, *wild(field_splits), field_splits * 1000),
]:
    while_changing(pad, change, calls={CALLS})
"""
    )


def test_fields_that_are_counted():
    run(
        LIBSVM
        + f"""
for change in [(held_splits, row_splits, *wild(row_splits)), (held_fields, fields, *wild(fields))]:
    while_changing(lambda: most_pairs(held_splits, held_fields, F), change, calls={CALLS})
"""
    )


@pytest.mark.skipif(REFERENCE_MODE, reason="the fallback has no op of its own")
def test_tensors_that_share_an_array():
    """What from_dlpack makes; tf.constant and tf.convert_to_tensor copy."""
    run(
        CHANGING
        + f"""
import tensorflow as tf
import deepfm_ops
from deepfm_ops import optimizers
import keras

V, B, P = 4096, 2047, 16  # the arrays are aligned to 64 bytes, which is what TensorFlow asks for
table = keras.Variable(rng.random((V, 130), np.float32))
optimizer = optimizers.Adagrad(0.1)
optimizer.build([table])
good, splits = rng.integers(0, V, B * P), np.arange(0, B * P + 1, P)
indices, row_splits = guarded(good), guarded(splits)
share = lambda array: tf.experimental.dlpack.from_dlpack(array.__dlpack__())
flat, shared_splits = share(indices), share(row_splits)
dense = share(indices.reshape(B, P))
indices[0] = 17
assert int(flat[0]) == int(dense[0, 0]) == 17  # it is shared
gradient = tf.ones((B * P, 130))

def step(indices, **options):
    with contextlib.suppress(tf.errors.InvalidArgumentError):
        with tf.GradientTape() as tape:
            y = deepfm_ops.fm_interaction(table.value, indices, **options)
        tape.gradient(y, table.value)

def update():
    with contextlib.suppress(tf.errors.InvalidArgumentError):
        optimizer.apply([tf.IndexedSlices(gradient, flat, (V, 130))], [table])

calls = {CALLS} // 2
for call in (lambda: step(dense), lambda: step(flat, row_splits=shared_splits), update):
    while_changing(call, (indices, good, *wild(good)), calls=calls)
while_changing(lambda: step(flat, row_splits=shared_splits), (row_splits, splits, *wild(splits)), calls=calls)
"""
    )
