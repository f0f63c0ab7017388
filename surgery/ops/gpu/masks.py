"""Mask and apply on the GPU, in one pass: a weight, a gradient by the same mask, or both."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..hash import words
from .launch import Kernel, form

if TYPE_CHECKING:
    from ..mask import Law, Layout

BLOCK = 1024
"""Entries of a program."""

_drop = Kernel("mask_kernels", "drop", num_warps=4)
_drop_shared = Kernel("mask_kernels", "drop_shared", num_warps=4)


def arguments(key: Tensor, law: Law) -> tuple[Any, ...]:
    """Key and law as kernels take them: pointers, numbers of the host, and whether these count.

    A key on the CPU is given as numbers, and so is a law that knows its own.
    """
    if key.device.type == "cpu" and law.numbers is not None:
        k0, k1 = words(key)
        threshold, scale = law.numbers
        return law.threshold, law.threshold, law.scale, k0, k1, 0, threshold, scale, 0
    there = key if key.device == law.threshold.device else key.to(law.threshold.device)
    return there, law.threshold, law.scale, 0, 0, 1, 0, 0.0, 1


def drop(
    weight: Tensor,
    anchor: Tensor | None,
    grad: Tensor | None,
    used: Tensor,
    of_weight: Tensor | None,
    key: Tensor,
    law: Law,
) -> bool:
    """Write `used`, the masked weight, and `of_weight`, the masked gradient, with one mask.

    Args:
        weight, anchor: dense, of one shape with at most `launch.INDEX` entries. The anchor may be None.
        grad: of that shape, or None with `of_weight`.
        used, of_weight: of that shape, and of any floating dtypes. `grad` and `of_weight` may be the
            same tensor. Computed in the dtype of the law's scale and rounded once.
        key: int32, shape (2,), on the CPU or on the device.

    Returns:
        whether it was done: see `Kernel.launch`.
    """
    size = weight.numel()
    if size == 0:
        return True
    tensors = weight, anchor, grad, used, of_weight
    return _drop.launch(
        (-(-size // BLOCK), 1, 1),
        weight.device,
        (*form(*tensors), size % 16 == 0, size == 1),
        (*tensors, *arguments(key, law), size),
        (anchor is not None, grad is not None, law.scale.dtype == torch.float64, BLOCK),
    )


Steps = tuple[tuple[int, int, int, int], tuple[int, int, int, int]]
"""Sizes of four dimensions, and how far apart their mask entries are: 0 is shared along."""


@functools.lru_cache(maxsize=4096)
def steps(layout: Layout) -> Steps | None:
    """A layout as the kernel takes it; None if too many of its dimensions take turns."""
    found: list[tuple[int, bool]] = []
    for size, own in zip(layout.view, layout.mask):
        if size == 1:
            continue
        is_own = own != 1
        if found and found[-1][1] == is_own:
            size *= found.pop()[0]
        found.append((size, is_own))
    if len(found) > 4:
        return None
    found = [(1, False)] * (4 - len(found)) + found
    apart, entries = [], 1
    for size, is_own in reversed(found):
        apart.append(entries if is_own else 0)
        entries *= size if is_own else 1
    (a, _), (b, _), (c, _), (d, _) = found
    return (a, b, c, d), (apart[3], apart[2], apart[1], apart[0])


def drop_shared(
    weight: Tensor, anchor: Tensor | None, used: Tensor, key: Tensor, law: Law, shape: Steps
) -> bool:
    """Write `used`, the masked weight, where entries share a mask.

    Args:
        weight, anchor, used, key, law: see `drop`.
        shape: the layout, as `steps` gives it.
    """
    size = used.numel()
    if size == 0:
        return True
    sizes, apart = shape
    tensors = weight, anchor, used
    numbers = (size, *sizes[1:], *apart)
    return _drop_shared.launch(
        (-(-size // BLOCK), 1, 1),
        used.device,
        (*form(*tensors), *((number % 16 == 0, number == 1) for number in numbers)),
        (*tensors, *arguments(key, law), *numbers),
        (anchor is not None, law.scale.dtype == torch.float64, BLOCK),
    )
