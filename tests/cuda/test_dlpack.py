"""Arrays of other libraries: what DLPack says of them, where they lie, reports, and when nobody waits."""

import numpy as np
import pytest
from implementations import Emulated
from tensors import POISON, Library, Tensor

from deepfm_ops import gpu_arrays, kernels
from deepfm_ops.kernels import Update

emulated = Emulated()


@pytest.fixture
def data(rng):
    """Table, indices, values, as tensors."""
    arrays = rng.normal(size=(50, 6)).astype("f"), rng.integers(0, 50, (7, 4)), rng.normal(size=(7, 4)).astype("f")
    return [Tensor(x) for x in arrays]


def call(name, *arguments, **options):
    return emulated.call(name, *arguments, **options)


def report(table):
    return kernels.Report(table, emulated.module)


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("offset", [0, 64])
def test_forms_of_a_capsule(version, offset, data):
    """With versions and without, with strides and without, with an offset."""
    want = call("fm_forward", *data)[0].array
    given = [Tensor(x.array, version=version, offset=offset) for x in data]
    np.testing.assert_array_equal(call("fm_forward", *given)[0].array, want)
    assert all(set(x.streams) == {None} for x in given)


def test_strides_of_a_single_item_mean_nothing(data):
    table, indices, values = (x.array[:1] for x in data)
    wide = np.lib.stride_tricks.as_strided(table, strides=(4096, 4))
    given = wide, indices % 1, values
    want = call("fm_forward", *map(Tensor, (table, indices % 1, values)))[0].array
    np.testing.assert_array_equal(call("fm_forward", *map(Tensor, given))[0].array, want)


@pytest.mark.parametrize(
    ("place", "change", "error", "message"),
    [
        (0, {"device": (2, 0)}, ValueError, "table must be on the CPU, got cuda:0"),
        (1, {"device": (2, 1)}, ValueError, "indices must be on the device of table, the CPU, got cuda:1"),
        (2, {"device": (10, 0)}, ValueError, "values must be on .*, got a device of DLPack's type 10"),
        (2, {"version": 2}, ValueError, "values speaks DLPack 2, only 1 is known"),
        (2, {"lanes": 2}, TypeError, "values must be float32 in native byte order, got float32 by 2"),
    ],
)
def test_tensors_that_are_refused(place, change, error, message, data):
    given = [Tensor(x.array, **change) if i == place else x for i, x in enumerate(data)]
    with pytest.raises(error, match=message):
        call("fm_forward", *given)
    sums, g = Tensor(np.zeros((7, 6), "f")), Tensor(np.zeros((7, 1), "f"))
    before = data[0].array.copy()
    with pytest.raises(error, match=message):
        call("fm_update", *given, sums, g, Update("sgd", (0, 1)))
    np.testing.assert_array_equal(data[0].array, before)


def test_things_that_are_no_tensors(data):
    table, indices, values = data
    with pytest.raises(TypeError, match="indices must be an array that speaks DLPack, got list"):
        call("fm_forward", table, [[1, 2]])
    with pytest.raises(TypeError, match="table must be an array of PyTorch, CuPy or NumPy, got list"):
        call("fm_forward", [[1.0]], indices)
    with pytest.raises(TypeError, match="table must be float32, bfloat16, float16, .*, got complex|type 5"):
        call("fm_forward", Tensor(table.array.astype(np.complex64)), indices)
    with pytest.raises(TypeError, match="values must be float32 in native byte order, got bool"):
        call("fm_forward", table, indices, Tensor(np.ones((7, 4), bool)))


def test_results_lie_in_poisoned_memory(data, rng):
    """What no kernel wrote would show: here they are looked at as bytes."""
    table, indices, values = data
    weights = Tensor(rng.normal(size=(50, 1)).astype("f"))
    for options in ({}, {"field_splits": [0, 1, 1, 4]}, {"output": "vector"}, {"output": "sum"}):
        y, sums, e, linear = call(
            "fm_forward", table, indices, values, weights=weights, return_embeddings=True, **options
        )
        more = {**options, "embeddings": e, "need_values": True}
        gradient = call("fm_gradient", table, indices, values, sums, y, weights=weights, d_linear=linear, **more)
        for result in (y, sums, e, linear, *gradient):
            assert not (result.array.view(np.uint32) == POISON * 0x01010101).any()


@pytest.mark.parametrize("rule", ["sgd", "lazy_adam"])
def test_an_error_writes_nothing(rule, data):
    table, indices, values = data
    y, sums, _, _ = call("fm_forward", *data)
    bad = indices.array.copy()
    bad[3, 2] = 50
    slots = tuple(Tensor(np.ones((50, 6), "f")) for _ in range(2 if rule == "lazy_adam" else 0))
    update = Update(rule, (0, 1) if rule == "sgd" else (0, 0.1, 0.1, 0.1, 1e-7), slots)
    before = table.array.copy()
    with pytest.raises(IndexError, match=r"^indices\[3,2\] = 50 is not in \[0, 50\)$"):
        call("fm_update", table, Tensor(bad), values, sums, y, update)
    gradient = Tensor(np.ones((28, 6), "f"))
    with pytest.raises(IndexError, match=r"^indices\[14\] = 50 is not in \[0, 50\)$"):
        call("sparse_update", table, Tensor(bad.ravel()), gradient, update)
    splits, flat = Tensor(np.array([0, 5, 3, 28])), Tensor(indices.array.ravel())
    sums, y = Tensor(sums.array[:3]), Tensor(y.array[:3])
    with pytest.raises(ValueError, match=r"row_splits must not decrease, got row_splits\[1\] = 5 and row_splits\[2\]"):
        call("fm_update", table, flat, None, sums, y, update, row_splits=splits)
    np.testing.assert_array_equal(table.array, before)
    assert all((slot.array == 1).all() for slot in slots)


def test_a_report_of_several_calls(data):
    table, indices, values = data
    good = report(table)
    y, sums, _, _ = call("fm_forward", *data, report=good)
    call("fm_update", *data, sums, y, Update("sgd", (0, 0.5)), report=good)
    good.check()
    after, bad = table.array.copy(), indices.array.copy()
    bad[6, 3] = -1
    late = report(table)
    y, sums, _, _ = call("fm_forward", table, Tensor(bad), values, report=late)  # raises nothing
    call("fm_update", *data, sums, y, Update("sgd", (0, 0.5)), report=late)  # nor this one, whose indices are right
    np.testing.assert_array_equal(table.array, after)
    for _ in range(2):
        with pytest.raises(IndexError, match=r"^indices\[6,3\] = -1 is not in \[0, 50\)$"):
            late.check()
    with pytest.raises(ValueError, match="report must be of calls with the same indices, rows and samples"):
        call("fm_forward", table, Tensor(bad[:3]), None, report=late)
    with pytest.raises(IndexError, match=r"^indices\[6,3\] = -1"):  # whose sizes only an answer can tell
        call("fm_gradient", table, Tensor(bad), values, sums, y, report=report(table))
    report(table).check()


def test_a_gradient_after_an_error(data):
    late, bad = report(data[0]), Tensor(data[1].array + 50)
    y, sums, _, _ = call("fm_forward", data[0], bad, report=late)
    with pytest.raises(IndexError, match=r"^indices\[0,0\] = \d+ is not in"):
        call("fm_gradient", *data, sums, y, report=late)


def test_numbers_on_the_device(data):
    """The numbers of an update may be an array: then they are not copied from the host."""
    table, indices, values = data
    y, sums, _, _ = call("fm_forward", *data)
    tables = [Tensor(table.array.copy()) for _ in range(2)]
    for t, hyper in zip(tables, ((0, 0.5), Tensor(np.array([0, 0.5], "f"))), strict=True):
        call("fm_update", t, indices, values, sums, y, Update("sgd", hyper))
    np.testing.assert_array_equal(tables[0].array, tables[1].array)
    for hyper, error, message in [
        ((0,), ValueError, r"hyper must have shape \(2,\), got \(1,\)"),
        (Tensor(np.zeros(2)), TypeError, "hyper must be float32 in native byte order, got float64"),
    ]:
        with pytest.raises(error, match=message):
            call("fm_update", *data, sums, y, Update("sgd", hyper))


@pytest.mark.parametrize(
    ("update", "error", "message"),
    [
        (Update("adam", (0, 1)), ValueError, "rule must be one of sgd, .*, got 'adam'"),
        (Update("adagrad", (0, 1, 1)), ValueError, "adagrad has 1 slots, got 0"),
        (
            Update("adagrad", (0, 1, 1), (np.zeros((50, 5), "f"),)),
            ValueError,
            r"slots\[0\] must have shape \(50, 6\), got",
        ),
        (
            Update("adagrad", (0, 1, 1), (np.zeros((50, 6), "e"),)),
            TypeError,
            r"slots\[0\] must have the dtype of table, float32, got float16",
        ),
        (
            Update("row_wise_adagrad", (0, 1, 1), (np.zeros((50, 6), "f"),)),
            ValueError,
            r"slots\[0\] must have shape \(50,\), got",
        ),
        (Update("sgd", (0, 1, 1), (), np.zeros((50, 5), "f")), ValueError, r"lag must have shape \(50, 6\), got"),
        (
            Update("sgd", (0, 1, 1, 1), (), None, np.zeros(49, "i4")),
            ValueError,
            r"counts must have shape \(50,\), got \(49,\)",
        ),
    ],
)
@pytest.mark.parametrize("on", ["cpu", "emulated"])
def test_updates_that_are_refused(update, error, message, on, data):
    table = data[0].array
    gradient, indices = np.ones((3, 6), "f"), np.arange(3)
    run = emulated.sparse_update if on == "emulated" else kernels.sparse_update
    with pytest.raises(error, match=message):
        run(table, indices, gradient, update)
    with pytest.raises(ValueError, match=r"gradient must have shape \(3, 6\), got \(2, 6\)"):
        run(table, indices, gradient[:2], Update("sgd", (0, 1)))


def test_who_is_asked_for_what():
    """A table of a known library, or a subclass of one; a call is for a GPU if one of its arrays is there."""

    class Mine(np.ndarray):
        pass

    assert type(gpu_arrays.library_of(np.zeros(3).view(Mine))) is gpu_arrays.NumPy
    assert type(gpu_arrays.library_of(Tensor(np.zeros(3)))) is Library
    refusals = "arrays on a GPU need deepfm_ops|table must be on a CUDA device"  # of a build without CUDA, and with it
    with pytest.raises((ImportError, ValueError), match=refusals):
        kernels.fm_forward(np.zeros((3, 2), "f"), Tensor(np.zeros((1, 1), int), device=(2, 0)))


def test_numpy_through_the_emulation(data):
    """NumPy speaks DLPack itself."""
    arrays = [x.array for x in data]
    y, sums, _, _ = call("fm_forward", *arrays)
    assert isinstance(y, np.ndarray)
    np.testing.assert_allclose(y, kernels.fm_forward(*arrays)[0], rtol=1e-5, atol=1e-5)
    unique, rows, _ = call("fm_gradient", *arrays, sums, y)
    assert isinstance(unique, np.ndarray) and unique.base is None
    want = kernels.fm_gradient(*arrays, sums, y)
    np.testing.assert_array_equal(unique, want[0])
    np.testing.assert_allclose(rows, want[1], rtol=1e-4, atol=1e-4)


def test_pytorch(data):
    torch = pytest.importorskip("torch", reason="PyTorch is no dependency; bench/gpu/run.sh --emulated runs this")
    table, indices, values = (torch.from_numpy(x.array.copy()) for x in data)
    for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)):
        narrow = table.to(dtype, copy=True)
        y, sums, e, _ = call("fm_forward", narrow, indices, values, return_embeddings=True)
        assert y.dtype == sums.dtype == e.dtype == torch.float32
        want = kernels.fm_forward(*(x.array for x in data))[0]
        np.testing.assert_allclose(y, want, rtol=bound, atol=bound * np.abs(want).max())
        unique, rows, _ = call("fm_gradient", narrow, indices, values, sums, y)
        assert rows.dtype == dtype and torch.equal(unique, torch.unique(indices))
        two = narrow.clone()
        call("sparse_update", two, unique, rows, Update("sgd", torch.tensor([0, 0.5])))
        late = report(narrow)
        call("fm_update", narrow, indices, values, sums, y, Update("sgd", (0, 0.5)), report=late)
        late.check()
        assert torch.equal(narrow, two)
    with pytest.raises(BufferError, match="detach"):
        call("fm_forward", table.requires_grad_(), indices)
    with pytest.raises(ValueError, match=r"table must be C-contiguous, got strides \(24, 8\)"):
        call("fm_forward", table.detach()[:, ::2], indices)
