"""The kernels without TensorFlow, in place and without the GIL: on NumPy arrays, and on a GPU's of other libraries.

`fm_forward` and `fm_gradient` are the op and its gradient, `sparse_update` and `fm_update` what an optimizer does with
it; `csrc/kernels/fm.h` and `sparse_update.h` are their contract, and `top_products.h` that of `top_products`.

Arrays on a CUDA device are taken from any library that speaks DLPack, on the current stream of the table's, PyTorch or
CuPy; results are arrays of that library. All arrays of a call lie on one device. There, tables are float32, bfloat16 or
float16, `threads` means nothing, and every call waits until it knows that its indices and row_splits were in range. To
wait once for several calls, give them a `report=Report(table)` and call its `check()`.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from deepfm_ops import gpu_arrays

try:
    from deepfm_ops import _kernels
    from deepfm_ops._kernels import hash_buckets, head, isa, read_rows, set_isa, top_products
except ImportError as error:
    raise ImportError(
        f"the kernels are not there: deepfm_ops was installed without its compiled part ({error})"
    ) from error

__all__ = [
    "Report",
    "Update",
    "fm_forward",
    "fm_gradient",
    "fm_update",
    "hash_buckets",
    "head",
    "isa",
    "read_rows",
    "set_isa",
    "sparse_update",
    "top_products",
]
_CPU = 1  # in DLPack


class Update(NamedTuple):
    """An optimizer's rule, its numbers for this step, and what it keeps with the table.

    Attributes:
        rule: "sgd", "adagrad", "row_wise_adagrad", "lazy_adam" or "ftrl".
        hyper: the numbers of the rule's formula in `csrc/kernels/sparse_update.h`, the decay first; with a lag
            1 / D_(t-1), with counts rare and seen after them. A sequence, or an array of float32 (float64 of a float64
            table).
        slots: arrays of the table's dtype and shape, [V] of row_wise_adagrad; written to.
        lag: of the averaged rows, an array like a slot, or None; written to.
        counts: int32 [V], how often the features occur, or None.

    """

    rule: str
    hyper: Any
    slots: Any = ()
    lag: Any = None
    counts: Any = None


@functools.cache
def _cuda():
    try:
        from deepfm_ops import _cuda
    except ImportError as error:
        raise ImportError(
            "arrays on a GPU need deepfm_ops to be built where nvcc is: install it with DEEPFM_OPS_CUDA=1 "
            f"from its source ({error})"
        ) from error
    return _cuda


class Report:
    """Collects what calls on a GPU find wrong, so that none of them has to wait.

    After the first error no table or slot is written to any more, by any call that has this report; other results are
    unspecified. The calls are about the same indices and rows, such as a batch's forward and update.

    Args:
        table: an array on the device.

    """

    def __init__(self, table, _module=None):
        self._module, library = _module or _cuda(), gpu_arrays.library_of(table)
        self.about = None  # what the calls were about: shape of the indices, V, B
        with library.context:
            self.words = self._module.new_report(library)

    def check(self):
        """Waits for the calls, and raises the first error they found.

        Raises:
            IndexError: an index outside [0, V).
            ValueError: row_splits that do not fit.

        """
        words = self.words.tolist()
        if self.about is not None:
            self._module.check_report(words, *self.about)


def call_on_gpu(module, name, *arguments, report=None, **options):
    """Calls a function of `_cuda`, on the table's device."""
    library = gpu_arrays.library_of(arguments[0] if arguments else options["table"])
    with library.context:
        return getattr(module, name)(library, report, *arguments, **options)


def _on_gpu(array):
    return (
        not isinstance(array, np.ndarray)
        and hasattr(type(array), "__dlpack_device__")
        and array.__dlpack_device__()[0] != _CPU
    )


def _by_place(on_cpu):
    """The function for arrays of either place: of a GPU if any of them is there."""
    name = on_cpu.__name__

    @functools.wraps(on_cpu)
    def function(*arguments, **options):
        table = arguments[0] if arguments else options.get("table")
        try:  # of an array of NumPy nothing more is asked: a call for one sample takes but a few microseconds
            if isinstance(table, np.ndarray) or not _on_gpu(table):
                return on_cpu(*arguments, **options)
        except TypeError:
            if not any(map(_on_gpu, [*arguments, *options.values()])):
                raise
        return call_on_gpu(_cuda(), name, *arguments, **options)

    return function


fm_forward = _by_place(_kernels.fm_forward)
fm_gradient = _by_place(_kernels.fm_gradient)
sparse_update = _by_place(_kernels.sparse_update)
fm_update = _by_place(_kernels.fm_update)
