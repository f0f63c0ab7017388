"""Mask and apply on the GPU, in one pass: a weight, a gradient by the same mask, or both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...torch_private.gpu import current_device
from ..hash import SEGMENT, on_host, words
from ..law import Mask, steps
from .launch import Kernel, form, takes

BLOCK = 1024
"""Entries of a program."""

_drop = mask_kernel = Kernel("mask_kernels", "drop", num_warps=4)
_drop_shared = Kernel("mask_kernels", "drop_shared", num_warps=4)


def arguments(mask: Mask) -> tuple[Any, ...]:
    """Key and law as kernels take them: pointers, numbers of the host, and whether these count.

    A key on the host or on the CPU is given as numbers, and so is a law that knows its own.
    """
    key, law, _ = mask
    where = law.threshold, law.scale
    if not on_host(key):
        return key, *where, 0, 0, 1, 0, 0.0, 1
    of_law = (*law.numbers, 0) if law.numbers is not None else (0, 0.0, 1)
    return law.threshold, *where, *words(key), 0, *of_law


def masked(
    weight: Tensor,
    anchor: Tensor | None,
    grad: Tensor | None,
    mask: Mask,
    dtype: torch.dtype | None = None,
    used: Tensor | None = None,
    taken: bool = False,
) -> tuple[Tensor, Tensor | None] | None:
    """The masked weight, and the gradient of the weight by the same mask.

    One long function, as every call in it would be paid for by each site at each step.

    Args:
        weight, anchor: of one shape. The anchor may be None.
        grad: of the masked weight, of any floating dtype, or None. It may be overwritten.
        mask: by element; its key on the host, on the CPU or on the device.
        dtype: of the masked weight; None is that of the weight.
        used: where to write it, dense; None makes a tensor.
        taken: whether `takes` was asked already.

    Returns:
        both, the gradient in the dtype of the weight; computed in the dtype of the law's scale and
        rounded once. None, with nothing done, where there is no kernel for these tensors.
    """
    size = weight.numel()
    if size > SEGMENT or not (taken or takes(weight, anchor, grad)):
        return None
    if used is None:
        used = torch.empty_like(weight, dtype=dtype)
    of_weight, addresses = grad, weight.data_ptr() | used.data_ptr()
    if grad is not None:
        if grad.dtype != weight.dtype:
            of_weight = torch.empty_like(weight)
            addresses |= of_weight.data_ptr()
        addresses |= grad.data_ptr()
    if anchor is not None:
        addresses |= anchor.data_ptr()
    key, law, _ = mask
    numbers = law.numbers
    if type(key) is tuple and numbers is not None:
        threshold, scale = law.threshold, law.scale  # `arguments`, in eager code
        args = (
            *(weight, anchor, grad, used, of_weight, threshold, threshold, scale, threshold),
            *(*key, 0, *numbers, 0, size),
        )
    else:
        there, threshold, scale, *words_and_law = arguments(mask)
        where = there, threshold, scale, threshold  # no row: the law of a table has been looked up
        args = weight, anchor, grad, used, of_weight, *where, *words_and_law, size
    constants = anchor is not None, grad is not None, law.scale.dtype == torch.float64, BLOCK
    kinds = weight.dtype, used.dtype, grad is not None and grad.dtype
    forms = *kinds, anchor is not None and anchor.dtype, size % 16 == 0, size == 1
    if addresses % 16:
        forms = *forms, *form(*args[:5])
    grid, device = (-(-size // BLOCK), 1, 1), weight.device
    run = _drop.compiled.get((device.index, forms, constants))
    if run is not None and current_device() == device.index:
        run(grid, args + constants)
    elif not _drop.launch(grid, device, forms, args, constants):
        return None
    return used, of_weight


def kinds_of(known: Any) -> tuple[Any, Any, Any, Any, bool] | None:
    """What a key of `mask_kernel.made` is for: dtypes of weight, masked weight, gradient and anchor,
    False for what is not there, and whether 16 divides the number of entries. None of one for tensors
    that lie unusually, or for laws in memory."""
    _, forms, constants = known
    if len(forms) != 6 or constants[2:] != (False, BLOCK):
        return None
    *kinds, sixteen, is_one = forms
    return None if is_one else (*kinds, sixteen)


def parameters(anchor: bool, grad: bool) -> tuple[int, ...]:
    """The sizes of what `mask_kernel` is given without its constants: addresses, and seven numbers."""
    return (8,) * (6 + anchor + 2 * grad) + (4,) * 7


def drop_shared(weight: Tensor, anchor: Tensor | None, mask: Mask) -> Tensor | None:
    """The masked weight where entries share a mask entry.

    Args:
        weight, anchor: with the shape of the layout's view. The anchor may be None.
        mask: see `masked`.

    Returns:
        shape and dtype of the weight; None where there is no kernel for these tensors.
    """
    if not takes(weight, anchor) or mask.layout.entries > SEGMENT:
        return None
    shape = steps(mask.layout)  # asked last, since torch 2.9 does not trace it for sizes that vary
    if shape is None:
        return None
    used, size = torch.empty_like(weight), weight.numel()
    if size == 0:
        return used
    sizes, apart = shape
    tensors = weight, anchor, used
    numbers = (size, *sizes[1:], *apart)
    done = _drop_shared.launch(
        (-(-size // BLOCK), 1, 1),
        used.device,
        (*form(*tensors), *((number % 16 == 0, number == 1) for number in numbers)),
        (*tensors, *arguments(mask), *numbers),
        (anchor is not None, mask.law.scale.dtype == torch.float64, BLOCK),
    )
    return used if done else None
