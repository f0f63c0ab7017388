"""Hashes that look random and are not: the statistics must reject each of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from surgery.ops.hash import key_from_seed, mix, spread

from ..internals import shift_right, signed

OLD1, OLD2 = signed(0x7FEB352D), signed(0x846CA68B)
"""Multipliers of `lowbias32`, which has two rounds."""


def index_xor(index: Tensor, key: Tensor) -> Tensor:
    """lowbias32(index xor k0)."""
    z = index ^ key[0]
    z = (z ^ shift_right(z, 16)) * OLD1
    z = (z ^ shift_right(z, 15)) * OLD2
    return z ^ shift_right(z, 16)


def two_xors(index: Tensor, key: Tensor) -> Tensor:
    """The same, with k1 xored in between the rounds."""
    z = index ^ key[0]
    z = (z ^ shift_right(z, 16)) * OLD1
    z = z ^ key[1]
    z = (z ^ shift_right(z, 15)) * OLD2
    return z ^ shift_right(z, 16)


def two_rounds(index: Tensor, key: Tensor, multiplier: Tensor | int = OLD2) -> Tensor:
    """A round before k1 and one after it: this library's first hash."""
    z = spread(index) + key[0]
    z = (z ^ shift_right(z, 16)) * OLD1 + key[1]
    return (z ^ shift_right(z, 15)) * multiplier


def fixed_multipliers(examples: int) -> Tensor:
    """Of the examples of a batch, the same for every key: that of `two_rounds` for the first."""
    even = spread(torch.arange(examples, dtype=torch.int32) << 1)
    even = (even ^ (shift_right(even, 16) & -2)) * OLD1
    return (even ^ (shift_right(even, 15) & -2)) * OLD1 ^ OLD2


def only_multiplied(multiplier: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Three rounds, of which an example has nothing but the multiplier of the third for itself."""
    inverse = signed(pow(0x31848BAB, -1, 1 << 32))
    return lambda index, key: mix(spread(index), key) * inverse * multiplier


def added_rank(key: Tensor, rank: int) -> Tensor:
    """A constant for each rank, added to the key."""
    return key if rank == 0 else key + key_from_seed(rank)
