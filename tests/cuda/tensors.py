"""A library of arrays that is no more than what DLPack asks: of any dtype, on any device that it says."""

import contextlib
import ctypes

import ml_dtypes
import numpy as np

from deepfm_ops import gpu_arrays

POISON = 0xCB
_CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    _fields_ = [("tensor", _DLTensor), ("manager", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class _Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    ]


class Tensor:
    """An array, as DLPack shows it.

    Args:
        array: of NumPy or ml_dtypes; the memory is shared.
        device: what it claims to be on.
        version: the major version of its capsules; 0: those from before the versions, whose __dlpack__ knows none.
        offset: bytes that stand in the capsule as an offset.
        lanes: items per item.

    """

    def __init__(self, array, device=(1, 0), version=1, offset=0, lanes=1):
        self.array, self.device, self.version, self.offset, self.lanes = array, device, version, offset, lanes
        self.streams, self._kept = [], []

    shape = property(lambda self: self.array.shape)

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, stream=None, **more):
        if not self.version and more:
            raise TypeError("__dlpack__() got an unexpected keyword argument")
        self.streams.append(stream)
        a, dims = self.array, ctypes.c_int64 * self.array.ndim
        code = 4 if a.dtype == ml_dtypes.bfloat16 else _CODES[a.dtype.kind]
        shape, strides = dims(*a.shape), dims(*(s // a.itemsize for s in a.strides))
        pointers = (
            ctypes.addressof(shape),
            None if a.flags.c_contiguous and not self.offset else ctypes.addressof(strides),
        )
        numbers = code, a.itemsize * 8, self.lanes, *pointers, self.offset
        tensor = _DLTensor(a.ctypes.data - self.offset, *self.device, a.ndim, *numbers)
        if self.version:
            managed = _Versioned(self.version, 0, None, None, 0 if a.flags.writeable else 1, tensor)
        else:
            managed = _Managed(tensor, None, None)
        self._kept.append((shape, strides, managed))
        return _new_capsule(ctypes.addressof(managed), b"dltensor_versioned" if self.version else b"dltensor", None)

    def tolist(self):
        return self.array.tolist()

    def item(self):
        return self.array.item()


class Library:
    """Of a Tensor; what it makes is poisoned."""

    def __init__(self, table):
        self.device, self.stream, self.context = table.__dlpack_device__(), 0, contextlib.nullcontext()

    def empty(self, shape, dtype):
        dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
        return Tensor(np.full(int(np.prod(shape)) * dtype.itemsize, POISON, np.uint8).view(dtype).reshape(shape))

    def upload(self, numbers, dtype):
        return Tensor(np.array(numbers, dtype))

    def part(self, buffer, begin, size):
        return Tensor(buffer.array[begin : begin + size].view(np.int64))

    def copy(self, tensor):
        return Tensor(tensor.array.copy())


gpu_arrays.LIBRARIES["tensors"] = Library
