"""Expectations of activations on the GPU, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ..hash import SEGMENT
from .launch import Kernel, form

BLOCK = 1024
"""Entries of a program."""

_expect = Kernel("expect_kernels", "expect", num_warps=4)


def expect(name: str, mean: Tensor, var: Tensor) -> Tensor | None:
    """What a kink adds (`"excess"`, see `surgery.ops.expect.excess`), or the expectation of an
    activation over N(mean, var).

    Args:
        name: `"excess"`, `"relu"` or `"gelu"`.
        mean, var: of one shape, as `launch.takes` takes them, and no float64.

    Returns:
        the shape and dtype of `mean`, computed in float32; None where it was not done, see
        `Kernel.launch`.
    """
    out, size = torch.empty_like(mean), mean.numel()
    if size == 0:
        return out
    key = (*form(mean, var, out), size % 16 == 0, size == 1)
    grid = -(-size // BLOCK), 1, 1
    arguments = mean, var, out, size
    done = size <= SEGMENT and _expect.launch(grid, mean.device, key, arguments, (name, BLOCK))
    return out if done else None
