"""The implementations of the kernels' calls, all with NumPy arrays in and out, so that one test serves them all.

cpu: NumPy's. emulated: the GPU's kernels on the CPU, through DLPack. gpu: the same on a GPU, through PyTorch, where
DEEPFM_OPS_TEST_GPU=1 says so, and then no other.
"""

import functools
import os

import emulated_module
import ml_dtypes
import numpy as np
import tensors

from deepfm_ops import kernels

WRITING = ("sparse_update", "fm_update")


class Cpu:
    name = "cpu"
    dtypes = ("float32", "float64", "bfloat16", "float16")
    to = staticmethod(lambda array: array)  # of its library
    back = staticmethod(lambda array: array)

    def call(self, name, *arguments, **options):
        return getattr(kernels, name)(*arguments, **options)

    def __getattr__(self, name):
        def call(*arguments, **options):
            moved = {}

            def to(x):
                if isinstance(x, np.ndarray):
                    if id(x) not in moved:
                        moved[id(x)] = x, self.to(x)
                    return moved[id(x)][1]
                if isinstance(x, kernels.Update):
                    return kernels.Update(*map(to, x))
                return [to(y) for y in x] if isinstance(x, list | tuple) else x

            try:
                results = self.call(name, *map(to, arguments), **{key: to(x) for key, x in options.items()})
            finally:
                for array, there in moved.values():
                    if name in WRITING and array.flags.writeable:
                        array[...] = self.back(there)
            return results and tuple(None if x is None else self.back(x) for x in results)

        return call


class Emulated(Cpu):
    name = "emulated"
    dtypes = ("float32", "bfloat16", "float16")
    to = staticmethod(tensors.Tensor)
    back = staticmethod(lambda tensor: tensor.array)
    module = functools.cached_property(lambda self: emulated_module.load())

    def call(self, name, *arguments, **options):
        return kernels.call_on_gpu(self.module, name, *arguments, **options)


class Gpu(Cpu):
    name = "gpu"
    dtypes = ("float32", "bfloat16", "float16")

    @staticmethod
    def to(array):
        import torch

        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).cuda().view(torch.bfloat16)
        return torch.from_numpy(np.array(array)).cuda()

    @staticmethod
    def back(tensor):
        import torch

        if tensor.dtype == torch.bfloat16:
            return tensor.cpu().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.cpu().numpy()


ALL = [Gpu()] if os.environ.get("DEEPFM_OPS_TEST_GPU") == "1" else [Cpu(), Emulated()]
