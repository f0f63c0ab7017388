"""How a formula is run: by a kernel where there is one, else as it is, in chunks.

    CPU     the C++ kernels of `cpu/`, compiled at first use
    GPU     the Triton kernels of `gpu/`, compiled at first use
    else    the formula, in chunks, so that memory stays bounded; with one warning if that is because
            compiling failed

All give the same bits. Code that is being traced gets the formula, which becomes part of its graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..base.caching import cached
from ..torch_private.modes import lasting
from ..torch_private.tensors import is_batched
from ..torch_private.tracing import is_traced
from . import gpu
from .cpu import native
from .cpu.workspace import Block, borrow, give_back
from .hash import Key, advance_key, key_tensor, mix_into, spread
from .law import Law, Layout
from .switch import compile_enabled, give_up

Formula = Callable[..., Tensor]

CHUNK = 1 << 18
"""The plain formula works on this many weights at a time: smaller parts spend their time in calls, and
the int32 temporaries of larger ones leave the cache."""


def run(
    formula: Formula,
    weight: Tensor,
    anchor: Tensor | None,
    key: Tensor,
    threshold: Tensor,
    scale: Tensor,
    mask: tuple[int, ...] | None,
) -> Tensor:
    """Evaluate `formula` on these arguments, in chunks if they may be many; see
    `surgery.ops.mask.masked_formula` for them."""
    if mask is None and not is_traced() and not is_batched(weight):
        return _in_chunks(formula, weight, anchor, key, threshold, scale)
    return formula(weight, anchor, key, threshold, scale, mask)


def masks(
    weight: Tensor,
    anchor: Tensor | None,
    grad: Tensor | None,
    key: Key,
    law: Law,
    block: Block | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None] | None:
    """The masked weight, and the gradient of the weight by the same mask, by a kernel.

    Args:
        weight, anchor: of one shape; the anchor may be None.
        grad: of the masked weight, or None. It may be overwritten.
        key, law: of the mask.
        block: memory in which to put the masked weight.
        dtype: of the masked weight; None is that of the weight.

    Returns:
        both, the gradient in the dtype of the weight; None where there is no kernel for these tensors,
        and then nothing was done.
    """
    if gpu.is_there(weight):
        return gpu.masked(weight, anchor, grad, key, law, dtype)
    given = [tensor for tensor in (weight, anchor, grad) if tensor is not None]
    if is_traced() or not native.takes(*given) or dtype not in (None, weight.dtype):
        return None
    if not has_kernels("masks"):
        return None
    used = torch.empty_like(weight) if block is None else block.view(weight)
    if block is None and not native.takes(used):  # a mode that makes tensors of its own
        return None
    native.drop(weight, anchor, grad, used, grad, (key_tensor(key), law.threshold, law.scale))
    return used, grad


def shared_masks(
    weight: Tensor, anchor: Tensor | None, key: Key, law: Law, layout: Layout
) -> Tensor | None:
    """The masked weight where entries share a mask, by the kernel for the GPU; or None."""
    if not gpu.takes(weight, anchor) or layout.entries > gpu.INDEX:
        return None
    shape = gpu.steps(layout)  # asked last, since torch 2.9 does not trace it for sizes that vary
    if shape is None:
        return None
    used = torch.empty_like(weight)
    return used if gpu.drop_shared(weight, anchor, used, key, law, shape) else None


def has_kernels(name: str) -> bool:
    """Whether there are kernels of that name for the CPU; the first question compiles them."""
    if not compile_enabled("cpu"):
        return False
    try:
        native.library(name)
    except native.NoCompiler as error:
        give_up("cpu", error)
        return False
    return True


def _in_chunks(
    formula: Formula,
    weight: Tensor,
    anchor: Tensor | None,
    key: Tensor,
    threshold: Tensor,
    scale: Tensor,
) -> Tensor:
    numel = weight.shape[0]
    if anchor is None and weight.dtype in _NARROW and native.takes(weight):
        return _masked_in_chunks(weight, key, threshold, scale)
    if numel <= CHUNK or weight.device.type != "cpu":
        return formula(weight, anchor, key, threshold, scale, None)
    used = torch.empty_like(weight)
    for start in range(0, numel, CHUNK):
        part = slice(start, min(start + CHUNK, numel))
        towards = None if anchor is None else anchor[part]
        moved, places = advance_key(key, start), _places(CHUNK)[: part.stop - start]
        used[part] = formula(weight[part], towards, moved, threshold, scale, None, places)
    return used


_NARROW = (torch.float32, torch.bfloat16)


def _masked_in_chunks(weight: Tensor, key: Tensor, threshold: Tensor, scale: Tensor) -> Tensor:
    """What `masked_formula` gives without an anchor, to the bit, with as few passes over memory as it
    has steps."""
    used = torch.empty_like(weight)
    every = _places(CHUNK)
    blocks = [borrow(every) for _ in range(2)]
    z, spare = (torch.empty_like(every) if block is None else block.view(every) for block in blocks)
    least = int(threshold)
    for start in range(0, len(weight), CHUNK):
        into, part = used[start : start + CHUNK], weight[start : start + CHUNK]
        z, spare, places = (tensor[: len(part)] for tensor in (z, spare, every))
        mix_into(places, key_tensor(advance_key(key, start)), z, spare)
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
def _places(count: int) -> Tensor:
    """The spread indices of a chunk, which are the same for all of them."""
    with lasting():
        return spread(torch.arange(count, dtype=torch.int32, device="cpu"))
