"""Random arguments for every native entry point; what comes out is compared with float64 NumPy or plain Python.

Every call has a generator of its own, by its number: to see one again, DEEPFM_OPS_FUZZ_FIRST=number and
DEEPFM_OPS_FUZZ_CALLS=0 (then every driver makes one call).
"""

import collections
import os
import zlib

import keras
import ml_dtypes
import numpy as np
import oracle
import pytest
import tensorflow as tf
from random_calls import DTYPES, STEPS, chance, close, dimension, random_pairs, random_table, spoiled
from testing import REFERENCE_MODE, runnable_instruction_sets

from deepfm_ops import _library, arguments, fm_interaction, ops, optimizers, reference
from deepfm_ops.data import libsvm_python
from deepfm_ops.features import plain

kernels = pytest.importorskip("deepfm_ops.kernels", reason="a pure-Python install has no kernels")
native = pytest.importorskip("deepfm_ops._kernels")
pytestmark = pytest.mark.skipif(REFERENCE_MODE, reason="the fallback is not native")

CALLS = int(os.environ.get("DEEPFM_OPS_FUZZ_CALLS", 2000))  # of all drivers together
FIRST = int(os.environ.get("DEEPFM_OPS_FUZZ_FIRST", 0))
INSTRUCTION_SETS = runnable_instruction_sets()


def fuzzed(share):
    """A test that calls the function with one generator after the other: this share of all calls."""

    def driver(function):
        def test():
            sets = kernels.isa(), _library.instruction_set()
            try:
                for number in range(FIRST, FIRST + max(1, round(CALLS * share))):
                    rng = np.random.default_rng([zlib.crc32(function.__name__.encode()), number])
                    kernels.set_isa(rng.choice(INSTRUCTION_SETS))
                    _library.instruction_set(rng.choice(INSTRUCTION_SETS))
                    try:
                        function(rng)
                    except Exception as error:
                        raise AssertionError(f"call {number} of {function.__name__}: {error}") from error
            finally:
                kernels.set_isa(sets[0])
                _library.instruction_set(sets[1])

        test.__name__, test.__doc__ = function.__name__, function.__doc__
        return test

    return driver


def uint8_table(rng, num_rows, dim):
    """(rows, the table and the weights that they stand for)."""
    header = rng.normal(size=(num_rows, 3)).astype(ml_dtypes.bfloat16)
    codes = rng.integers(0, 256, (num_rows, dim)).astype(np.uint8)
    scale, offset, weights = header.astype(np.float64).T[:, :, None]
    return np.concatenate([header.view(np.uint8), codes], axis=1), offset + scale * codes, weights


@fuzzed(0.3)
def test_forward_and_gradient(rng):
    dtype = str(rng.choice([*DTYPES, "uint8"]))
    acc = np.float64 if dtype == "float64" else np.float32
    if dtype == "uint8":
        given, table, weights = uint8_table(rng, int(rng.integers(1, 60)), dimension(rng))
        given_weights = None
        sizes = np.abs(given.view(np.uint8)[:, :4].copy().view(ml_dtypes.bfloat16).astype(np.float64)).max(1) * 256
    else:
        table, weights = random_table(rng, dtype)
        given, given_weights = table, weights if chance(rng, 0.5) else None
        if dtype == "bfloat16" and chance(rng, 0.5):
            given, given_weights = (x if x is None else x.view(np.uint16) for x in (given, given_weights))
    ragged = chance(rng, 0.4)
    indices, values, row_splits, field_splits = random_pairs(rng, len(table), acc, ragged, chance(rng, 0.5))
    output = str(rng.choice(["scalar", "vector", "sum"]))
    options = {"row_splits": row_splits, "field_splits": field_splits, "output": output}
    kind = {"order": 3} if chance(rng, 0.2) else {}
    if not kind and not ragged and chance(rng, 0.25):
        fields = indices.shape[1] if field_splits is None else len(field_splits) - 1
        kind = {"field_weights": rng.normal(size=fields * (fields - 1) // 2).astype(acc)}
    options |= kind
    return_embeddings = chance(rng, 0.5)

    def forward(indices, threads, return_embeddings=return_embeddings):
        return kernels.fm_forward(
            given,
            indices,
            values,
            weights=given_weights,
            return_embeddings=return_embeddings,
            threads=threads,
            **options,
        )

    if indices.size and chance(rng, 0.15):
        bad = spoiled(rng, indices, len(table))
        message = rf"indices\[{oracle.first_bad(bad, len(table))}\] = -?\d+ is not in \[0, {len(table)}\)"
        with pytest.raises(IndexError, match=message):
            forward(bad, int(rng.integers(1, 5)))
        if dtype != "uint8" and given.dtype != np.uint16:
            samples = indices.shape[0] if row_splits is None else len(row_splits) - 1
            shape = (samples, 1 if output == "scalar" else table.shape[1])
            sums, g, fields = np.zeros((samples, table.shape[1]), acc), np.zeros(shape, acc), options
            if field_splits or kind:
                shape = (samples, indices.shape[-1] if field_splits is None else len(field_splits) - 1)
                e = np.zeros((*(indices.shape if ragged else shape), table.shape[1]), acc)
                fields = {**options, "embeddings": e}
            with pytest.raises(IndexError, match=message):
                kernels.fm_gradient(given, bad, values, sums, g, threads=int(rng.integers(1, 5)), **fields)
        return

    threads = int(rng.integers(1, 5))
    y, sums, embeddings, linear = forward(indices, threads)
    batch = oracle.batch(indices, values, row_splits, field_splits)
    found = oracle.forward(table, batch, output, weights, **kind)
    terms = int(np.bincount(batch.sample_of_pair, minlength=1).max()) + table.shape[1]
    if dtype == "uint8":  # a number is a product and a sum, whose sizes the table does not show
        sized = oracle.forward(
            np.repeat(sizes[:, None], table.shape[1], 1), batch._replace(values=abs(batch.values)), output, **kind
        )
        found = {name: (want, sized[name][1] if name in sized else size) for name, (want, size) in found.items()}
    assert y.dtype == sums.dtype == acc
    close(y, found["interaction"], terms, acc)
    close(sums, found["sums"], terms, acc)
    assert (embeddings is None) == (not return_embeddings)
    if return_embeddings:
        close(embeddings, found["embeddings"], terms, acc)
    assert (linear is None) == (given_weights is None and dtype != "uint8")
    if linear is not None:
        close(linear, found["linear"], terms, acc)
    for one, other in zip(forward(indices, 1), (y, sums, embeddings, linear), strict=True):
        assert (one is None and other is None) or one.tobytes() == other.tobytes()
    if dtype == "uint8" or given.dtype == np.uint16:
        return

    embeddings = forward(indices, 1, True)[2]
    g, de = rng.normal(size=y.shape).astype(acc), None
    if chance(rng, 0.5):
        de = rng.normal(size=embeddings.shape).astype(acc)
    need_values = chance(rng, 0.5)
    given_embeddings = embeddings if field_splits is not None or kind or chance(rng, 0.3) else None
    options |= {"embeddings": given_embeddings, "d_embeddings": de, "need_values": need_values}
    results = kernels.fm_gradient(given, indices, values, sums, g, threads=threads, **options)
    flat = [None if x is None else x.reshape(-1, table.shape[1]) for x in (embeddings, de)]
    if field_splits is None:  # exact, where the kernel has the product of a row and a value
        flat[0] = batch.values[:, None] * table.astype(np.float64)[batch.indices]
    found = oracle.gradient(table, batch, output, sums, flat[0], g, flat[1], **kind)
    unique, rows, d_values, *d_field_weights = results
    np.testing.assert_array_equal(unique, found["unique"][0])
    assert rows.dtype == table.dtype and unique.dtype == np.int64
    most = int(np.bincount(batch.indices, minlength=1).max())
    if kind:
        most += terms
    close(rows, found["rows"], most, acc, dtype)
    if d_field_weights and output != "sum":
        e = embeddings.astype(np.float64)
        products = np.einsum("bfk,bhk->fh", e * g.astype(np.float64)[:, None], e)
        sizes = np.einsum("bfk,bhk->fh", np.abs(e * g[:, None]), np.abs(e))
        below = np.tril_indices(e.shape[1], -1)
        close(d_field_weights[0], (products[below], sizes[below]), len(e) + terms, acc)
    assert (d_values is None) == (not need_values)
    if need_values:
        assert d_values.shape == indices.shape
        close(d_values, found["values"], table.shape[1] + (terms if kind else 0), acc)
    again = kernels.fm_gradient(given, indices, values, sums, g, threads=1, **options)
    for one, other in zip(again, results, strict=True):
        assert (one is None and other is None) or one.tobytes() == other.tobytes()


@fuzzed(0.03)
def test_head(rng):
    parts = [rng.normal(size=(rng.integers(0, 50), 1)).astype(np.float32)]
    parts += [rng.normal(size=parts[0].shape).astype(np.float32) for _ in range(rng.integers(0, 4))]
    bias, sigmoid = np.float32(rng.normal()), chance(rng, 0.5)
    total = np.float64(bias) + sum(part.astype(np.float64) for part in parts)[:, 0]
    want = 1 / (1 + np.exp(-total)) if sigmoid else total
    np.testing.assert_allclose(kernels.head(parts, bias, sigmoid), want, rtol=2e-6, atol=2e-6)


@fuzzed(0.03)
def test_hash_buckets(rng):
    texts = [rng.bytes(rng.integers(0, 200)) for _ in range(50)]
    texts += ["".join(map(chr, rng.integers(1, 0xD7FF, 20))) for _ in range(10)]
    buckets = int(rng.choice([1, 2, 97, 2**20, 2**31 - 1, 2**63 - 1]))
    want = tf.strings.to_hash_bucket_fast(texts, buckets)
    np.testing.assert_array_equal(kernels.hash_buckets(texts, buckets), want)
    np.testing.assert_array_equal(native.tables.Column.of_list(texts).buckets(buckets), want)


def random_cells(rng, count, alphabet=b"ab|: .0159-eE+N", longest=9):
    letters = np.frombuffer(alphabet, np.uint8)
    cells = [rng.choice(letters, size).tobytes() for size in rng.integers(0, longest, count)]
    return [None if chance(rng, 0.1) else cell for cell in cells]


def column_of(rng, cells):
    """The column of cells, as a list, or where Arrow has them: anywhere in the data, in gaps, with bits."""
    if chance(rng, 0.3):
        return native.tables.Column.of_list(cells)
    dtype, first = rng.choice([np.int32, np.int64]), int(rng.integers(0, 20))
    data, starts, ends, bits = b"", [], [], [0] * first
    for cell in cells:
        data += rng.bytes(rng.integers(0, 3))
        starts.append(len(data))
        data += cell or b""
        ends.append(len(data))
        bits.append(cell is not None)
    validity = np.packbits(np.array(bits, np.uint8), bitorder="little")
    offsets = np.array(starts, dtype), np.array(ends, dtype)
    return native.tables.Column(*offsets, np.frombuffer(data, np.uint8), validity, first)


def read(result):
    if isinstance(result, np.ndarray):
        return result.dtype.str, result.shape, result.tobytes()
    if isinstance(result, tuple):
        return tuple(map(read, result))
    if isinstance(result, native.tables.Column | plain.Column):
        return [result[i] for i in range(len(result))]
    return result


@fuzzed(0.1)
def test_columns_of_text(rng):
    """As the same in plain Python."""
    cells = random_cells(rng, int(rng.integers(0, 40)), *((rng.bytes(20), 30) if chance(rng, 0.3) else ()))
    ours, same = column_of(rng, cells), plain.Column.of_list(cells)
    assert read(ours) == cells and len(ours) == len(cells)
    assert read(ours.numbers()) == read(same.numbers())
    assert ours.first_bad() == same.first_bad()
    separator, weighted = str(rng.choice(["|", "", "||", ":"])), chance(rng, 0.5)
    pieces = ours.split(separator, weighted)
    assert read(pieces) == read(same.split(separator, weighted))
    column = int(rng.integers(0, 2**32))
    assert read(native.tables.keys(column, ours)) == read(plain.keys(column, same))
    splits = pieces[0]
    ids, size = rng.integers(0, 3, splits[-1]), int(rng.integers(0, 5))
    weights = rng.random(len(ids), np.float32) if chance(rng, 0.5) else None
    made = []
    for side in (native.tables, plain):
        to = np.full((len(cells), size), -7), np.full((len(cells), size), -7, np.float32)
        side.fill_bags(splits, ids, weights, *to)
        made.append(read(to))
    assert made[0] == made[1]


@fuzzed(0.07)
def test_vocabulary(rng):
    """From counting to finding; a dict does the same."""
    known = [cell or b"" for cell in random_cells(rng, int(rng.integers(1, 60)), b"abc", 8)]
    pick = lambda count: [None if chance(rng, 0.1) else known[i] for i in rng.integers(0, len(known), count)]  # noqa: E731
    parts = [pick(int(rng.integers(0, 80))) for _ in range(3)]
    column, least = int(rng.integers(0, 2**32)), int(rng.integers(1, 4))
    counter, counts = native.tables.Counter(column), collections.Counter()
    for part in parts:
        counts.update(cell for cell in part if cell is not None)
        there = sum(cell is not None for cell in part)
        assert counter.add(column_of(rng, part)) == (len(part) - there, there, -1)
    assert len(counter) == len(counts) and counter.total == counts.total()
    keys, found, ends, texts = counter.finish(least)
    names = [texts[start:end].tobytes() for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=False)]
    assert dict(zip(names, found.tolist(), strict=True)) == {c: n for c, n in counts.items() if n >= least}
    order = native.tables.order(found, np.full(len(found), column, np.uint32), keys, ends, texts)
    assert [names[i] for i in order] == sorted(names, key=lambda name: (-counts[name], name))
    ids = {names[place]: id for id, place in enumerate(order, 1)}
    table = native.tables.Table(native.tables.slots(keys[order], np.arange(1, len(order) + 1, dtype=np.uint32)))
    large = chance(rng, 0.03)
    cells = pick(int(rng.integers(30_000, 50_000) if large else rng.integers(0, 300)))
    stride, unseen = int(rng.choice([-2, -1, 1, 3])), int(rng.integers(0, 2)) * 999
    space = np.full((len(cells), abs(stride)), -7), np.full((len(cells), abs(stride)), -7, np.float32)
    to = [array[:: 1 if stride > 0 else -1, 0] for array in space]
    counted = table.find(column, column_of(rng, cells), *to, unseen, int(rng.integers(1, 5)))
    want = [0 if cell is None else ids.get(cell, unseen) for cell in cells]
    assert to[0].tolist() == want and to[1].tolist() == [float(id != 0) for id in want]
    assert all((array[:, 1:] == -7).all() for array in space)
    assert counted == (cells.count(None), sum(cell is not None and cell not in ids for cell in cells))
    assert all(table.id(column, name) == id for name, id in list(ids.items())[:5])
    again, others = np.zeros(len(ids) + 1, np.int64), native.tables.Counter(column)
    others.add(column_of(rng, cells), table, again)
    assert again[1:].tolist() == [cells.count(name) for name in ids]
    assert len(others) == len({cell for cell in cells if cell is not None and cell not in ids})


def random_number(rng):
    digits = b"".join(rng.choice([b"%d" % rng.integers(0, 10**6), b".", b"e", b"-", b"5", b"00"], rng.integers(1, 4)))
    usual = rng.choice(
        [b"%d" % rng.integers(-5, 5), b"%.3f" % rng.normal(), b"%.17g" % rng.normal(), b"1e-50", b"1e39"]
    )
    return digits if chance(rng, 0.05) else usual


def random_lines(rng, has_fields):
    lines = b""
    for _ in range(rng.integers(1, 12)):
        pairs = []
        for _ in range(rng.integers(0, 6)):
            field = b"%d:" % rng.integers(0, 4) if has_fields else b""
            pairs.append(field + b"%d:" % (rng.integers(0, 2**63) >> rng.integers(0, 63)) + random_number(rng))
        separator = rng.choice([b" ", b"\t", b", ", b"  "])
        lines += separator.join([random_number(rng), *pairs]) + rng.choice([b"", b" # text", b"\r", b" "]) + b"\n"
    if chance(rng, 0.3):  # somewhere a byte that does not belong there
        at = rng.integers(0, len(lines) - 1)
        lines = lines[:at] + rng.choice([b":", b"\n", b"-", b"x", b".", b"\0", b"#", b"9"]) + lines[at + 1 :]
    return lines


@fuzzed(0.32)
def test_libsvm(rng):
    """As the same in Python, in pieces of so many rows."""
    has_fields, skip = chance(rng, 0.5), chance(rng, 0.5)
    lines, most = random_lines(rng, has_fields), int(rng.integers(1, 15))
    ours, same = (side.LibsvmParser(has_fields, skip) for side in (native, libsvm_python))
    begin = 0
    while begin < len(lines):
        stops = [parser.parse(lines, begin, most) for parser in (ours, same)]
        assert stops[0] == stops[1] and ours.bad == same.bad and ours.num_rows == same.num_rows
        assert (ours.lines, ours.skipped) == (same.lines, same.skipped)
        rows = ours.take()
        assert read(rows) == read(same.take())
        _, row_splits, fields, indices, values = rows
        num_fields = 4 if has_fields else 1
        sizes = np.full(num_fields, int(rng.integers(1, 6)))
        if has_fields and (fields < 4).all():
            sizes = native.most_pairs(row_splits, fields, 4)
            np.testing.assert_array_equal(sizes, libsvm_python.most_pairs(row_splits, fields, 4))
            sizes = np.maximum(sizes - (rng.random(4) < 0.1), 0)
        field_splits, padded = np.concatenate([[0], np.cumsum(sizes)]), []
        for side in (native, libsvm_python):
            to = [np.full((len(row_splits) - 1, field_splits[-1]), -7, dtype) for dtype in (np.int64, np.float32)]
            padded.append((side.pad_rows(row_splits, fields, indices, values, field_splits, *to), *map(read, to)))
        assert padded[0] == padded[1]
        if ours.bad or stops[0] == begin:
            break
        begin = stops[0]


def wide(tensor):
    return tensor.numpy().astype(np.float64)


@fuzzed(0.1)
def test_the_op(rng):
    """What everybody calls, and what layers call: fields, first order, penalties."""
    dtype = str(rng.choice([*DTYPES]))
    acc = np.float64 if dtype == "float64" else np.float32
    table, weights = random_table(rng, dtype)
    public = chance(rng, 0.5)
    ragged = chance(rng, 0.4)
    indices, values, row_splits, field_splits = random_pairs(rng, len(table), acc, ragged, not public)
    output = str(rng.choice(["scalar", "vector"] if public else ["scalar", "vector", "sum"]))
    variables = [tf.Variable(x) if chance(rng, 0.5) else tf.constant(x) for x in (table,)]
    variables.append(tf.Variable(weights) if isinstance(variables[0], tf.Variable) else tf.constant(weights))
    given = None if values is None else tf.constant(values)
    counts, priors, l2, l2_linear = None, None, 0.0, 0.0
    if not public and chance(rng, 0.5):
        l2, l2_linear = float(np.float32(rng.random())), float(np.float32(rng.random()))
        if chance(rng, 0.5):
            counts = rng.integers(0, 9, len(table)).astype(np.int32)
            priors = np.array([rng.random(), rng.random(), rng.choice([0, rng.random() * 9])], np.float32)
    penalty = reference.Penalty(l2, l2_linear, *(x if x is None else tf.constant(x) for x in (counts, priors)))

    def call(indices):
        if public:
            return fm_interaction(variables[0], indices, given, row_splits=row_splits, output=output), None, None, None
        pairs = arguments.Pairs(tf.constant(indices), given, None if row_splits is None else tf.constant(row_splits))
        return ops.interaction(
            variables[0],
            pairs,
            output,
            field_splits=field_splits or (),
            return_embeddings=True,
            weights=variables[1],
            penalty=penalty,
        )

    if indices.size and chance(rng, 0.15):
        bad = spoiled(rng, indices, len(table))
        message = rf"indices\[{oracle.first_bad(bad, len(table))}\] = -?\d+ is not in \[0, {len(table)}\)"
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            call(bad)
        return

    with tf.GradientTape(persistent=True) as tape:
        tape.watch([x for x in (*variables, given) if x is not None])
        y, embeddings, linear, silent = call(indices)
        results = [x for x in (y, embeddings, linear) if x is not None]
        seeds = [rng.normal(size=x.shape).astype(acc) for x in results]
        loss = sum(tf.reduce_sum(x * seed) for x, seed in zip(results, seeds, strict=True))
        loss += 0 if silent is None else silent
    batch = oracle.batch(indices, values, row_splits, field_splits)
    found = oracle.forward(table, batch, output, weights)
    terms = int(np.bincount(batch.sample_of_pair, minlength=1).max()) + table.shape[1]
    close(y, found["interaction"], terms, acc)
    if not public:
        close(embeddings, found["embeddings"], terms, acc)
        close(linear, found["linear"], terms, acc)
    # The sums and the embeddings of the op are those of the forward, rounded: their error enters as the sizes do.
    dim, pull = table.shape[1], (0, 0)
    unique, group = np.unique(batch.indices, return_inverse=True)
    if penalty:
        share = np.zeros((len(unique), 1))
        if counts is not None:
            occurrences = np.bincount(group, batch.values != 0, len(unique))
            n = np.maximum(counts[unique], 1).astype(np.float64)
            softness = np.float64(priors[2])
            share[:, 0] = occurrences / n * (softness / (softness + n) if softness > 0 else 1) / batch.num_samples
        strengths = (0, 0) if priors is None else priors
        pull = 2 * l2 + share * float(strengths[0]), 2 * l2_linear + share * float(strengths[1])
    more = {} if public else {"weights": weights, "d_linear": seeds[2]}
    de = None if public else seeds[1].reshape(-1, dim)
    of_forward = found["sums"], found["embeddings"]
    found = oracle.gradient(table, batch, output, of_forward[0][0], of_forward[1][0], seeds[0], de, **more, pull=pull)
    # ... and their sizes are those of the summands, not of the sums.
    loose = oracle.gradient(
        np.abs(table.astype(np.float64)),
        batch._replace(values=np.abs(batch.values)),
        output,
        of_forward[0][1],
        of_forward[1][1],
        np.abs(seeds[0]),
    )
    most = int(np.bincount(batch.indices, minlength=1).max()) + terms
    if indices.size:
        d_table = tape.gradient(loss, variables[0])
        np.testing.assert_array_equal(d_table.indices, unique)
        close(d_table.values, (found["rows"][0], found["rows"][1] + loose["rows"][1]), most, acc, dtype)
        if not public:
            close(tape.gradient(loss, variables[1]).values, found["weights"], most, acc, dtype)
        if values is not None:
            close(tape.gradient(loss, given), (found["values"][0], found["values"][1] + loose["values"][1]), most, acc)


def random_optimizer(rng):
    """(the optimizer, its rule, hyper(step): the numbers of sparse_update.h), of numbers that float32 holds."""
    f = lambda low, high: float(np.float32(10 ** rng.uniform(low, high)))  # noqa: E731
    rate, decay = f(-3, 0), float(rng.choice([0, 0.125]))
    options = {"learning_rate": rate, "weight_decay": decay or None}
    kind = str(rng.choice(["SGD", "Adagrad", "RowWiseAdagrad", "LazyAdam", "Ftrl"]))
    if kind == "SGD":
        return optimizers.SGD(**options), "sgd", lambda step: (rate * decay, rate)
    if kind in ("Adagrad", "RowWiseAdagrad"):
        epsilon = f(-7, -2)
        made = getattr(optimizers, kind)(initial_accumulator_value=f(-2, 0), epsilon=epsilon, **options)
        return made, "adagrad" if kind == "Adagrad" else "row_wise_adagrad", lambda step: (rate * decay, rate, epsilon)
    if kind == "LazyAdam":
        beta_1, beta_2, epsilon = rng.integers(500, 970) / 1024, rng.integers(900, 1014) / 1024, f(-7, -2)

        def adam(step):
            return (
                rate * decay,
                rate * np.sqrt(1 - beta_2**step) / (1 - beta_1**step),
                1 - beta_1,
                1 - beta_2,
                epsilon,
            )

        return optimizers.LazyAdam(beta_1=beta_1, beta_2=beta_2, epsilon=epsilon, **options), "lazy_adam", adam
    power, beta = float(rng.choice([-0.5, -0.25, -0.75])), float(rng.choice([0, 0.125]))
    l1, l2, shrinkage = (float(rng.choice([0, f(-3, -1)])) for _ in range(3))
    made = optimizers.Ftrl(
        learning_rate_power=power,
        initial_accumulator_value=f(-1, 0),
        l1_regularization_strength=l1,
        l2_regularization_strength=l2,
        l2_shrinkage_regularization_strength=shrinkage,
        beta=beta,
        **options,
    )
    return made, "ftrl", lambda step: (rate * decay, rate, power, l1, l2 + beta / (2 * rate), shrinkage)


@fuzzed(0.05)
def test_optimizers(rng):
    """Step by step from where the rows are, so that what was rounded before does not matter."""
    dtype = str(rng.choice([*DTYPES]))
    acc = np.float64 if dtype == "float64" else np.float32
    optimizer, rule, hyper = random_optimizer(rng)
    num_rows, dim = int(rng.integers(1, 40)), dimension(rng)
    table = keras.Variable(rng.normal(size=(num_rows, dim)), dtype=dtype)
    optimizer.build([table])
    for step in range(1, 4):
        n = int(rng.integers(0, 2000 if chance(rng, 0.05) else 60))
        indices = rng.integers(0, num_rows, n).astype(rng.choice([np.int32, np.int64]))
        gradient = rng.normal(size=(n, dim)).astype(DTYPES[dtype])
        slots = [slot.value for slot in optimizer._slots(table)]
        before = [wide(x) for x in (table.value, *slots)]
        if not all(np.isfinite(x).all() for x in before):  # a narrow slot that ran over
            return
        optimizer.apply([tf.IndexedSlices(tf.constant(gradient), tf.constant(indices), (num_rows, dim))], [table])
        after = [wide(x) for x in (table.value, *slots)]
        unique, group = np.unique(indices, return_inverse=True)
        absent = np.setdiff1d(np.arange(num_rows), unique)
        for old, new in zip(before, after, strict=True):
            np.testing.assert_array_equal(new[absent], old[absent])
        g, g_size = oracle.added(group, gradient.astype(np.float64), len(unique))
        rows, *kept = (old[unique] for old in before)
        wants = oracle.updated(rule, hyper(step), rows, kept, g)
        # How far off the sums of the gradients may be, and what that does.
        eps, terms = STEPS[np.dtype(acc).name][0], np.bincount(group, minlength=1).max()
        off = (terms + 4) * eps * g_size
        near = [oracle.updated(rule, hyper(step), rows, kept, g + some) for some in (off, -off)]
        for i, (want, size) in enumerate([wants[0], *wants[1]]):
            others = [([p, *slots])[i][0] for p, slots in near]
            spread = sum(np.abs(other - want) for other in others)
            # Adam's corrections are differences of numbers near 1.
            close(after[i][unique], (want, size + spread / (64 * eps)), 120, acc, dtype)
