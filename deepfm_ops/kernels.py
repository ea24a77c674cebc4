"""The kernels on NumPy arrays, without TensorFlow, in place and without the GIL.

`fm_forward` and `fm_gradient` are the op and its gradient, `csrc/kernels/fm.h` is their contract; that of
`top_products` is `csrc/kernels/top_products.h`.
"""

try:
    from deepfm_ops._kernels import fm_forward, fm_gradient, hash_buckets, head, isa, read_rows, set_isa, top_products
except ImportError as error:
    raise ImportError(
        f"the kernels are not there: deepfm_ops was installed without its compiled part ({error})"
    ) from error

__all__ = ["fm_forward", "fm_gradient", "hash_buckets", "head", "isa", "read_rows", "set_isa", "top_products"]
