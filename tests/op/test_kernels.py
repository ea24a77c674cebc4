"""The kernels on NumPy arrays: results, threads, memory, and everything an array can be that they refuse."""

import concurrent.futures
import os
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
from testing import run_python

kernels = pytest.importorskip("deepfm_ops.kernels", reason="a pure-Python install has no kernels")
DTYPES = {"float32": np.float32, "float64": np.float64, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@pytest.fixture
def data(rng):
    table = rng.normal(size=(50, 6)).astype("f")
    return table, rng.integers(0, 50, (7, 4)), rng.normal(size=(7, 4)).astype("f")


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
