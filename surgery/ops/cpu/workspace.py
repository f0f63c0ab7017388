"""Memory for masked weights that live no longer than one product.

Fresh memory of a weight's size is handed back to the system when it is freed, and comes back a page at
a time: that takes longer than masking the weight. So one block for each dtype is kept, of the size of
the largest weight that was asked for (and one for each thread that is inside a product at that time).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...torch_private.modes import dispatch_modes, function_modes, lasting
from .. import gpu
from ..ordinary import is_ordinary


class Block:
    """Memory, and the tensors of different shapes that see it."""

    def __init__(self, like: Tensor) -> None:
        with lasting():
            self.base = like.new_empty(like.numel())
        self.views: dict[torch.Size, Tensor] = {}

    def view(self, like: Tensor) -> Tensor:
        """A tensor of the shape, strides and dtype of a contiguous one."""
        view = self.views.get(like.size())
        if view is None:
            view = self.views[like.size()] = self.base[: like.numel()].view(like.size())
        return view


_free: dict[torch.dtype, list[Block]] = {}
"""Appending to a list, and popping from it, cannot be interrupted by another thread."""


def borrow(like: Tensor) -> Block | None:
    """A block that is large enough for a tensor like this one; `give_back` ends its use.

    None on other devices than the CPU, which keep memory themselves; for what is not an ordinary
    tensor, whose memory would not be one either; and where a mode looks on, which could hold on to it.
    """
    if not like.is_cpu or gpu.is_there(like):
        return None
    watched = dispatch_modes() or function_modes()
    if watched or not is_ordinary(like):
        return None
    try:
        block = _free[like.dtype].pop()
    except (KeyError, IndexError):
        return Block(like)
    return block if block.base.numel() >= like.numel() else Block(like)


def give_back(block: Block | None) -> None:
    """Let others use it. Not after an exception: then nobody knows what state it is in."""
    if block is not None:
        _free.setdefault(block.base.dtype, []).append(block)


def release() -> None:
    """Free what nobody uses now."""
    _free.clear()
