"""The operations: random bits, masks, and the masked weight. Tensors in, tensors out; no modules."""

from .hash import draw_key, hash_bits, key_from_seed
from .mask import Law, Layout, drop_weight, keep_mask, masked_formula

__all__ = [
    "Law",
    "Layout",
    "draw_key",
    "drop_weight",
    "hash_bits",
    "keep_mask",
    "key_from_seed",
    "masked_formula",
]
