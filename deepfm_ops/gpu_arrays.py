"""What the kernels on a GPU ask of the library that an array is from: its stream, memory, and copies."""

import contextlib
import sys

import numpy as np


class PyTorch:
    """Of a tensor."""

    def __init__(self, table):
        self._torch = torch = sys.modules["torch"]
        self._on, on_gpu = table.device, table.is_cuda
        self.device = table.__dlpack_device__()
        self.stream = torch.cuda.current_stream(table.device).cuda_stream if on_gpu else 0
        self.context = torch.cuda.device(table.device) if on_gpu else contextlib.nullcontext()

    def empty(self, shape, dtype):
        return self._torch.empty(shape, dtype=getattr(self._torch, dtype), device=self._on)

    def upload(self, numbers, dtype):
        """A few numbers, without waiting for the device."""
        pinned = self._on.type == "cuda"
        host = self._torch.tensor(numbers, dtype=getattr(self._torch, dtype), pin_memory=pinned)
        return host.to(self._on, non_blocking=True)

    def part(self, buffer, begin, size):
        """These bytes of a buffer, as int64."""
        return buffer[begin : begin + size].view(self._torch.int64)

    def copy(self, array):
        return array.clone()


class NumPy:
    """Of an array: only the emulated kernels take it."""

    module = np

    def __init__(self, table):
        self.device, self.stream, self.context = table.__dlpack_device__(), 0, contextlib.nullcontext()

    def empty(self, shape, dtype):
        return self.module.empty(shape, dtype)

    def upload(self, numbers, dtype):
        return self.module.asarray(np.asarray(numbers, dtype))

    def part(self, buffer, begin, size):
        return buffer[begin : begin + size].view(np.int64)

    def copy(self, array):
        return array.copy()


class CuPy(NumPy):
    """Of an array."""

    def __init__(self, table):
        self.module = cupy = sys.modules["cupy"]
        self.device, self.context = table.__dlpack_device__(), table.device
        with table.device:
            self.stream = cupy.cuda.get_current_stream().ptr


LIBRARIES = {"torch": PyTorch, "cupy": CuPy, "numpy": NumPy}


def library_of(table):
    """The library of a table.

    Raises:
        TypeError: it is not known here how to make arrays of that kind.

    """
    for kind in type(table).__mro__:
        library = LIBRARIES.get(kind.__module__.partition(".")[0])
        if library:
            return library(table)
    raise TypeError(f"table must be an array of PyTorch, CuPy or NumPy, got {type(table).__name__}")
