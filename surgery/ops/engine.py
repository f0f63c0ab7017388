"""How the formula is run: by a kernel where there is one, else as it is, in chunks.

    CPU     the C++ kernels of `cpu/`, compiled at first use
    GPU     the Triton kernels of `gpu/`, compiled at first use
    else    the formula, in chunks, so that memory stays bounded; with one warning if that is because
            compiling failed

All give the same bits. Code that is being traced gets the formula, which becomes part of its graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.caching import cached
from ..torch_private.modes import lasting
from ..torch_private.tensors import is_batched
from ..torch_private.tracing import is_traced
from . import gpu
from .cpu import native
from .cpu.build import NoCompiler
from .cpu.workspace import Block, borrow, give_back
from .formula import masked_formula, spread_indices
from .hash import SEGMENT, advance_key, key_tensor, mix_into
from .law import Law, Mask, steps
from .switch import compile_enabled, give_up

CHUNK = 1 << 18
"""The plain formula works on this many weights at a time: smaller parts spend their time in calls, and
the int32 temporaries of larger ones leave the cache."""


def by_kernel(
    weight: Tensor,
    anchor: Tensor | None,
    grad: Tensor | None,
    mask: Mask,
    block: Block | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None] | None:
    """The masked weight, and the gradient of the weight by the same mask, by a kernel. Not for traced
    code.

    Args:
        weight, anchor: of one shape; the anchor may be None.
        grad: of the masked weight, or None. It may be overwritten.
        mask: by element.
        block: memory in which to put the masked weight.
        dtype: of the masked weight; None is that of the weight.

    Returns:
        both, the gradient in the dtype of the weight; None where there is no kernel for these tensors,
        and then nothing was done.
    """
    if gpu.is_there(weight):
        return gpu.masked(weight, anchor, grad, mask, dtype)
    known = dtype in (None, weight.dtype) and native.takes(weight, anchor, grad)
    if not (known and has_kernels("masks")):
        return None
    used = torch.empty_like(weight) if block is None else block.view(weight)
    if type(used) is not Tensor:  # a mode makes tensors of its own
        return None
    native.drop(weight, anchor, grad, used, grad, mask)
    return used, grad


def shared_by_kernel(weight: Tensor, anchor: Tensor | None, mask: Mask) -> Tensor | None:
    """The masked weight where entries share a mask entry, by a kernel; None where there is none for
    these tensors. Not for traced code.

    Args:
        weight, anchor: with the shape of the layout's view; the anchor may be None.
    """
    if gpu.is_there(weight):
        return gpu.drop_shared(weight, anchor, mask)
    if not native.takes(weight, anchor) or mask.layout.entries > SEGMENT:
        return None
    form = steps(mask.layout)
    if form is None or not has_kernels("shared"):
        return None
    used = torch.empty_like(weight)
    if type(used) is not Tensor:  # a mode makes tensors of its own
        return None
    native.drop_shared(weight, anchor, used, mask, form)
    return used


def has_kernels(name: str) -> bool:
    """Whether there are kernels of that name for the CPU; the first question compiles them."""
    if not compile_enabled("cpu"):
        return False
    try:
        native.library(name)
    except NoCompiler as error:
        give_up("cpu", error)
        return False
    return True


def by_formula(weight: Tensor, anchor: Tensor | None, mask: Mask) -> Tensor:
    """The masked weight by `masked_formula`, in chunks where nothing follows each operation.

    Args:
        weight, anchor: with the shape of the layout's view; by element, they have one dimension.

    Returns:
        shape and dtype of the weight.
    """
    key, law, layout = key_tensor(mask.key, weight.device), mask.law, mask.layout
    if layout.is_elementwise and not is_traced() and not is_batched(weight):
        return _in_chunks(weight, anchor, key, law)
    shape = None if layout.is_elementwise else layout.mask
    return masked_formula(weight, anchor, key, law.threshold, law.scale, shape)


def _in_chunks(weight: Tensor, anchor: Tensor | None, key: Tensor, law: Law) -> Tensor:
    numel = weight.shape[0]
    if anchor is None and weight.dtype in _NARROW and native.takes(weight):
        return _in_place_in_chunks(weight, key, law)
    if numel <= CHUNK or weight.device.type != "cpu":
        return masked_formula(weight, anchor, key, law.threshold, law.scale, None)
    used = torch.empty_like(weight)
    for start in range(0, numel, CHUNK):
        part = slice(start, min(start + CHUNK, numel))
        towards = None if anchor is None else anchor[part]
        args = advance_key(key, start), law.threshold, law.scale, None
        indices = _indices_of_a_chunk(CHUNK)[: part.stop - start]
        used[part] = masked_formula(weight[part], towards, *args, indices)
    return used


_NARROW = (torch.float32, torch.bfloat16)


def _in_place_in_chunks(weight: Tensor, key: Tensor, law: Law) -> Tensor:
    """What `masked_formula` gives without an anchor, to the bit, with one operation for each of its
    steps, in memory that is used again: less than half the time."""
    used = torch.empty_like(weight)
    every = _indices_of_a_chunk(CHUNK)
    blocks = [borrow(every) for _ in range(2)]
    z, spare = (torch.empty_like(every) if block is None else block.view(every) for block in blocks)
    least, scale = int(law.threshold), law.scale
    for start in range(0, len(weight), CHUNK):
        into, part = used[start : start + CHUNK], weight[start : start + CHUNK]
        z, spare, indices = (tensor[: len(part)] for tensor in (z, spare, every))
        mix_into(indices, advance_key(key, start), z, spare)
        exact = into.dtype == scale.dtype
        wide = torch.mul(part.to(scale.dtype), scale, out=into if exact else None)
        wide.view(torch.int32).bitwise_and_(_ones_where_kept(z, least))
        if not exact:
            into.copy_(wide)
    for block in blocks:
        give_back(block)
    return used


def _ones_where_kept(z: Tensor, least: int) -> Tensor:
    """All bits one where z >= least, else zero; in place. A comparison would give bool, and what torch
    does with those takes several times as long as with int32."""
    if least == -(1 << 31):
        return z.fill_(-1)
    return z.clamp_(least - 1, least).neg_().add_(least - 1)


@cached
def _indices_of_a_chunk(count: int) -> Tensor:
    """The spread indices of a chunk, which are the same for all of them."""
    with lasting():
        return spread_indices(count, torch.device("cpu"))
