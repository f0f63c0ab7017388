"""The hash of `surgery.ops.hash`, for Triton kernels. All words are uint32, whose arithmetic wraps."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def words_of(key_pointer, k0, k1, key_is_there):
    """The words of a key: from memory if it is there, else those that the host gave."""
    k0 = tl.load(key_pointer, mask=key_is_there != 0, other=k0)
    k1 = tl.load(key_pointer + 1, mask=key_is_there != 0, other=k1)
    return k0.to(tl.uint32, bitcast=True), k1.to(tl.uint32, bitcast=True)


@triton.jit
def before_last(index, k0, k1):
    """The hash of indices (any integers, taken modulo 2**32) up to its last product: what all examples
    of a batch share."""
    z = index.to(tl.uint32) * 0x9E3779B9 + k0
    z = (z ^ (z >> 17)) * 0xED5AD4BB + k1
    z = (z ^ (z >> 11)) * 0xAC4C1B51
    return z ^ (z >> 15)


@triton.jit
def of_batch(z):
    """The last product: int32, to be compared with a threshold."""
    return (z * 0x31848BAB).to(tl.int32, bitcast=True)


@triton.jit
def for_examples(z):
    """The two words of which each example makes its bits. From `mix`, with what all examples share of
    its last line already done: `other & (m ^ ROUND3)` is `(other & m) ^ (other & ROUND3)`."""
    other = z * 0x31848BAB
    other = other ^ (other >> 16)
    return z ^ (other & 0x31848BAB), other


@triton.jit
def of_example(z, other, multiplier):
    """The last product of an example: int32. `z` and `other` are of `for_examples`."""
    return ((z ^ (other & multiplier)) * multiplier).to(tl.int32, bitcast=True)


@triton.jit
def multiplier_word(example, k0, k1):
    """A hash of an example's number, one to one on even words."""
    z = (example.to(tl.uint32) << 1) * 0x9E3779B9 + (k1 & 0xFFFFFFFE)
    z = (z ^ ((z >> 17) & 0xFFFFFFFE)) * 0xED5AD4BB + (k0 & 0xFFFFFFFE)
    z = (z ^ ((z >> 11) & 0xFFFFFFFE)) * 0xAC4C1B51
    z = (z ^ ((z >> 15) & 0xFFFFFFFE)) * 0x31848BAB
    return z ^ ((z >> 16) & 0xFFFFFFFE)


@triton.jit
def multipliers(example, k0, k1):
    """The multiplier of the last product for examples of these numbers (int32, any shape)."""
    zero = example - example
    return multiplier_word(example, k0, k1) ^ multiplier_word(zero, k0, k1) ^ 0x31848BAB
