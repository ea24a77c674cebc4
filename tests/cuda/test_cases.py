"""What the kernels' calls give and refuse, the same for every implementation: the CPU's, the GPU's, its emulation."""

import os
import zlib

import ml_dtypes
import numpy as np
import oracle
import pytest
from implementations import ALL
from random_calls import DTYPES, STEPS, chance, close, dimension, random_pairs, random_table, spoiled

from deepfm_ops.kernels import Update

CALLS = int(os.environ.get("DEEPFM_OPS_FUZZ_CALLS", 2000)) // 40  # of each random test
OUTPUTS = ("scalar", "vector", "sum")


@pytest.fixture(params=ALL, ids=lambda implementation: implementation.name)
def kernels(request):
    return request.param


@pytest.fixture
def data(rng):
    table = rng.normal(size=(50, 6)).astype("f")
    return table, rng.integers(0, 50, (7, 4)), rng.normal(size=(7, 4)).astype("f")


def generators(name):
    """One generator of random numbers per call; the number says which to see again."""
    for number in range(CALLS):
        yield number, np.random.default_rng([zlib.crc32(name.encode()), number])


def test_by_hand(kernels):
    table = np.array([[1, 2], [3, 4], [5, 6]], "f")
    y, sums, e, linear = kernels.fm_forward(
        table, np.array([[0, 1], [2, 2]]), weights=np.array([[1], [10], [100]], "f"), return_embeddings=True
    )
    assert y.tolist() == [[1 * 3 + 2 * 4], [5 * 5 + 6 * 6]] and sums.tolist() == [[4, 6], [10, 12]]
    assert e.tolist() == [[[1, 2], [3, 4]], [[5, 6], [5, 6]]] and linear.tolist() == [[11], [200]]
    unique, rows, d_values = kernels.fm_gradient(
        table, np.array([[0, 1], [2, 2]]), None, sums, np.ones((2, 1), "f"), need_values=True
    )
    assert unique.tolist() == [0, 1, 2] and rows.tolist() == [[3, 4], [1, 2], [10, 12]]
    assert d_values.tolist() == [[11, 11], [61, 61]]
    kernels.sparse_update(table, unique, rows, Update("sgd", (0, 0.5)))
    assert table.tolist() == [[-0.5, 0], [2.5, 3], [0, 0]]


def penalty_of(rng, table, batch):
    """(arguments of a penalty, what it pulls at the unique rows and their weights)."""
    if chance(rng, 0.5):
        return {}, (0, 0)
    f = lambda: float(np.float32(rng.random()))  # noqa: E731
    options = {"l2": f(), "l2_linear": f()}
    unique, group = np.unique(batch.indices, return_inverse=True)
    share = np.zeros((len(unique), 1))
    if chance(rng, 0.6):
        counts = rng.integers(1, 9, len(table)).astype(np.int32)
        options |= {"counts": counts, "prior": f(), "prior_linear": f(), "prior_softness": float(rng.choice([0, 3.5]))}
        n, softness = counts[unique].astype(np.float64), options["prior_softness"]
        share[:, 0] = np.bincount(group, batch.values != 0, len(unique)) / n
        share[:, 0] *= softness / (softness + n) if softness else 1
    prior, prior_linear = options.get("prior", 0), options.get("prior_linear", 0)
    return options, (2 * options["l2"] + share * prior, 2 * options["l2_linear"] + share * prior_linear)


def same_bits(one, other):
    return all(
        (a is None and b is None) or (a.dtype == b.dtype and a.tobytes() == b.tobytes())
        for a, b in zip(one, other, strict=True)
    )


def test_random_forwards_and_gradients(kernels):
    for number, rng in generators("forward"):
        try:
            forward_and_gradient(kernels, rng)
        except Exception as error:
            raise AssertionError(f"call {number}: {error}") from error


def forward_and_gradient(kernels, rng):
    dtype = str(rng.choice(kernels.dtypes))
    acc = np.float64 if dtype == "float64" else np.float32
    table, weights = random_table(rng, dtype)
    indices, values, row_splits, field_splits = random_pairs(rng, len(table), acc, chance(rng, 0.4), chance(rng, 0.5))
    output = str(rng.choice(OUTPUTS))
    options = {"row_splits": row_splits, "field_splits": field_splits, "output": output}
    if indices.size and chance(rng, 0.15):
        bad = spoiled(rng, indices, len(table))
        message = rf"^indices\[{oracle.first_bad(bad, len(table))}\] = -?\d+ is not in \[0, {len(table)}\)$"
        with pytest.raises(IndexError, match=message):
            kernels.fm_forward(table, bad, values, **options)
        return
    results = kernels.fm_forward(table, indices, values, weights=weights, return_embeddings=True, **options)
    y, sums, e, linear = results
    batch, dim = oracle.batch(indices, values, row_splits, field_splits), table.shape[1]
    terms = int(np.bincount(batch.sample_of_pair, minlength=1).max()) + dim
    want = oracle.forward(table, batch, output, weights)
    for name, got in (("interaction", y), ("sums", sums), ("embeddings", e), ("linear", linear)):
        assert got.dtype == acc
        close(got, want[name], terms, acc)
    again = kernels.fm_forward(table, indices, values, weights=weights, return_embeddings=True, **options)
    assert same_bits(results, again)
    without = kernels.fm_forward(table, indices, values, **options)
    assert same_bits(without[:2], results[:2]) and without[2:] == (None, None)

    g = rng.normal(size=y.shape).astype(acc)
    de = rng.normal(size=e.shape).astype(acc) if chance(rng, 0.5) else None
    penalty, pull = penalty_of(rng, table, batch)
    more, linear_too = {}, chance(rng, 0.5)
    if linear_too:
        more = {"weights": weights, "d_linear": rng.normal(size=linear.shape).astype(acc)}
    need_values = chance(rng, 0.5)
    options |= {"d_embeddings": de, "need_values": need_values, **more, **penalty}
    options["embeddings"] = e if field_splits is not None or chance(rng, 0.3) else None
    gradient = kernels.fm_gradient(table, indices, values, sums, g, **options)
    flat = e.reshape(-1, dim)
    if field_splits is None:  # exact, where the kernel has the product of a row and a value
        flat = batch.values[:, None] * table.astype(np.float64)[batch.indices]
    want = oracle.gradient(
        table, batch, output, sums, flat, g, None if de is None else de.reshape(-1, dim), pull=pull, **more
    )
    np.testing.assert_array_equal(gradient[0], want["unique"][0])
    assert gradient[0].dtype == np.int64 and gradient[1].dtype == table.dtype
    most = int(np.bincount(batch.indices, minlength=1).max())
    close(gradient[1], want["rows"], most, acc, dtype)
    assert (gradient[2] is None) == (not need_values) and len(gradient) == 3 + linear_too
    if need_values:
        assert gradient[2].shape == indices.shape
        close(gradient[2], want["values"], dim, acc)
    if linear_too:
        assert gradient[3].shape == (len(gradient[0]), 1)
        close(gradient[3], want["weights"], most, acc, dtype)
    assert same_bits(gradient, kernels.fm_gradient(table, indices, values, sums, g, **options))


def random_update(rng, rule, table, acc, dtype):
    """(an Update of numbers that acc holds, its numbers as floats)."""
    f = lambda low, high: float(np.float32(10 ** rng.uniform(low, high)))  # noqa: E731
    rate, decay, epsilon = f(-3, 0), float(rng.choice([0, 0.125])), f(-7, -2)
    hyper = {
        "sgd": (decay, rate),
        "adagrad": (decay, rate, epsilon),
        "row_wise_adagrad": (decay, rate, epsilon),
        "lazy_adam": (decay, rate, 0.125, 1 / 64, epsilon),
        "ftrl": (decay, rate, float(rng.choice([-0.5, -0.75])), *(float(rng.choice([0, f(-3, -1)])) for _ in range(3))),
    }[rule]
    count = {"sgd": 0, "lazy_adam": 2, "ftrl": 2}.get(rule, 1)
    shape = table.shape[:1] if rule == "row_wise_adagrad" else table.shape
    slots = [(rng.random(shape) + 0.1).astype(DTYPES[dtype]) for _ in range(count)]
    if rule == "ftrl":
        slots[1] -= slots[1].dtype.type(0.5)
    lag = rng.normal(size=table.shape).astype(acc) if np.dtype(acc).name == dtype and chance(rng, 0.3) else None
    counts = rng.integers(0, 50, len(table)).astype(np.int32) if chance(rng, 0.3) else None
    numbers = (*hyper, *((1.25,) if lag is not None else ()), *((3.0, 0.5) if counts is not None else ()))
    given = np.array(numbers, acc) if chance(rng, 0.5) else list(numbers)
    return Update(rule, given, tuple(slots), lag, counts), hyper


def copied(update):
    copy = lambda x: None if x is None else x.copy()  # noqa: E731
    return update._replace(slots=tuple(map(copy, update.slots)), lag=copy(update.lag))


def arrays_of(table, update):
    return [table, *update.slots, *([] if update.lag is None else [update.lag])]


@pytest.mark.parametrize("rule", ["sgd", "adagrad", "row_wise_adagrad", "lazy_adam", "ftrl"])
def test_random_updates(rule, kernels):
    for number, rng in generators(rule):
        try:
            an_update(kernels, rng, rule)
        except Exception as error:
            raise AssertionError(f"call {number}: {error}") from error


def an_update(kernels, rng, rule):
    dtype = str(rng.choice(kernels.dtypes))
    acc = np.float64 if dtype == "float64" else np.float32
    num_rows, n = int(rng.integers(1, 40)), int(rng.integers(0, 2000 if chance(rng, 0.05) else 60))
    table = rng.normal(size=(num_rows, dimension(rng))).astype(DTYPES[dtype])
    indices = rng.integers(0, num_rows, n).astype(rng.choice([np.int32, np.int64]))
    if chance(rng, 0.3):
        indices = np.unique(indices)
        n = len(indices)
    gradient = rng.normal(size=(n, table.shape[1])).astype(DTYPES[dtype])
    update, hyper = random_update(rng, rule, table, acc, dtype)
    before = [x.copy() for x in arrays_of(table, update)]
    if n and chance(rng, 0.2):
        bad = spoiled(rng, indices, num_rows)
        with pytest.raises(IndexError, match=rf"^indices\[{oracle.first_bad(bad, num_rows)}\] = "):
            kernels.sparse_update(table, bad, gradient, update)
        assert same_bits(before, arrays_of(table, update))
        return
    again = table.copy(), copied(update)
    kernels.sparse_update(table, indices, gradient, update)
    kernels.sparse_update(again[0], indices, gradient, again[1])
    after = arrays_of(table, update)
    assert same_bits(after, arrays_of(*again))
    unique, group = np.unique(indices, return_inverse=True)
    absent = np.setdiff1d(np.arange(num_rows), unique)
    assert all(same_bits([new[absent]], [old[absent]]) for new, old in zip(after, before, strict=True))
    g, g_size = oracle.added(group, gradient.astype(np.float64), len(unique))
    rows, *slots = (old[unique].astype(np.float64) for old in before)
    kept = slots[: len(update.slots)]
    want, *want_slots = (oracle.updated(rule, hyper, rows, kept, g)[0], *oracle.updated(rule, hyper, rows, kept, g)[1])
    eps, terms = STEPS[np.dtype(acc).name][0], int(np.bincount(group, minlength=1).max())
    off = (terms + 4) * eps * g_size
    near = [oracle.updated(rule, hyper, rows, kept, g + some) for some in (off, -off)]
    further = np.ones((len(unique), 1))
    if update.counts is not None:
        rare, seen = 3.0, 0.5
        further[:, 0] += rare * 20 / (20 + seen * update.counts[unique])
    spread = sum(np.abs(other[0][0] - want[0]) for other in near) / (64 * eps)
    move, size = further * (want[0] - rows), further * (want[1] + spread)
    close(table[unique], (rows + move, size + np.abs(rows)), 120, acc, dtype)
    for i, (value, value_size) in enumerate(want_slots):
        spread = sum(np.abs(other[1][i][0] - value) for other in near) / (64 * eps)
        close(update.slots[i][unique], (value, value_size + spread), 120, acc, dtype)
    if update.lag is not None:
        close(update.lag[unique], (slots[-1] - move * 1.25, np.abs(slots[-1]) + size * 1.25), 120, acc)


def test_the_fused_update_has_the_bits_of_the_two(kernels):
    rules = ["sgd", "adagrad", "row_wise_adagrad", "lazy_adam", "ftrl"]
    for number, rng in generators("fused"):
        dtype = str(rng.choice(kernels.dtypes))
        acc = np.float64 if dtype == "float64" else np.float32
        table, weights = random_table(rng, dtype)
        indices, values, row_splits, field_splits = random_pairs(rng, len(table), acc, number % 3 == 0, number % 3 == 1)
        options = {"row_splits": row_splits, "field_splits": field_splits, "output": str(rng.choice(OUTPUTS))}
        y, sums, e, linear = kernels.fm_forward(
            table, indices, values, weights=weights, return_embeddings=True, **options
        )
        options |= penalty_of(rng, table, oracle.batch(indices, values, row_splits, field_splits))[0]
        options["d_embeddings"] = rng.normal(size=e.shape).astype(acc) if chance(rng, 0.5) else None
        options["embeddings"] = e if field_splits is not None else None
        rule = str(rng.choice(rules))
        update, _ = random_update(rng, rule, table, acc, dtype)
        of_weights, _ = random_update(rng, rule, weights, acc, dtype)
        more = {"weights": weights, "d_linear": linear} if chance(rng, 0.5) else {}
        unique, rows, _, *weight_rows = kernels.fm_gradient(table, indices, values, sums, y, **options, **more)
        two = table.copy(), copied(update), weights.copy(), copied(of_weights)
        kernels.sparse_update(two[0], unique, rows, two[1])
        if more:
            kernels.sparse_update(two[2], unique, weight_rows[0], two[3])
            more["weights_update"] = of_weights
        if indices.size and chance(rng, 0.2):
            bad, before = spoiled(rng, indices, len(table)), arrays_of(table, copied(update)) + [weights.copy()]
            before[0] = table.copy()
            with pytest.raises(IndexError, match=rf"^indices\[{oracle.first_bad(bad, len(table))}\] = "):
                kernels.fm_update(table, bad, values, sums, y, update, **options, **more)
            assert same_bits(before, [*arrays_of(table, update), weights]), number
            continue
        kernels.fm_update(table, indices, values, sums, y, update, **options, **more)
        assert same_bits(arrays_of(table, update), arrays_of(*two[:2])), number
        assert same_bits(arrays_of(weights, of_weights), arrays_of(*two[2:])), number


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_nothing_is_legal(shape, kernels):
    table, indices = np.ones((5, 4), "f"), np.zeros(shape, np.int64)
    y, sums, e, _ = kernels.fm_forward(table, indices, return_embeddings=True)
    assert not y.any() and sums.shape == (shape[0], 4) and e.shape == (*shape, 4)
    unique, rows, _ = kernels.fm_gradient(table, indices, None, sums, y)
    assert unique.shape == (0,) and rows.shape == (0, 4)
    kernels.fm_update(table, indices, None, sums, y, Update("sgd", (0, 1)))
    kernels.sparse_update(table, unique, rows, Update("sgd", (0, 1)))
    assert (table == 1).all()
    y, _, _, _ = kernels.fm_forward(table, np.zeros(0, np.int64), row_splits=np.zeros(3, np.int64))
    assert y.tolist() == [[0], [0]]


@pytest.mark.parametrize("dim", [1, 3, 4, 7, 8, 16, 33, 64, 128, 130, 260])
def test_many_of_one_row(dim, kernels, rng):
    """Rows that many chunks of pairs share, beside rows of one pair."""
    indices = np.concatenate([np.zeros(3000, np.int64), np.full(700, 5), rng.integers(0, 50, 396)])
    indices = rng.permutation(indices).reshape(512, 8)
    for dtype in kernels.dtypes:
        acc = np.float64 if dtype == "float64" else np.float32
        table = rng.normal(size=(50, dim)).astype(DTYPES[dtype])
        values, g = rng.normal(size=indices.shape).astype(acc), rng.normal(size=(512, 1)).astype(acc)
        y, sums, _, _ = kernels.fm_forward(table, indices, values)
        batch = oracle.batch(indices, values)
        close(y, oracle.forward(table, batch, "scalar")["interaction"], 8 + dim, acc)
        unique, rows, _ = kernels.fm_gradient(table, indices, values, sums, g)
        e = batch.values[:, None] * table.astype(np.float64)[batch.indices]
        want = oracle.gradient(table, batch, "scalar", sums, e, g)
        np.testing.assert_array_equal(unique, want["unique"][0])
        close(rows, want["rows"], 3000, acc, dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, "uint16"])
def test_first_order(dtype, kernels, rng):
    """The weights of the pairs, in the same call; bfloat16 also as its bits."""
    if dtype not in (*kernels.dtypes, "uint16"):
        return
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


def test_embeddings_that_are_needed(kernels, data):
    table, indices, values = data
    y, sums, e, _ = kernels.fm_forward(table, indices, values, field_splits=[0, 1, 4], return_embeddings=True)
    with pytest.raises(ValueError, match="embeddings are needed with field_splits"):
        kernels.fm_gradient(table, indices, values, sums, y, field_splits=[0, 1, 4])
    assert kernels.fm_gradient(table, indices, values, sums, y, embeddings=e, field_splits=[0, 1, 4])[0].size > 0


def test_read_only_inputs_are_fine_and_stay_as_they_are(kernels, data):
    table, indices, values = (a.copy() for a in data)
    for a in (table, indices, values):
        a.setflags(write=False)
    y, sums, _, _ = kernels.fm_forward(table, indices, values)
    kernels.fm_gradient(table, indices, values, sums, y)
    for a, b in zip((table, indices, values), data, strict=True):
        np.testing.assert_array_equal(a, b)
    if kernels.name != "gpu":
        with pytest.raises(ValueError, match="table must be an array to write to"):
            kernels.fm_update(table, indices, values, sums, y, Update("sgd", (0, 1)))


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
            "table must be float32, (float64, )?bfloat16, float16.* in native",
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
def test_arrays_that_are_refused(change, error, message, kernels, data):
    arrays = change(*data)
    if ">" in "".join(a.dtype.byteorder for a in arrays) and kernels.name != "cpu":
        return  # DLPack knows no other byte order
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
def test_arguments_that_are_refused(arguments, error, message, kernels, data):
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
def test_row_splits_that_are_refused(splits, message, kernels, data):
    with pytest.raises(ValueError, match=message):
        kernels.fm_forward(data[0], np.arange(4), row_splits=np.array(splits, np.int64))
    with pytest.raises(TypeError, match="row_splits must be int64"):
        kernels.fm_forward(data[0], np.arange(4), row_splits=np.array([0, 4], np.int32))


def test_a_table_of_more_than_two_to_the_31_rows(kernels):
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
