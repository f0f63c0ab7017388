"""What says which mask a weight gets: how probable it is that an entry drops (`Law`), which weights
share an entry (`Layout`), and both with the key (`Mask`)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..torch_private.modes import outside_of_inference
from .hash import Key, on_host
from .part import Part


@dataclass(frozen=True)
class Layout:
    """Which weights share a mask entry.

    The weight is viewed with shape `view`; the mask has shape `mask`, of the same length, each size
    either 1 (shared along that dimension) or equal to the view's.
    """

    view: tuple[int, ...]
    mask: tuple[int, ...]
    part: Part | None = None
    """Which part of the weight the mask is for; None is all of it."""
    is_elementwise: bool = field(init=False, compare=False, repr=False)
    """Whether every weight has its own entry, and all are there: then kernels count them."""
    entries: int = field(init=False, compare=False, repr=False)
    """Number of mask entries."""

    def __post_init__(self) -> None:
        # Once, and not at each forward; set as dataclasses do it, which torch 2.9 traces.
        is_whole = self.mask == self.view and self.part is None
        object.__setattr__(self, "is_elementwise", is_whole)
        object.__setattr__(self, "entries", math.prod(self.mask))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    @classmethod
    def elements(cls, numel: int) -> Layout:
        """Every weight has its own entry."""
        return cls((numel,), (numel,))

    def of_part(self, part: Part) -> Layout:
        """The same for a part of the weight."""
        return Layout(self.view, self.mask, part)

    @classmethod
    def shared(cls, view: tuple[int, ...], own: tuple[int, ...]) -> Layout:
        """Entries differ along the dimensions `own` of `view`, and are shared along all others."""
        return cls(view, tuple(size if dim in own else 1 for dim, size in enumerate(view)))


Steps = tuple[tuple[int, int, int, int], tuple[int, int, int, int]]
"""Sizes of four dimensions, and how far apart their mask entries are: 0 is shared along."""


@functools.lru_cache(maxsize=4096)
def steps(layout: Layout) -> Steps | None:
    """A layout as the kernel takes it; None if too many of its dimensions take turns, or of a part."""
    if layout.part is not None:
        return None
    merged: list[tuple[int, bool]] = []
    for size, own in zip(layout.view, layout.mask):
        if size == 1:
            continue
        is_own = own != 1
        if merged and merged[-1][1] == is_own:
            size *= merged.pop()[0]
        merged.append((size, is_own))
    if len(merged) > 4:
        return None
    merged = [(1, False)] * (4 - len(merged)) + merged
    apart, entries = [], 1
    for size, is_own in reversed(merged):
        apart.append(entries if is_own else 0)
        entries *= size if is_own else 1
    (a, _), (b, _), (c, _), (d, _) = merged
    return (a, b, c, d), (apart[3], apart[2], apart[1], apart[0])


@dataclass(frozen=True)
class Law:
    """The drop probability as two 0-d tensors, so that it can change without recompiling.

    An entry is kept if its bits, as a signed integer, are at least `threshold`; P(drop) is p rounded
    to a multiple of 2**-32. `scale` is 1 / (1 - p) for that rounded p, and 0 for p = 1.
    """

    threshold: Tensor
    """int32."""
    scale: Tensor
    """float32, or float64 for float64 weights."""
    numbers: tuple[int, float] | None = None
    """Both as numbers of the host, for eager code; None in a traced graph, where p may change."""

    @property
    def drops_all(self) -> bool:
        """Whether p is 1, for eager code. A traced graph has to look at the scale."""
        return self.numbers is not None and self.numbers[1] == 0.0

    @classmethod
    def of(cls, p: float, device: torch.device, dtype: torch.dtype) -> Law:
        """The law of probability `p` for weights of that device and dtype."""
        threshold, scale = law_numbers(p)
        with outside_of_inference():  # a law made in inference serves training too
            return cls(
                torch.tensor(threshold, dtype=torch.int32, device=device),
                torch.tensor(scale, dtype=law_dtype(dtype), device=device),
                (threshold, scale),
            )

    @functools.cached_property
    def ratio(self) -> Tensor:
        """`ratio_of`, for eager code."""
        with outside_of_inference():
            return ratio_of(self)

    def fits(self, weight: Tensor) -> bool:
        """Whether the law can be used with `weight` as it is."""
        wide = weight.dtype == torch.float64
        same = (self.scale.dtype == torch.float64) == wide  # `law_dtype`, asked at each forward
        return same and self.threshold.device == weight.device


class Mask(NamedTuple):
    """Which keep mask a weight gets. Equal values are equal masks.

    Functions that mask by element need no more than key and law of it. Where each example has a mask
    of its own, it is the one of example 0.
    """

    key: Key
    law: Law
    layout: Layout

    def has_numbers(self) -> bool:
        """Whether the host knows key and law, so that kernels can be given numbers."""
        return self.law.numbers is not None and on_host(self.key)


def law_numbers(p: float) -> tuple[int, float]:
    """Threshold and scale of a `Law`."""
    dropped = min(round(p * 2**32), 2**32)
    scale = 0.0 if dropped == 2**32 else 2**32 / (2**32 - dropped)
    return min(dropped - 2**31, 2**31 - 1), scale


def ratio_of(law: Law) -> Tensor:
    """p / (1 - p), the variance of what multiplies a weight, or 0 if everything is dropped."""
    # Not scale - 1: of a p below 1e-4 that leaves few digits in float32, and of one below 3e-8 none.
    dropped = law.threshold.to(torch.int64) + 2**31
    return dropped.to(law.scale.dtype) * (law.scale * 2**-32)


def law_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the scale for weights of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32
