"""Keep masks of p = 0.5 as streams of 32-bit words, for batteries that test generators: an entry is a
bit, and nothing of a hash but what a mask shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from surgery.ops import Law, Layout, drop_weight
from surgery.ops.hash import draw_key, mix, multipliers, spread

from .statistics import window

CPU = torch.device("cpu")
LAW = Law.of(0.5, CPU, torch.float32)

Masks = Iterator[Tensor]
"""Bool, of any shape, whose number of entries 32 divides."""


def entries() -> Masks:
    """Mask after mask of a weight of 1,024 x 1,024, as its forwards draw them, by the kernel."""
    ones, layout = torch.ones(1 << 20), Layout.elements(1 << 20)
    while True:
        yield drop_weight(ones, draw_key(CPU), LAW, layout) != 0


def calls() -> Masks:
    """The same 32 entries of call after call: of a bias, or a corner of a weight."""
    index = spread(window(0, 32))
    while True:
        first, second = torch.randint(-(2**31), 2**31, (2, 1 << 15, 1), dtype=torch.int32)
        yield mix(index, (first, second)) >= 0  # type: ignore[arg-type]


def examples() -> Masks:
    """One entry of 1,024 examples, then the next entry; after 512 of them another call."""
    index = spread(window(0, 512))[:, None]
    while True:
        key = draw_key(CPU)
        assert isinstance(key, Tensor)
        yield mix(index, key, multipliers(1024, key)) >= 0


STREAMS: dict[str, Callable[[], Masks]] = {
    "entries": entries,
    "calls": calls,
    "examples": examples,
}


def packed(masks: Masks) -> Iterator[bytes]:
    """32 entries in a word."""
    for mask in masks:
        yield np.packbits(mask.numpy(), bitorder="little").tobytes()
