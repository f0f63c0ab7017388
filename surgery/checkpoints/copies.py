"""Which tensors of a checkpoint are stored more than once, as weights that are tied in the model can
be. Told by their bytes."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial

from ..stored.blocks import BLOCK, read_into
from ..stored.header import BITS, Entry, Header
from .weights import Weights, opened

_BEGIN = 4096
"""Bytes of a tensor that are compared first: few tensors that are no copies have these in common."""

_Stored = tuple[str, str]
"""Names of a file and of a key in it."""


def copies(weights: Weights) -> dict[str, str]:
    """From every key whose tensor has the dtype, shape and bytes of one before it, to the first such.
    Those whose entries are all the same (biases that are zero, norms that are one) do not count: they
    are so by chance.

    Raises:
        SurgeryError, OSError: a file cannot be read.
    """
    found = [[(name, key) for name, key, entry in weights.entries() if entry.bytes]]
    for of in (_type, _begin, _content):
        found = [part for group in found for part in _alike(group, partial(of, weights))]
    found = [group for group in found if not _is_constant(weights, group[0])]
    return {key: group[0][1] for group in found for _, key in group[1:]}


def _alike(group: Iterable[_Stored], of: Callable[[_Stored], Hashable]) -> list[list[_Stored]]:
    parts: defaultdict[Hashable, list[_Stored]] = defaultdict(list)
    for one in group:
        parts[of(one)].append(one)
    return [part for part in parts.values() if len(part) > 1]


def _found(weights: Weights, one: _Stored) -> tuple[Header, Entry]:
    header = weights.headers[one[0]]
    return header, header.entries[one[1]]


def _type(weights: Weights, one: _Stored) -> Hashable:
    entry = _found(weights, one)[1]
    return entry.dtype, entry.shape


def _begin(weights: Weights, one: _Stored) -> Hashable:
    return _digest(weights, one, _BEGIN)


def _content(weights: Weights, one: _Stored) -> Hashable:
    return _digest(weights, one, _found(weights, one)[1].bytes)


def _digest(weights: Weights, one: _Stored, most: int) -> bytes:
    """Of the first bytes of a tensor."""
    total = hashlib.sha256()
    for part in _blocks(weights, one, most):
        total.update(part)
    return total.digest()


def _is_constant(weights: Weights, one: _Stored) -> bool:
    """Whether all entries of a tensor are the same."""
    entry = _found(weights, one)[1]
    width = max(BITS[entry.dtype] // 8, 1)
    first = b""
    for part in _blocks(weights, one, entry.bytes):
        first = first or bytes(part[:width])
        if part != first * (len(part) // width):
            return False
    return True


def _blocks(weights: Weights, one: _Stored, most: int) -> Iterator[memoryview]:
    """The first bytes of a tensor, so many at a time."""
    header, entry = _found(weights, one)
    end = min(most, entry.bytes)
    block = memoryview(bytearray(min(BLOCK, end)))
    with opened(weights.folder / one[0]) as file:
        for at in range(0, end, BLOCK):
            part = block[: min(BLOCK, end - at)]
            read_into(file, header.data_at + entry.start + at, part)
            yield part
