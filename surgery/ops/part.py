"""Which part of a weight a process holds: tensor parallelism cuts weights along their dimensions.

The mask of a part is that part of the mask of the whole weight, to the bit: its entries have the
indices that they have in the whole.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

Run = tuple[int, int]
"""Where neighbouring entries of a dimension begin in the whole, and how many there are."""


class Rows(NamedTuple):
    """Rows of entries that are neighbours in the whole weight, as flat indices."""

    start: int
    """Index of the first entry of the first row."""
    width: int
    """Entries of a row."""
    stride: int
    """From one row to the next."""


class Part(NamedTuple):
    """The part of a weight that a process holds: of each dimension some runs of neighbours."""

    whole: tuple[int, ...]
    """Shape of the whole weight."""
    runs: tuple[tuple[Run, ...], ...]
    """Of each dimension."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what the process holds."""
        return tuple(sum(length for _, length in runs) for runs in self.runs)

    def transposed(self) -> Part:
        """Of the transposed matrix."""
        return Part(self.whole[::-1], self.runs[::-1])

    def indices(self, dim: int, device: torch.device) -> Tensor:
        """Along one dimension, where in the whole the entries lie: int64, 1-D."""
        pieces = [
            torch.arange(begin, begin + length, device=device) for begin, length in self.runs[dim]
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def rows(self) -> Rows | None:
        """The part as equally spaced rows; None if it is not that."""
        if any(len(runs) > 1 for runs in self.runs):
            return None
        begins = [runs[0][0] for runs in self.runs]
        shape, whole = self.shape, self.whole
        strides = [math.prod(whole[dim + 1 :]) for dim in range(len(whole))]
        start = sum(begin * stride for begin, stride in zip(begins, strides))
        cut = [dim for dim in range(len(whole)) if shape[dim] != whole[dim]]
        last = cut[-1] if cut else 0
        width = math.prod(shape[last:])
        stride = strides[last - 1] if last else width
        # The rows are equally spaced if only the first of the dimensions before is cut, too.
        first = next((dim for dim in range(last) if shape[dim] != 1), last)
        return None if any(first < dim < last for dim in cut) else Rows(start, width, stride)


def part_of(sharded: Any) -> Part:
    """The part of a DTensor that this process holds.

    Raises:
        RuntimeError: it is cut in a way that is not known.
    """
    return _part_of(tuple(sharded.shape), sharded.device_mesh, tuple(sharded.placements))


@functools.lru_cache(maxsize=4096)
def _part_of(shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]) -> Part:
    runs: list[tuple[Run, ...]] = [((0, size),) for size in shape]
    for number, placement in enumerate(placements):
        if placement.is_replicate() or placement.is_partial():
            continue
        dim: int = placement.dim
        kind, pieces = type(placement).__name__, 1
        if kind == "_StridedShard":  # several weights in one, each cut by itself
            pieces = placement.split_factor
        elif kind != "Shard":
            raise RuntimeError(f"masks of a weight that is cut by {placement} are not known")
        rank, parts = mesh.get_local_rank(number), mesh.size(number)
        runs[dim] = tuple(_cut(runs[dim], pieces, rank, parts))
    return Part(shape, tuple(runs))


def _cut(runs: tuple[Run, ...], pieces: int, rank: int, parts: int) -> list[Run]:
    """What is left of runs that are split in pieces, each of these in parts, as by `torch.chunk`."""
    found: list[Run] = []
    for piece in _chunks(0, sum(length for _, length in runs), pieces):
        chunks = _chunks(*piece, parts)
        found += _between(runs, *chunks[rank]) if rank < len(chunks) else []
    return found or [(0, 0)]


def _chunks(begin: int, end: int, parts: int) -> list[tuple[int, int]]:
    step = max(1, -(-(end - begin) // parts))
    return [(at, min(at + step, end)) for at in range(begin, end, step)]


def _between(runs: tuple[Run, ...], begin: int, end: int) -> Iterator[Run]:
    """What lies from the entry of that number to that one."""
    at = 0
    for first, length in runs:
        low, high = max(begin, at), min(end, at + length)
        if low < high:
            yield first + low - at, high - low
        at += length
