"""Formulas of many steps, on parts of a value that stay in the cache of a CPU core."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ..torch_private.tracing import is_traced

BLOCK = 2**15
"""Entries of a part: those of ten tensors fit into a megabyte."""

Found = TypeVar("Found", bound=tuple[Tensor, ...])


def in_blocks(function: Callable[..., Found], *tensors: Tensor, width: int = 1) -> Found:
    """What a function makes of tensors of one shape, part by part.

    Each step of a formula would else read and write memory: that takes longer than the arithmetic.

    Args:
        function: works on every row of `width` entries alone; gives tensors of the shape of its
            arguments. It gets whole tensors where they are small, traced, or lie on another
            device.
        width: entries of a row, along the last dimension.
    """
    first = tensors[0]
    if first.device.type != "cpu" or first.numel() < 2 * BLOCK or is_traced():
        return function(*tensors)
    rows = [one.reshape(-1) if width == 1 else one.reshape(-1, width) for one in tensors]
    parts = zip(*(one.split(max(1, BLOCK // width)) for one in rows))
    found = [function(*part) for part in parts]
    joined = (torch.cat(column).view(first.shape) for column in zip(*found))
    return tuple(joined)  # type: ignore[return-value]
