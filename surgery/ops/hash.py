"""Random bits as a pure function of (key, index): a counter-based hash in 32-bit integer tensor ops.

    z = index * 0x9E3779B9 + k0
    round 1     z ^= z >> 17    z *= 0xED5AD4BB    z += k1
    round 2     z ^= z >> 11    z *= 0xAC4C1B51
    round 3     z ^= z >> 15    z *= 0x31848BAB

The same formula gives the same bits in eager mode, under `torch.compile`, on CPU and GPU. A key is
64 bits, held as an int32 tensor of shape (2,). Both words enter the hash, at different rounds: if a
key were only combined with the index, the masks of two keys would be permutations of each other.

Rounds and constants are those of `triple32` (C. Wellons, "Prospecting for hash functions"), without
its last step, which only stirs the low half: a mask compares bits with a threshold, and so lives by the
high ones. Two rounds are too few: the index enters by one multiplication, so that a lag is a constant
difference, and there are lags whose difference two rounds do not break. For the same reason two masks
never have keys that differ by a constant: ranks, and parts of a huge weight, have keys that are hashes
of the key (`_derived`).

The examples of a batch share all but round 3, where each has a multiplier of its own, which is a hash
of the key too. It also chooses which bits enter the product, of two words: multipliers alone would
agree wherever a small odd combination of them vanishes modulo 2**32.

`docs/masks.md` says what was tested, and `tests/ops/known_masks.txt` has answers for other
implementations.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from ..torch_private.tracing import is_traced
from .random import drawn, host_seed

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B9

SEGMENT = 1 << 30
"""Entries of a weight that are hashed, or given to one kernel, at a time: the index of each, and those
of a kernel's last block beyond them, fit int32."""

Key = Tensor | tuple[int, int]
"""The key of a mask: int32, shape (2,). Or both words as numbers of the host, as eager code draws them
for a GPU, whose kernels take numbers."""


def on_host(key: Key) -> bool:
    """Whether the host knows its words without waiting for a device."""
    return isinstance(key, tuple) or key.is_cpu


def _signed(word: int, bits: int = 32) -> int:
    """The word of so many bits with the same bits, as a Python int that fits a signed one."""
    word &= (1 << bits) - 1
    return word - (1 << bits) if word >> (bits - 1) else word


_STEP = _signed(_GOLDEN)
_ROUND1, _ROUND2, ROUND3 = map(_signed, (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB))
"""The multipliers of the rounds; examples of a batch have their own in the third."""
_MIXER = 0xD1342543DE82EF95 - (1 << 64)
"""Of `_derived`: from Steele and Vigna, "Computationally easy, spectrally good multipliers" (2021)."""


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
    # In 64 bits, and cut to 32: inductor folds a 32-bit product into its loop index, and C++ compilers
    # assume that such an index does not overflow. Whole vectors of weights came out unhashed.
    return ((index.to(torch.int64) * _STEP) & 0xFFFFFFFF).to(torch.int32)


def mix(indices: Tensor, key: Tensor, multiplier: Tensor | None = None) -> Tensor:
    """The rest of `hash_bits`, for spread indices; the multiplier of an example broadcasts to them."""
    z = indices + key[0]
    z = (z ^ _shift_right(z, 17)) * _ROUND1 + key[1]
    z = (z ^ _shift_right(z, 11)) * _ROUND2
    z = z ^ _shift_right(z, 15)
    other = z * ROUND3
    if multiplier is None:
        return other
    other = other ^ _shift_right(other, 16)
    return (z ^ (other & (multiplier ^ ROUND3))) * multiplier


def mix_into(indices: Tensor, key: Tensor, z: Tensor, spare: Tensor) -> None:
    """`mix` into memory that is there: one step after the other in `z`, with the help of `spare`."""
    torch.add(indices, key[0], out=z)
    z.bitwise_xor_(_shift_right_into(z, 17, spare))
    torch.add(key[1], z, alpha=_ROUND1, out=z)
    z.bitwise_xor_(_shift_right_into(z, 11, spare)).mul_(_ROUND2)
    z.bitwise_xor_(_shift_right_into(z, 15, spare)).mul_(ROUND3)


def _shift_right_into(z: Tensor, n: int, spare: Tensor) -> Tensor:
    return torch.bitwise_right_shift(z, n, out=spare).bitwise_and_((1 << (32 - n)) - 1)


def multipliers(examples: int, key: Tensor) -> Tensor:
    """The multiplier of round 3 for each example: int32, shape (examples,), all odd and different.

    That of example 0 is the one of `hash_bits`, so a single example has the mask of the whole batch.
    """
    # The rounds again, on the 31 bits above the lowest, which every step keeps 0: one to one.
    even = key & -2
    z = spread(torch.arange(examples, dtype=torch.int32, device=key.device) << 1) + even[1]
    z = (z ^ (_shift_right(z, 17) & -2)) * _ROUND1 + even[0]
    z = (z ^ (_shift_right(z, 11) & -2)) * _ROUND2
    z = (z ^ (_shift_right(z, 15) & -2)) * ROUND3
    z = z ^ (_shift_right(z, 16) & -2)
    return z ^ z[:1] ^ ROUND3


@overload
def advance_key(key: Tensor, start: int) -> Tensor: ...
@overload
def advance_key(key: Key, start: int) -> Key: ...
def advance_key(key: Key, start: int) -> Key:
    """The key with which index 0 gives the bits that `key` gives at index `start`.

    Indices repeat after 2**32: from there on, each part of so many weights has a key of its own.
    """
    if start == 0:
        return key
    part = start >> 32
    if isinstance(key, tuple):
        k0, k1 = _derived_words(*key, -part) if part else key
        return _signed(k0 + start * _GOLDEN), k1
    if part:
        key = _derived(key, -part)
    return torch.stack([key[0] + _signed(start * _GOLDEN), key[1]])


def _derived(key: Tensor, number: int) -> Tensor:
    """Another key, for each number: a hash of the key. Positive numbers are ranks, negative ones parts
    of a huge weight."""
    # Few operations, since each takes longer to call than to run, and none for which the host waits.
    factor, summand = _scramble(2 * number) | 1, _scramble(2 * number + 1)
    z = key.to(torch.int64) * factor + summand
    z = z ^ (z >> 32)
    z = z * _MIXER + z.flip(0)
    return (z ^ (z >> 32)).to(torch.int32)


def words(key: Key) -> tuple[int, int]:
    """Both words of a key, as signed integers of 32 bits. Waits for the device, if it is on one."""
    k0, k1 = key if isinstance(key, tuple) else key.tolist()
    return k0, k1


def _derived_words(k0: int, k1: int, number: int) -> tuple[int, int]:
    """`_derived` for a key on the host, in far less time than that takes there."""
    factor, summand = _scramble(2 * number) | 1, _scramble(2 * number + 1)
    z0, z1 = (_signed(word * factor + summand, 64) for word in (k0, k1))
    z0, z1 = z0 ^ (z0 >> 32), z1 ^ (z1 >> 32)
    z0, z1 = _signed(z0 * _MIXER + z1, 64), _signed(z1 * _MIXER + z0, 64)
    return _signed(z0 ^ (z0 >> 32)), _signed(z1 ^ (z1 >> 32))


def _scramble(seed: int) -> int:
    """A signed 64-bit number from any integer: one step of splitmix64 (Steele, Lea and Flood 2014)."""
    z = (seed + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return _signed(z ^ (z >> 31), 64)


def key_from_seed(seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The key of an integer seed: int32, shape (2,). Neighbouring seeds give unrelated keys."""
    return key_tensor(_words_of(seed), device)


def _words_of(seed: int) -> tuple[int, int]:
    # `_scramble`, and `_signed` of both halves, in one function: it is called for each mask on a GPU.
    z = (seed + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    z ^= z >> 31
    return ((z + 0x80000000) & 0xFFFFFFFF) - 0x80000000, (((z >> 32) ^ 0x80000000) - 0x80000000)


def key_tensor(key: Key, device: torch.device | str | None = None) -> Tensor:
    """A key as a tensor: int32, shape (2,); without a device, wherever it is, or on the CPU."""
    if isinstance(key, tuple):
        return torch.tensor(key, dtype=torch.int32, device=device or "cpu")
    return key if device is None else key.to(device)


def draw_key(device: torch.device, rank: int = 0) -> Key:
    """A fresh key from the default generator of `device`.

    `torch.manual_seed` reproduces it, and activation checkpointing restores it with the generator's
    state. `rank` other than 0 is hashed into it, so that processes seeded alike draw different masks.

    On a GPU a draw would be a launch, and the host would not know its result. In eager code the key is
    made there of the generator's seed and offset, on the host.
    """
    seed = host_seed(device)
    if seed is not None:
        drawn_words = _words_of(seed)
        return drawn_words if rank == 0 else _derived_words(*drawn_words, rank)
    key = drawn(torch.randint, -(2**31), 2**31, (2,), dtype=torch.int32, device=device)
    return key if rank == 0 else _of_rank(key, rank)


def draw_key_from(generator: torch.Generator, device: torch.device, rank: int = 0) -> Key:
    """A fresh key for a weight on `device` from any generator: seeded alike, the generator of the CPU
    gives the keys that the default one gives there."""
    where = generator.device
    options = {"dtype": torch.int32, "device": where, "generator": generator}
    key = drawn(torch.randint, -(2**31), 2**31, (2,), **options)
    key = key if rank == 0 else _of_rank(key, rank)
    if device.type == "cpu" or where.type != "cpu" or is_traced():
        return key.to(device)
    return words(key)


def _of_rank(key: Tensor, rank: int) -> Tensor:
    if key.device.type == "cpu" and not is_traced():
        return key_tensor(_derived_words(*words(key), rank))
    return _derived(key, rank)
