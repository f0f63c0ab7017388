"""Memory for masked weights that live no longer than one product.

Fresh memory of a weight's size is handed back to the system when it is freed, and comes back a page at
a time: that takes longer than masking the weight. So one block for each dtype is kept, of the size of
the largest weight that was asked for (and one for each thread that is inside a product at that time).
"""

from __future__ import annotations

import torch
from torch import Tensor

_free: dict[torch.dtype, list[Tensor]] = {}
"""Appending to a list, and popping from it, cannot be interrupted by another thread."""


def borrow(like: Tensor) -> Tensor | None:
    """A tensor of the shape, strides and dtype of a contiguous one; `give_back` ends its use.

    None on other devices than the CPU, which keep memory themselves, and where a mode looks on, which
    could hold on to it.
    """
    watched = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
    if watched or like.device.type != "cpu":
        return None
    try:
        block = _free[like.dtype].pop()
    except (KeyError, IndexError):
        block = like.new_empty(like.numel())
    if block.untyped_storage().nbytes() < like.numel() * like.element_size():
        block = like.new_empty(like.numel())
    return block.as_strided(like.size(), like.stride(), 0)


def give_back(space: Tensor | None) -> None:
    """Let others use it."""
    if space is not None:
        _free.setdefault(space.dtype, []).append(space)


def release() -> None:
    """Free what nobody uses now."""
    _free.clear()
