"""The masked weight as an operation: differentiable, traced or by a kernel.

`drop_weight` is the public one. It is differentiable any number of times, and keeps for backward only
the 8-byte key and the two scalars that stand for p. `drop_both` is for backwards that need the masked
weight and also mask a gradient. What they compute is defined in `formula.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..torch_private.compiler import is_exporting
from ..torch_private.modes import dispatch_modes
from ..torch_private.tensors import is_batch, is_batched, unviewed
from ..torch_private.tracing import is_traced, is_transformed
from . import gpu
from .cpu.workspace import Block
from .engine import by_formula, by_kernel, shared_by_kernel
from .extension import loading
from .formula import masked_formula, spread_indices
from .hash import SEGMENT, Key, advance_key, key_tensor
from .law import Law, Layout, Mask, steps
from .operators import composite, operator
from .ordinary import is_ordinary_there
from .part_mask import (
    drop_part,
    is_sharded,
    local_anchor,
    local_mask,
    local_part,
    part_places,
    sharded_as,
    traced_part,
)
from .switch import compile_enabled

Rest = tuple[Tensor | None, Mask, torch.dtype | None]
"""Anchor, mask, and the dtype of the result: one argument of an autograd Function, as each costs time
at every call."""


class _DropWeight(torch.autograd.Function):
    """W -> W_used. The map is linear in W - A with a symmetric (diagonal) matrix, so its backward is
    the same map with A = 0, which makes it differentiable to any order."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rest: Rest) -> Tensor:
        # No `setup_context`: with it torch binds the arguments to the signature at every call, which
        # takes longer than a small mask. Attributes, not `save_for_backward`: several backward calls
        # may go through a mask that is held, and activation checkpointing counts saved tensors.
        ctx.mask, ctx.dtype = rest[1], weight.dtype
        return unviewed(_masked(weight, rest))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _gradient(grads[0], ctx.mask, ctx.dtype), None


def _gradient(grad: Tensor, mask: Mask, dtype: torch.dtype) -> Tensor:
    """Of the weight, in its dtype, given that of the masked weight."""
    if mask.layout.is_elementwise and gpu.is_there(grad) and not torch.is_grad_enabled():
        masked = gpu.masked(grad, None, None, mask, dtype)
        if masked is not None:
            return masked[0]
    return drop(grad, None, mask, dtype)


def _gradient_of_node(grad: Tensor, rest: Rest) -> Tensor:
    """The same for a node of the extension, whose masked weight has the dtype of the weight."""
    found = _gradient(grad, rest[1], grad.dtype)
    loading.take_kernels()
    return found


loading.use(mask=_gradient_of_node, steps=steps)


def drop_eagerly(weight: Tensor, rest: Rest) -> Tensor:
    """`drop` in code that nothing follows: the masked weight, part of the graph of autograd if that is
    being recorded."""
    if loading.mask is not None and compile_enabled("cpu"):
        found: Tensor | None = loading.mask(weight, rest)
        if found is not None:
            return found
    if not torch.is_grad_enabled() or not weight.requires_grad:
        return _masked(weight, rest)
    loading.note_product()
    used: Tensor = _DropWeight.apply(weight, rest)  # type: ignore[no-untyped-call]
    return used


def _masked(weight: Tensor, rest: Rest) -> Tensor:
    """The masked weight, with the strides of the weight: channels-last stays channels-last."""
    anchor, mask, dtype = rest
    layout = mask.layout
    fit = weight.numel() == layout.entries and (anchor is None or anchor.shape == weight.shape)
    evaluate = _evaluate
    if fit and layout.is_elementwise and layout.entries <= SEGMENT:  # else `_evaluate` complains
        masked = by_kernel(weight, anchor, None, mask, dtype=dtype)
        if masked is not None:
            return masked[0]
        if dispatch_modes() and is_ordinary_there(weight):
            evaluate = _as_operator
    used = evaluate(weight.detach(), anchor, mask, dtype)
    return used if weight.is_contiguous() else torch.empty_like(weight, dtype=dtype).copy_(used)


def _evaluate(
    weight: Tensor, anchor: Tensor | None, mask: Mask, dtype: torch.dtype | None = None
) -> Tensor:
    """The formula on a weight of any shape; contiguous."""
    layout = mask.layout
    if dtype is not None and dtype != weight.dtype:  # rounded once
        wide = weight.to(mask.law.scale.dtype)
        return _evaluate(wide, anchor, mask).to(dtype)
    if is_sharded(weight):
        local = local_mask(weight, mask)
        return sharded_as(weight, _evaluate(local_part(weight), anchor, local))
    if layout.part is not None:
        return drop_part(weight, local_anchor(anchor, layout.part), mask)
    view = (layout.entries,) if layout.is_elementwise else layout.view
    flat = weight.reshape(view)
    towards = None if anchor is None else anchor.reshape(view)
    if layout.is_elementwise:
        return _in_segments(flat, towards, mask).view(weight.shape)
    followed = is_traced() or is_batched(weight)
    used = None if followed else shared_by_kernel(flat, towards, mask)
    return (by_formula(flat, towards, mask) if used is None else used).view(weight.shape)


def _in_segments(weight: Tensor, anchor: Tensor | None, mask: Mask) -> Tensor:
    """The formula by element on a 1-D weight of any length."""
    numel = weight.shape[0]
    parts = []
    followed = is_traced() or is_batched(weight)
    for start in range(0, max(1, numel), SEGMENT):
        part = slice(start, min(start + SEGMENT, numel))
        towards = None if anchor is None else anchor[part]
        moved = Mask(advance_key(mask.key, start), mask.law, mask.layout)
        masked = None if followed else by_kernel(weight[part], towards, None, moved)
        parts.append(by_formula(weight[part], towards, moved) if masked is None else masked[0])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _shape(weight: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


_LAW = "Tensor weight, Tensor? anchor, Tensor key, Tensor threshold, Tensor scale"


def _drop_by_kernel(
    weight: Tensor, anchor: Tensor | None, key: Tensor, threshold: Tensor, scale: Tensor
) -> Tensor:
    loading.note_product()
    mask = Mask(key, Law(threshold, scale), Layout.elements(weight.numel()))
    return unviewed(_evaluate(weight, anchor, mask))


_drop_op = operator(f"drop({_LAW}) -> Tensor", _drop_by_kernel, _shape)
"""The formula by element as one operation of a compiled graph; contiguous. `extension/operators.h` has
it in C++."""

loading.use(drop=_drop_by_kernel)


class _DropInGraph(torch.autograd.Function):
    """`_drop_op`, differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, anchor: Tensor | None, *law: Tensor) -> Tensor:
        ctx.save_for_backward(*law)
        return cast(Tensor, _drop_op(weight, anchor, *law))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _trained_op(grads[0], None, *ctx.saved_tensors), *(None,) * 4


def _trained(*args: Tensor | None) -> Tensor:
    return cast(Tensor, _DropInGraph.apply(*args))  # type: ignore[no-untyped-call]


_trained_op = composite(f"trained_weight({_LAW}) -> Tensor", _trained)


def _as_operator(
    weight: Tensor, anchor: Tensor | None, mask: Mask, dtype: torch.dtype | None = None
) -> Tensor:
    """The formula by element as one operation, which a mode sees whole: inside, kernels do it."""
    law, key = mask.law, key_tensor(mask.key, weight.device)
    given = weight if dtype in (None, weight.dtype) else weight.to(law.scale.dtype)
    used: Tensor = _drop_op(given, anchor, key, law.threshold, law.scale)
    return used if dtype is None else used.to(dtype)


def _indices_for(like: Tensor, entries: int) -> Tensor:
    return spread_indices(entries, like.device)


def _by_view(
    weight: Tensor,
    anchor: Tensor | None,
    key: Tensor,
    threshold: Tensor,
    scale: Tensor,
    view: Sequence[int],
    mask: Sequence[int],
    indices: Tensor,
) -> Tensor:
    """`masked_formula` for a weight of any shape. `view`, `mask`: see `Layout`."""
    viewed = weight.reshape(view)
    towards = None if anchor is None else anchor.reshape(view)
    args = viewed, towards, key, threshold, scale, tuple(mask), indices
    return masked_formula(*args).view(weight.shape)


_indices_op = composite("spread_indices(Tensor like, int entries) -> Tensor", _indices_for)
_formula_op = composite(
    f"drop_by_formula({_LAW}, SymInt[] view, SymInt[] mask, Tensor indices) -> Tensor",
    _by_view,
)


HAS_OPERATORS = frozenset(("cpu",))
"""Types of device on which operators of their own stand for the formula in a compiled graph: what
inductor makes of it there takes several times as long as the kernel (`docs/performance.md`)."""


def drop_in_graph(
    weight: Tensor,
    anchor: Tensor | None,
    key: Tensor,
    threshold: Tensor,
    scale: Tensor,
    layout: Layout,
) -> Tensor:
    """The masked weight as part of a compiled graph. Threshold and scale: of one entry.

    If there will be a backward, it does what `surgery.modules.recompute` does in eager mode: the keep
    mask and the masked weight are not kept for backward but computed again. The spread indices are
    computed outside of that: they do not depend on the key, so sites of one size would share them, and
    what is shared would be kept.
    """
    if layout.part is not None:
        anchor = local_anchor(anchor, layout.part)
    args: tuple[Any, ...] = (weight, anchor, key, threshold, scale)
    compute: Any = _trained_op
    transformed = is_transformed()  # by `torch.func`, in the compiled code
    if layout.part is not None:
        compute, args = traced_part, (*args, part_places(layout, weight.device))
    elif weight.device.type not in HAS_OPERATORS or not layout.is_elementwise or transformed:
        indices = _indices_op(weight, layout.entries)
        compute, args = _formula_op, (*args, layout.view, layout.mask, indices)
    if transformed or not torch.is_grad_enabled():
        return cast(Tensor, compute(*args))
    used: Tensor = checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=False)
    return used


def drop_weight(
    weight: Tensor,
    key: Key,
    law: Law,
    layout: Layout,
    anchor: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The weight to use in a forward call.

    Args:
        weight: the raw weight, any shape, any floating dtype.
        key: see `surgery.ops.hash`; on the host, on the CPU, or on the device of the weight.
        law: the drop probability.
        layout: which weights share a mask entry.
        anchor: where dropped weights go; None is zero.
        dtype: of the result, which is rounded once; None is that of the weight.

    Returns:
        `A + m * (W - A) / (1 - p)`, shape and strides of `weight`. Its expectation over keys is
        `weight`.
    """
    return drop(weight, anchor, Mask(key, law, layout), dtype)


def drop(
    weight: Tensor, anchor: Tensor | None, mask: Mask, dtype: torch.dtype | None = None
) -> Tensor:
    """`drop_weight` for a mask that is one value."""
    if not is_traced():
        if is_batch(weight):
            return _evaluate(weight, anchor, mask, dtype)
        return drop_eagerly(weight, (anchor, mask, dtype))
    if is_sharded(weight):
        local = drop(local_part(weight), anchor, local_mask(weight, mask), dtype)
        return sharded_as(weight, local)
    compiling = torch.compiler.is_dynamo_compiling() and not is_exporting()
    if compiling and dtype is None and mask.layout.entries <= SEGMENT:
        law = mask.law
        key = key_tensor(mask.key, weight.device)  # one that is held was drawn in eager code
        return drop_in_graph(weight, anchor, key, law.threshold, law.scale, mask.layout)
    return _evaluate(weight, anchor, mask, dtype)


def drop_into(
    place: Tensor,
    weight: Tensor,
    key: Key,
    law: Law,
    layout: Layout,
    anchor: Tensor | None = None,
) -> None:
    """Write `drop_weight` of the rest into `place`: dense, and the shape and dtype of the weight. Not
    differentiable, and not for traced code."""
    mask = Mask(key, law, layout)
    fit = weight.numel() == layout.entries and (anchor is None or anchor.shape == weight.shape)
    on_gpu = fit and layout.is_elementwise and gpu.takes(place)
    if on_gpu and gpu.masked(weight, anchor, None, mask, used=place) is not None:
        return
    place.copy_(drop(weight.detach(), anchor, mask))


def drop_both(
    weight: Tensor,
    anchor: Tensor | None,
    grad: Tensor | None,
    mask: Mask,
    block: Block | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The masked weight, and the gradient of the weight given that of the masked weight: what a
    backward needs, of one mask. Not for traced code.

    Args:
        weight, anchor: of one shape; the anchor may be None.
        grad: of the masked weight, of its shape. It may be overwritten. Or None.
        mask: of the weight.
        block: memory in which the masked weight may be put.

    Returns:
        both; the gradient in the dtype of the weight.
    """
    layout = mask.layout
    fit = layout.is_elementwise and layout.entries <= SEGMENT
    if fit and not torch.is_grad_enabled() and not is_traced():
        masked = by_kernel(weight, anchor, grad, mask, block)
        if masked is not None:
            return masked
    used = drop(weight, anchor, mask)
    return used, None if grad is None else drop(grad, None, mask, weight.dtype)
