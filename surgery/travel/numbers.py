"""The random numbers of draws."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..ops import Law, Layout, drop_weight, key_from_seed, ratio_of

LIMIT = 2**27
"""Numbers that columns of one value, or the masked weights of its draws, may have: half a GiB."""

RARE = 0.02
"""A value of a mask that is rarer is met by too few draws to tell its variance. So small a p moves a
model about linearly: there only mean and variance matter."""

_DRAWS = 2**20
"""More than there are draws of one run."""


class Numbers:
    """The random numbers of one mask, or of anything else that is born. For the same purpose they are
    the same whenever as many are drawn: all products that use one mask have the same, and so has
    every run."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._masked: Tensor | None = None

    def normal(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Independent standard normal numbers."""
        return torch.randn(shape, generator=self._generator(0, like), device=like.device).to(
            like.dtype
        )

    def signs(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Independent random signs."""
        drawn = torch.randint(0, 2, shape, generator=self._generator(1, like), device=like.device)
        return drawn.to(like.dtype).mul_(2).sub_(1)

    def masks(self, shape: tuple[int, ...], ratio: Tensor | float, like: Tensor) -> Tensor:
        """Mask entries, less their mean and divided by their standard deviation; signs where one of
        both values is `RARE`.

        Args:
            ratio: p / (1 - p).
        """
        drawn = torch.rand(shape, generator=self._generator(0, like), device=like.device)
        ratio = torch.as_tensor(ratio, dtype=drawn.dtype, device=like.device)
        p = ratio / (1 + ratio)
        rare = torch.minimum(p, 1 - p) < RARE
        p, deviation = torch.where(rare, 0.5, p), torch.where(rare, 1, ratio.sqrt())
        return torch.where(drawn < p, -1 / deviation, deviation).to(like.dtype)

    def masked(self, weight: Tensor, law: Law, count: int) -> Iterator[Tensor]:
        """The weight with so many masks by element, one after the other; with random signs of the same
        variance where one of both values is `RARE`."""
        layout = Layout.elements(weight.numel())
        ratio = float(ratio_of(law))
        rare = min(ratio, 1) / (1 + ratio) < RARE
        used = Law.of(0.5, weight.device, weight.dtype) if rare else law
        for draw in range(count):
            key = key_from_seed(self._seed * _DRAWS + draw, weight.device)
            found = drop_weight(weight, key, used, layout)
            yield torch.lerp(weight, found, math.sqrt(ratio)) if rare else found

    def all_masked(self, weight: Tensor, law: Law, count: int) -> Tensor | None:
        """The same as one tensor, which is kept: (count, *shape). None where it would be too large."""
        if self._masked is None and count * weight.numel() <= LIMIT:
            self._masked = torch.stack([*self.masked(weight, law, count)])
        return self._masked

    def _generator(self, purpose: int, like: Tensor) -> torch.Generator:
        return torch.Generator(like.device).manual_seed(2 * self._seed + purpose)
