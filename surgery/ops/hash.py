"""Random bits as a pure function of (key, index): a counter-based hash in 32-bit integer tensor ops.

The same formula gives the same bits in eager mode, under `torch.compile`, on CPU and GPU. A key is
64 bits, held as an int32 tensor of shape (2,). Both words enter the hash, at different rounds: if a
key were only combined with the index, the masks of two keys would be permutations of each other.

Rounds and constants are those of the `lowbias32` family (C. Wellons, "Prospecting for hash
functions"), without its last step, which only stirs the low half: a mask compares bits with a
threshold, and so lives by the high ones. `tests/ops/test_hash.py` holds the statistics that it passes
and weaker ones fail.

The examples of a batch share all of it but the last product, by an odd multiplier of their own
(multiply-shift: Dietzfelbinger et al. 1997): one hash of a weight serves all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..caching import cached
from .random import drawn

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B9


def _signed(word: int) -> int:
    """The 32-bit word with the same bits, as a Python int that fits int32."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word


_STEP = _signed(_GOLDEN)
_ROUND1 = _signed(0x7FEB352D)
LAST = _signed(0x846CA68B)
"""The last factor of the hash, but for the examples of a batch that have their own."""


def _shift_right(z: Tensor, n: int) -> Tensor:
    """Logical right shift of int32 (torch's `>>` on int32 copies the sign bit)."""
    return (z >> n) & ((1 << (32 - n)) - 1)


def hash_bits(index: Tensor, key: Tensor) -> Tensor:
    """Random bits for each index.

    Args:
        index: int32, any shape. Arithmetic wraps, so indices are taken modulo 2**32.
        key: int32, shape (2,), from `draw_key` or `key_from_seed`.

    Returns:
        int32, the shape of `index`, uniform over all 2**32 values. The upper half of the bits is
        random; the lower half refines it, so that comparisons have a resolution of 2**-32.
    """
    return mix(spread(index), key)


def spread(index: Tensor) -> Tensor:
    """The part of `hash_bits` before the key enters: the index times an odd constant, modulo 2**32."""
    # 64 bits and a mask, because inductor folds a 32-bit product into its loop index, whose overflow
    # C++ compilers assume away: whole lanes came out unhashed.
    return ((index.to(torch.int64) * _STEP) & 0xFFFFFFFF).to(torch.int32)


def mix(places: Tensor, key: Tensor, multiplier: Tensor | int = LAST) -> Tensor:
    """The rest of `hash_bits`, for spread indices; the multiplier of an example broadcasts to them."""
    z = places + key[0]
    z = (z ^ _shift_right(z, 16)) * _ROUND1 + key[1]
    return (z ^ _shift_right(z, 15)) * multiplier


def mix_into(places: Tensor, key: Tensor, z: Tensor, spare: Tensor) -> None:
    """`mix` into memory that is there: one step after the other in `z`, with the help of `spare`."""
    torch.add(places, key[0], out=z)
    z.bitwise_xor_(_shift_right_into(z, 16, spare))
    torch.add(key[1], z, alpha=_ROUND1, out=z)
    z.bitwise_xor_(_shift_right_into(z, 15, spare)).mul_(LAST)


def _shift_right_into(z: Tensor, n: int, spare: Tensor) -> Tensor:
    return torch.bitwise_right_shift(z, n, out=spare).bitwise_and_((1 << (32 - n)) - 1)


def multipliers(examples: int, device: torch.device) -> Tensor:
    """The last factor of the hash for each example: int32, shape (examples,), all odd and different.

    That of example 0 is the one of `hash_bits`, so a single example has the mask of the whole batch.
    """
    # A hash of the 31 bits above the lowest, one to one: every step keeps the lowest bit 0.
    even = spread(torch.arange(examples, dtype=torch.int32, device=device) << 1)
    even = (even ^ (_shift_right(even, 16) & -2)) * _ROUND1
    return (even ^ (_shift_right(even, 15) & -2)) * _ROUND1 ^ LAST


def advance_key(key: Tensor, start: int) -> Tensor:
    """The key with which index 0 gives the bits that `key` gives at index `start`.

    `start` may exceed 2**32; the high part then enters the second round, so that parts of a huge
    weight do not repeat each other.
    """
    if start == 0:
        return key
    words = [_signed(start * _GOLDEN), _signed((start >> 32) * _GOLDEN)]
    return key + torch.tensor(words, dtype=torch.int32, device=key.device)


def _scramble(seed: int) -> tuple[int, int]:
    """Two 32-bit words from any integer: one step of splitmix64 (Steele, Lea and Flood 2014)."""
    z = (seed + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    z ^= z >> 31
    return _signed(z), _signed(z >> 32)


def key_from_seed(seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The key of an integer seed: int32, shape (2,). Neighbouring seeds give unrelated keys."""
    return torch.tensor(_scramble(seed), dtype=torch.int32, device=device)


@cached
def _rank_words(rank: int) -> tuple[int, int]:
    return _scramble(rank)


def draw_key(device: torch.device, rank: int = 0) -> Tensor:
    """A fresh key from the default generator of `device`: int32, shape (2,).

    `torch.manual_seed` reproduces it, and activation checkpointing restores it with the generator's
    state. `rank` other than 0 is mixed in, so that processes seeded alike draw different masks.
    """
    key = drawn(torch.randint, -(2**31), 2**31, (2,), dtype=torch.int32, device=device)
    if rank == 0:
        return key
    return key + torch.tensor(_rank_words(rank), dtype=torch.int32, device=device)
