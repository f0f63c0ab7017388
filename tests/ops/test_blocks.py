"""Parts of a value give what the whole gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from surgery.ops.blocks import BLOCK, in_blocks


@pytest.mark.parametrize("width", [1, 3, 7])
def test_parts_give_the_bits_of_the_whole(width: int) -> None:
    """Each function works on rows alone; the last part is smaller than the others."""
    sizes: list[int] = []

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(x.numel())
        return x * y + 1, (x - y).clamp(min=0)

    x, y = torch.randn(2, 5, BLOCK // 2 + 1, width)
    y = y.mT.contiguous().mT  # of other strides
    found = in_blocks(function, x, y, width=width)
    assert len(sizes) > 2
    assert max(sizes) <= BLOCK
    assert all(map(torch.equal, found, function(x, y)))
    assert found[0].shape == x.shape
