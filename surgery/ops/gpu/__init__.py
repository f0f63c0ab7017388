"""Kernels for the GPU, in Triton: what `cpu/` is for the CPU.

    launch.py               which tensors they take, and how one is launched at little cost to the host
    hash_kernels.py         the hash of `hash.py`, for the kernels
    masks.py                mask and apply                       (kernels in mask_kernels.py)
    products.py             a masked weight for each example     (kernels in product_kernels.py)
    gaussians.py            between the products of a Gaussian pre-activation (gaussian_kernels.py)
    expectations.py         activations of a Gaussian            (expect_kernels.py)
    numbers_kernels.py      rounding, roots and quotients, for the kernels

A file of kernels imports triton, which comes with torch's builds for a GPU; it is imported when the
first kernel is launched, by `launch.Kernel`. Nothing here is of one vendor. The kernels have the bits
of the formulas they stand for; on machines without a GPU, tests run them in Triton's interpreter, and
compile them for GPUs of NVIDIA and AMD.
"""

from .expectations import expect
from .gaussians import Factors, add_twice, draw, factors
from .launch import is_there, reads, takes
from .masks import drop_shared, masked
from .products import example_gradients, example_product

__all__ = [
    "Factors",
    "add_twice",
    "draw",
    "drop_shared",
    "example_gradients",
    "example_product",
    "expect",
    "factors",
    "is_there",
    "masked",
    "reads",
    "takes",
]
