"""The kernels on NumPy arrays: results, threads, memory, and everything an array can be that they refuse."""

import concurrent.futures
import os
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
from testing import dense_samples, oracle, ragged_samples, run_python, tolerance

kernels = pytest.importorskip("deepfm_ops.kernels", reason="a pure-Python install has no kernels")
DTYPES = {"float32": np.float32, "float64": np.float64, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@pytest.fixture
def data(rng):
    table = rng.normal(size=(50, 6)).astype("f")
    return table, rng.integers(0, 50, (7, 4)), rng.normal(size=(7, 4)).astype("f")


def reference(table, indices, values, d_interaction):
    """Forward sums and the gradient, in float64."""
    e = np.asarray(table, float)[indices] * values[..., None]
    s = e.sum(1)
    d = d_interaction[:, :, None] * (s[:, None] - e)
    rows, position = np.unique(indices, return_inverse=True)
    d_rows = np.zeros((len(rows), table.shape[1]))
    np.add.at(d_rows, position.ravel(), (values[..., None] * d).reshape(-1, table.shape[1]))
    return s, rows, d_rows, (np.asarray(table, float)[indices] * d).sum(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
def test_forward_and_gradient(dtype, index_dtype, rng):
    for dim in (1, 7, 16, 33, 130):
        table = rng.normal(size=(50, dim)).astype(DTYPES[dtype])
        acc = np.float64 if dtype == "float64" else np.float32
        indices = rng.integers(0, 50, (7, 4)).astype(index_dtype)
        values, g = rng.normal(size=(7, 4)).astype(acc), rng.normal(size=(7, 1)).astype(acc)
        samples = dense_samples(indices, values)
        bound = tolerance(dtype, samples, table)
        y, sums, embeddings, _ = kernels.fm_forward(table, indices, values, return_embeddings=True)
        assert y.dtype == sums.dtype == embeddings.dtype == acc
        np.testing.assert_allclose(y, oracle(table, samples), atol=bound, rtol=0)
        expected = reference(table, indices, values.astype(float), g.astype(float))
        np.testing.assert_allclose(sums, expected[0], atol=bound, rtol=0)
        np.testing.assert_allclose(embeddings, np.asarray(table, acc)[indices] * values[..., None], rtol=1e-6)
        unique, rows, d_values = kernels.fm_gradient(table, indices, values, sums, g, need_values=True)
        assert rows.dtype == table.dtype and unique.dtype == np.int64
        np.testing.assert_array_equal(unique, expected[1])
        narrow = {"bfloat16": 8e-3, "float16": 1e-3}.get(dtype, 0)
        np.testing.assert_allclose(rows.astype(float), expected[2], atol=100 * bound, rtol=narrow)
        np.testing.assert_allclose(d_values, expected[3], atol=100 * bound, rtol=0)


def test_ragged_and_fields(rng):
    table = rng.normal(size=(9, 5))
    indices, values, splits = rng.integers(0, 9, 8), rng.normal(size=8), np.array([0, 3, 3, 8])
    y, _, _, _ = kernels.fm_forward(table, indices, values, row_splits=splits, output="vector")
    np.testing.assert_allclose(y, oracle(table, ragged_samples(indices, values, splits), "vector"), atol=1e-12)
    indices, values = rng.integers(0, 9, (2, 4)), rng.normal(size=(2, 4))
    samples = [[[(i[0], x[0])], [(i[p], x[p]) for p in (1, 2, 3)]] for i, x in zip(indices, values, strict=True)]
    y, sums, e, _ = kernels.fm_forward(table, indices, values, field_splits=[0, 1, 4], return_embeddings=True)
    np.testing.assert_allclose(y, oracle(table, samples), atol=1e-12)
    with pytest.raises(ValueError, match="embeddings are needed with field_splits"):
        kernels.fm_gradient(table, indices, values, sums, y, field_splits=[0, 1, 4])
    assert kernels.fm_gradient(table, indices, values, sums, y, embeddings=e, field_splits=[0, 1, 4])[0].size > 0


@pytest.mark.parametrize("dtype", [*DTYPES, "uint16"])
def test_first_order(dtype, rng):
    """The weights of the pairs, in the same call; bfloat16 also as its bits."""
    narrow = DTYPES.get(dtype, ml_dtypes.bfloat16)
    acc = np.float64 if dtype == "float64" else np.float32
    table, weights = rng.normal(size=(50, 6)).astype(narrow), rng.normal(size=(50, 1)).astype(narrow)
    indices, values = rng.integers(0, 50, (7, 4)), rng.normal(size=(7, 4)).astype(acc)
    given = (table.view(np.uint16), weights.view(np.uint16)) if dtype == "uint16" else (table, weights)
    y, _, _, linear = kernels.fm_forward(given[0], indices, values, weights=given[1])
    expected = (values * weights.astype(acc)[indices, 0]).sum(1, keepdims=True)
    np.testing.assert_allclose(linear, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(y, kernels.fm_forward(table, indices, values)[0])
    assert linear.dtype == acc and kernels.fm_forward(table, indices)[3] is None


def int8_table(rng, rows, dim):
    """(uint8 rows, the same as float32, their weights)."""
    header = rng.normal(size=(rows, 3)).astype(ml_dtypes.bfloat16)
    codes = rng.integers(0, 256, (rows, dim)).astype(np.uint8)
    wide = header.astype("f")
    table = wide[:, 1:2] + wide[:, :1] * codes.astype("f")
    return np.concatenate([header.view(np.uint8).reshape(rows, 6), codes], axis=1), table, wide[:, 2:].copy()


@pytest.mark.parametrize("dim", [1, 2, 7, 15, 16, 17, 33, 130])
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_int8_rows(dim, isa, rng):
    before = kernels.isa()
    try:
        kernels.set_isa(isa)
    except ValueError:
        return  # this machine has no such instructions
    try:
        rows, table, weights = int8_table(rng, 50, dim)
        indices, values = rng.integers(0, 50, (7, 4)), rng.random((7, 4), np.float32)
        for options in ({}, {"field_splits": [0, 1, 4]}, {"output": "vector"}, {"output": "sum"}):
            got = kernels.fm_forward(rows, indices, values, return_embeddings=True, **options)
            want = kernels.fm_forward(table, indices, values, weights=weights, return_embeddings=True, **options)
            for a, b in zip(got, want, strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * np.abs(b).max())
        got = kernels.fm_forward(rows, indices.ravel(), row_splits=np.array([0, 3, 3, 28]))
        want = kernels.fm_forward(table, indices.ravel(), weights=weights, row_splits=np.array([0, 3, 3, 28]))
        np.testing.assert_allclose(got[0], want[0], rtol=2e-5, atol=2e-5 * np.abs(want[0]).max())
        with pytest.raises(IndexError, match=r"indices\[0,0\] = 50 is not in \[0, 50\)"):
            kernels.fm_forward(rows, np.array([[50]]))
    finally:
        kernels.set_isa(before)


def test_first_orders_that_are_refused(data, rng):
    table, indices, values = data
    weights = rng.normal(size=(50, 1)).astype("f")
    for bad, error, message in [
        (weights[:, 0], ValueError, r"weights must have shape \(50, 1\), got \(50,\)"),
        (weights[:49], ValueError, r"weights must have shape \(50, 1\), got \(49, 1\)"),
        (weights.astype(float), TypeError, "weights must have the dtype of table, float32, got float64"),
        (weights[::-1], ValueError, "weights must be C-contiguous"),
    ]:
        with pytest.raises(error, match=message):
            kernels.fm_forward(table, indices, values, weights=bad)
    rows, _, _ = int8_table(rng, 50, 6)
    with pytest.raises(ValueError, match="a table of uint8 holds the weights in its rows"):
        kernels.fm_forward(rows, indices, weights=rows[:, :1].copy())
    with pytest.raises(ValueError, match="a row of uint8 must have at least 6 bytes"):
        kernels.fm_forward(rows[:, :5].copy(), indices)
    with pytest.raises(ValueError, match="a first order needs a table with at least one column"):
        kernels.fm_forward(table[:, :0].copy(), indices, weights=weights)
    with pytest.raises(TypeError, match="table must be float32, float64, bfloat16, float16 in native"):
        kernels.fm_gradient(rows, indices, None, np.zeros((7, 6), "f"), np.zeros((7, 1), "f"))


def test_head(rng):
    parts = [rng.normal(size=(9, 1)).astype("f") for _ in range(3)]
    total = sum(parts)[:, 0] + np.float32(0.5)
    np.testing.assert_allclose(kernels.head(parts, 0.5, False), total, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(kernels.head(parts, 0.5, True), 1 / (1 + np.exp(-total)), rtol=1e-6)
    for bad, error in [([], ValueError), ([parts[0][:, 0]], ValueError), ([parts[0], parts[1][:3]], ValueError)]:
        with pytest.raises(error):
            kernels.head(bad, 0.0, False)
    with pytest.raises(TypeError, match="parts must be float32"):
        kernels.head([np.zeros((3, 1))], 0.0, False)


def test_same_bits_for_any_number_of_threads(rng):
    table = rng.normal(size=(3000, 20)).astype("f")
    indices, values = np.minimum(rng.zipf(1.3, (4000, 11)), 3000) - 1, rng.random((4000, 11), np.float32)
    results = []
    for threads in (1, 2, 3, 8):
        y, sums, _, _ = kernels.fm_forward(table, indices, values, threads=threads)
        unique, rows, d_values = kernels.fm_gradient(table, indices, values, sums, y, need_values=True, threads=threads)
        results.append(b"".join(a.tobytes() for a in (y, sums, unique, rows, d_values)))
    assert len(set(results)) == 1


def test_concurrent_calls(rng):
    table = rng.normal(size=(1000, 16)).astype("f")
    batches = [rng.integers(0, 1000, (500 + i, 20)) for i in range(16)]
    expected = [kernels.fm_forward(table, b)[0] for b in batches]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            for got, want in zip(pool.map(lambda b: kernels.fm_forward(table, b)[0], batches), expected, strict=True):
                np.testing.assert_array_equal(got, want)


def test_other_threads_run_meanwhile(rng):
    """With Python's own switching put off, another thread runs only while a kernel has released the GIL."""
    table, indices = rng.random((1000, 64), np.float32), rng.integers(0, 1000, (20_000, 100))
    begin, ran = threading.Event(), []

    def other():
        begin.wait()
        ran.append(True)

    thread, interval = threading.Thread(target=other), sys.getswitchinterval()
    thread.start()
    sys.setswitchinterval(1000)
    try:
        begin.set()
        for _ in range(100):
            if ran:
                break
            kernels.fm_forward(table, indices, threads=1)
        assert ran
    finally:
        sys.setswitchinterval(interval)
        thread.join()


def test_after_a_fork():
    code = """
import os, numpy as np
from deepfm_ops import kernels
table, indices = np.ones((100, 16), "f"), np.zeros((5000, 20), np.int64)
kernels.fm_forward(table, indices, threads=2)
child = os.fork()
if child == 0:
    os._exit(0 if kernels.fm_forward(table, indices, threads=2)[0][0, 0] == 16 * 190 else 1)
print(os.waitpid(child, 0)[1])
"""
    assert run_python(code).strip() == "0"


def test_results_outlive_each_other(data):
    """Memory is kept for the next result, but not while somebody holds it."""
    table, indices, values = data
    first = kernels.fm_forward(table, indices, values)[0]
    copy = first.copy()
    for _ in range(20):
        kernels.fm_forward(table, indices, -2 * values)
    np.testing.assert_array_equal(first, copy)
    part = kernels.fm_forward(table, indices, values)[1][2:4]  # a view keeps the whole alive
    kept = part.copy()
    for _ in range(20):
        kernels.fm_forward(table, indices, -2 * values)
    np.testing.assert_array_equal(part, kept)


def test_read_only_inputs_are_fine_and_stay_as_they_are(data):
    table, indices, values = (a.copy() for a in data)
    for a in (table, indices, values):
        a.setflags(write=False)
    y, sums, _, _ = kernels.fm_forward(table, indices, values)
    kernels.fm_gradient(table, indices, values, sums, y)
    for a, b in zip((table, indices, values), data, strict=True):
        np.testing.assert_array_equal(a, b)


def misaligned(array):
    raw = np.zeros(array.nbytes + 1, np.uint8)
    view = raw[1:].view(array.dtype).reshape(array.shape)
    view[:] = array
    return view


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda t, i, x: (t.astype(int), i, x),
            TypeError,
            "table must be float32, float64, bfloat16, float16.* in native",
        ),
        (lambda t, i, x: (t.astype(">f4"), i, x), TypeError, "table must be .* in native byte order, got >f4"),
        (lambda t, i, x: (t, i.astype(">i8"), x), TypeError, "indices must be int32, int64 in native byte order"),
        (lambda t, i, x: (t, i.astype(float), x), TypeError, "indices must be int32, int64"),
        (
            lambda t, i, x: (t, i, x.astype(float)),
            TypeError,
            "values must be float32 in native byte order, got float64",
        ),
        (lambda t, i, x: (t[:, ::2], i, x), ValueError, "table must be C-contiguous, got strides"),
        (lambda t, i, x: (t, np.asfortranarray(i), x), ValueError, "indices must be C-contiguous"),
        (lambda t, i, x: (misaligned(t), i, x), ValueError, "table must be aligned to its items of 4 bytes"),
        (lambda t, i, x: (t, misaligned(i), x), ValueError, "indices must be aligned to its items of 8 bytes"),
        (lambda t, i, x: (t[0], i, x), ValueError, r"table must be rank 2 \[V, K\], got shape \(6,\)"),
        (lambda t, i, x: (t, i[0], x[0]), ValueError, r"indices must be rank 2 \[B, F\], or rank 1 with row_splits"),
        (
            lambda t, i, x: (t, i, x[:, :3].copy()),
            ValueError,
            r"values must have the shape of indices, \(7, 4\), got \(7, 3\)",
        ),
        (lambda t, i, x: (t, i + 50, x), IndexError, r"indices\[0,0\] = \d+ is not in \[0, 50\)"),
    ],
)
def test_arrays_that_are_refused(change, error, message, data):
    arrays = change(*data)
    with pytest.raises(error, match=message):
        kernels.fm_forward(*arrays)
    if error is not IndexError or arrays[0].ndim == 2:
        with pytest.raises(error, match=message):
            kernels.fm_gradient(*arrays, np.zeros((7, 6), "f"), np.zeros((7, 1), "f"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"threads": 0}, ValueError, "threads must be at least 1, got 0"),
        ({"output": "all"}, ValueError, "output must be one of sum, scalar, vector, got 'all'"),
        ({"field_splits": [0, 3]}, ValueError, "field_splits must end at the columns of indices, 4, got"),
        ({"field_splits": []}, ValueError, "field_splits must go from 0"),
        ({"row_splits": np.array([0, 28])}, ValueError, r"indices must be rank 1 \[nnz\] with row_splits"),
        ({"row_splits": np.array([0, 28]), "field_splits": [0, 4]}, ValueError, "field_splits needs indices of rank 2"),
    ],
)
def test_arguments_that_are_refused(arguments, error, message, data):
    with pytest.raises(error, match=message):
        kernels.fm_forward(*data, **arguments)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ([1, 4], r"row_splits must start at 0, got row_splits\[0\] = 1"),
        ([0, 3, 2, 4], r"row_splits must not decrease, got row_splits\[1\] = 3 and row_splits\[2\] = 2"),
        ([0, 9], r"row_splits must end at nnz = 4, got row_splits\[1\] = 9"),
        ([], r"row_splits must be rank 1 \[B \+ 1\]"),
    ],
)
def test_row_splits_that_are_refused(splits, message, data):
    with pytest.raises(ValueError, match=message):
        kernels.fm_forward(data[0], np.arange(4), row_splits=np.array(splits, np.int64))
    with pytest.raises(TypeError, match="row_splits must be int64"):
        kernels.fm_forward(data[0], np.arange(4), row_splits=np.array([0, 4], np.int32))


def test_a_table_of_more_than_two_to_the_31_rows():
    """A mapping that is touched at three rows only: 64-bit row numbers and byte offsets."""
    rows = 2**31 + 10**6
    table = np.zeros((rows, 1), np.float16)  # zeros of the operating system, never touched
    table[[3, 2**31 + 7, rows - 1], 0] = [1, 2, 4]
    indices = np.array([[3, 2**31 + 7, rows - 1], [3, 3, 0]])
    y, sums, _, _ = kernels.fm_forward(table, indices)
    np.testing.assert_array_equal(y, [[1 * 2 + 1 * 4 + 2 * 4], [1]])
    unique, d_rows, _ = kernels.fm_gradient(table, indices, None, sums, np.ones((2, 1), "f"))
    np.testing.assert_array_equal(unique, [0, 3, 2**31 + 7, rows - 1])
    np.testing.assert_array_equal(d_rows[:, 0], [2, 6 + 1 + 1, 5, 3])
    many = np.tile(indices, (400, 1))  # enough for the radix sort
    unique, _, _ = kernels.fm_gradient(table, many, None, np.zeros((800, 1), "f"), np.ones((800, 1), "f"))
    np.testing.assert_array_equal(unique, [0, 3, 2**31 + 7, rows - 1])
    with pytest.raises(IndexError, match=rf"indices\[0,0\] = {rows} is not in \[0, {rows}\)"):
        kernels.fm_forward(table, np.array([[rows]]))


def test_results_that_cannot_be_allocated():
    """B * F * K beyond 2^31, and beyond what 64 bits or the machine can hold."""
    table, indices = np.zeros((1, 10**6), np.float16), np.zeros((10**5, 4), np.int64)
    with pytest.raises(MemoryError):
        kernels.fm_forward(table, indices, return_embeddings=True)  # 1.6e12 bytes
    empty = np.zeros((0, 2**40), np.float16)
    with pytest.raises(MemoryError):
        kernels.fm_forward(empty, np.zeros((100, 3), np.int64))


LARGE = pytest.mark.skipif("DEEPFM_OPS_LARGE_TESTS" not in os.environ, reason="9 GB and half a minute of page faults")


@LARGE
def test_more_than_two_to_the_31_elements():
    """B * F * K = 2.16e9: the pairs' offsets in the embeddings need 64 bits."""
    table = np.zeros((2, 32768), np.float16)
    table[1] = 1
    indices = np.zeros((33_000, 2), np.int32)
    indices[-1] = 1
    y, _, embeddings, _ = kernels.fm_forward(table, indices, return_embeddings=True)
    assert embeddings.size > 2**31 and y[-1] == 32768 and not y[:-1].any()
    assert (embeddings[-1] == 1).all() and not embeddings[-2].any()


def test_without_tensorflow():
    assert (
        run_python("import sys; from deepfm_ops import kernels; print('tensorflow' in sys.modules)").strip() == "False"
    )


def test_instruction_sets_agree(data):
    table, indices, values = data
    before, results = kernels.isa(), []
    try:
        for name in ("baseline", "avx2", "avx512"):
            try:
                kernels.set_isa(name)
            except ValueError as error:
                assert "this machine cannot run" in str(error)
                continue
            assert kernels.isa() == name
            results.append(kernels.fm_forward(table, indices, values)[0])
    finally:
        kernels.set_isa(before)
    for result in results:
        np.testing.assert_allclose(result, results[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="this machine cannot run the 'sse9' build"):
        kernels.set_isa("sse9")
