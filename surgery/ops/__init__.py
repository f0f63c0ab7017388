"""The operations. Tensors in, tensors out; no modules.

    hash, formula, law       the definition: random bits, the masked weight, and which mask
    mask, linear, example*   the operations: a masked weight, a product with it, a mask for each example
    gaussian*, expect        the same without masks: mean and variance, draws, expectations
    engine, switch           how a formula is run: by a kernel, or as it is
    cpu/, gpu/               the kernels, one room per device

The other files draw random numbers and answer questions about tensors.
"""

from .example import example_linear, example_vector
from .expect import (
    expectation,
    expectation_by_draws,
    gauss_hermite,
    has_closed_form,
    register_closed_form,
)
from .extension.loading import release
from .formula import keep_mask, masked_formula
from .gaussian import (
    average,
    gaussian_sample,
    linear_moments,
    moments_of,
    safe_sqrt,
    variance_of_product,
)
from .gaussian_linear import gaussian_linear
from .hash import draw_key, hash_bits, key_from_seed
from .law import Law, Layout, ratio_of
from .linear import masked_linear
from .mask import drop_into, drop_weight

__all__ = [
    "Law",
    "Layout",
    "average",
    "draw_key",
    "drop_into",
    "drop_weight",
    "example_linear",
    "example_vector",
    "expectation",
    "expectation_by_draws",
    "gauss_hermite",
    "gaussian_linear",
    "gaussian_sample",
    "has_closed_form",
    "hash_bits",
    "keep_mask",
    "key_from_seed",
    "linear_moments",
    "masked_formula",
    "masked_linear",
    "moments_of",
    "ratio_of",
    "register_closed_form",
    "release",
    "safe_sqrt",
    "variance_of_product",
]
