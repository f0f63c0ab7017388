"""The one formula of the family: the masked weight, its keep mask, and its gradient.

    W_used = A + m * (W - A) / (1 - p)

It is written once, in `masked_formula`. `drop_weight` is the public op: differentiable any number of
times, keeping for backward only the 8-byte key and the two scalars that stand for p. `drop_both` is
for backwards that need the masked weight and mask a gradient.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..torch_private.tensors import is_batched, unviewed
from ..torch_private.tracing import is_traced
from . import gpu
from .cpu.workspace import Block
from .engine import masks, run, shared_masks
from .hash import Key, advance_key, key_tensor, mix, spread
from .law import Law, Layout

SEGMENT = 1 << 30
"""Weights are hashed in segments of at most this many, so that indices fit int32."""


def keep_mask(
    shape: tuple[int, ...], key: Tensor, threshold: Tensor, places: Tensor | None = None
) -> Tensor:
    """The keep mask: bool, of that shape, True where kept. Entry i (row-major) has index i.

    `places` are the spread indices, if they are computed already.
    """
    if places is None:
        places = _places(math.prod(shape), key.device)
    return (mix(places, key) >= threshold).view(shape)


def _places(entries: int, device: torch.device) -> Tensor:
    return spread(torch.arange(entries, dtype=torch.int32, device=device))


def masked_formula(
    weight: Tensor,
    anchor: Tensor | None,
    key: Tensor,
    threshold: Tensor,
    scale: Tensor,
    mask: tuple[int, ...] | None,
    places: Tensor | None = None,
) -> Tensor:
    """`A + m * (W - A) / (1 - p)` in plain tensor operations: the definition of everything here.

    Args:
        weight: floating point, the shape of a layout's view.
        anchor: the same shape, or None for zero.
        key: int32, shape (2,).
        threshold, scale: 0-d, see `Law`.
        mask: shape of the mask (see `Layout`), or None if it is the weight's own, which has one
            dimension.
        places: see `keep_mask`.

    Returns:
        the weight that is used: shape and dtype of `weight`.
    """
    keep = keep_mask(tuple(weight.shape) if mask is None else mask, key, threshold, places)
    return apply_mask(keep, weight, anchor, scale)


def apply_mask(keep: Tensor, weight: Tensor, anchor: Tensor | None, scale: Tensor) -> Tensor:
    """The formula for a mask that is there, which broadcasts with the weight. Narrow floats are
    computed in float32 and rounded once."""
    wide = weight.to(scale.dtype) * scale
    if anchor is None:
        return torch.where(keep, wide, torch.zeros_like(scale)).to(weight.dtype)
    towards = anchor.to(scale.dtype)
    return torch.where(keep, wide + towards * (1 - scale), towards).to(weight.dtype)


Rest = tuple[Tensor | None, Key, Law, Layout, torch.dtype | None]
"""Anchor, key, law and layout of a mask, and the dtype of the result: one argument of an autograd
Function, as each costs time at every call."""


class _DropWeight(torch.autograd.Function):
    """W -> W_used. The map is linear in W - A with a symmetric (diagonal) matrix, so its backward is
    the same map with A = 0, which makes it differentiable to any order."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rest: Rest) -> Tensor:
        # No `setup_context`: with it torch binds the arguments to the signature at every call, which
        # takes longer than a small mask. Attributes, not `save_for_backward`: held masks are passed by
        # several backward calls, and activation checkpointing counts saved tensors.
        _, ctx.key, ctx.law, ctx.layout, _ = rest
        ctx.dtype = weight.dtype
        return unviewed(_masked(weight, rest))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), key, law, layout = grads, ctx.key, ctx.law, ctx.layout
        if layout.is_elementwise and gpu.is_there(grad) and not torch.is_grad_enabled():
            found = gpu.masked(grad, None, None, key, law, ctx.dtype)
            if found is not None:
                return found[0], None
        return drop_weight(grad, key, law, layout, dtype=ctx.dtype), None


def drop_eagerly(weight: Tensor, rest: Rest) -> Tensor:
    """`drop_weight` in code that nothing follows: the masked weight, part of the graph of autograd if
    that is being recorded."""
    if not torch.is_grad_enabled() or not weight.requires_grad:
        return _masked(weight, rest)
    used: Tensor = _DropWeight.apply(weight, rest)  # type: ignore[no-untyped-call]
    return used


def _masked(weight: Tensor, rest: Rest) -> Tensor:
    """The masked weight, with the strides of the weight: channels-last stays channels-last."""
    anchor, key, law, layout, dtype = rest
    fit = weight.numel() == layout.entries and (anchor is None or anchor.shape == weight.shape)
    if fit and layout.is_elementwise and layout.entries <= SEGMENT:  # else `_evaluate` complains
        found = masks(weight, anchor, None, key, law, dtype=dtype)
        if found is not None:
            return found[0]
    used = _evaluate(weight.detach(), anchor, key, law, layout, dtype)
    return used if weight.is_contiguous() else torch.empty_like(weight, dtype=dtype).copy_(used)


def _evaluate(
    weight: Tensor,
    anchor: Tensor | None,
    key: Key,
    law: Law,
    layout: Layout,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The formula on a weight of any shape; contiguous."""
    if dtype is not None and dtype != weight.dtype:  # rounded once
        wide = weight.to(law.scale.dtype)
        return _evaluate(wide, anchor, key, law, layout).to(dtype)
    view = (layout.entries,) if layout.is_elementwise else layout.view
    flat = weight.reshape(view)
    towards = None if anchor is None else anchor.reshape(view)
    if layout.is_elementwise:
        used = _in_segments(flat, towards, key, law)
    else:
        found = None if is_batched(weight) else shared_masks(flat, towards, key, law, layout)
        args = key_tensor(key, weight.device), law.threshold, law.scale, layout.mask
        used = run(masked_formula, flat, towards, *args) if found is None else found
    return used.view(weight.shape)


def _in_segments(weight: Tensor, anchor: Tensor | None, key: Key, law: Law) -> Tensor:
    """The elementwise formula on a 1-D weight of any length."""
    numel = weight.shape[0]
    parts = []
    for start in range(0, max(1, numel), SEGMENT):
        part = slice(start, min(start + SEGMENT, numel))
        towards = None if anchor is None else anchor[part]
        parts.append(_segment(weight[part], towards, advance_key(key, start), law))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _segment(weight: Tensor, anchor: Tensor | None, key: Key, law: Law) -> Tensor:
    found = None if is_batched(weight) else masks(weight, anchor, None, key, law)
    if found is not None:
        return found[0]
    args = key_tensor(key, weight.device), law.threshold, law.scale, None
    return run(masked_formula, weight, anchor, *args)


@torch.library.custom_op(
    "surgery::drop",
    mutates_args=(),
    schema="(Tensor weight, Tensor? anchor, Tensor key, Tensor threshold, Tensor scale) -> Tensor",
)
def _drop_op(
    weight: Tensor, anchor: Tensor | None, key: Tensor, threshold: Tensor, scale: Tensor
) -> Tensor:
    """The elementwise formula as one operation of a compiled graph.

    On the CPU only: what inductor makes of the formula there takes several times as long as the kernel,
    see `docs/performance.md`.
    """
    layout = Layout.elements(weight.numel())
    return unviewed(_evaluate(weight, anchor, key, Law(threshold, scale), layout))


@_drop_op.register_fake
def _(weight: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _keep_law(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[2:])


def _drop_op_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _drop_op(grad, None, *ctx.saved_tensors), None, None, None, None


_drop_op.register_autograd(_drop_op_backward, setup_context=_keep_law)


def _in_graph(weight: Tensor, anchor: Tensor | None, key: Key, law: Law, layout: Layout) -> Tensor:
    """The masked weight as part of a compiled graph.

    If there will be a backward, it does what `surgery.modules.recompute` does in eager mode: the mask
    and the masked weight are not kept for backward but computed again. The spread indices stay outside:
    they do not depend on the key, so sites of one size would share them, and what is shared would be
    kept.
    """
    key = key_tensor(key, weight.device)  # one that is held was drawn in eager code
    args: tuple[Any, ...] = (weight, anchor, key, law.threshold, law.scale)
    compute: Any = _drop_op
    if weight.device.type != "cpu" or not layout.is_elementwise:
        compute, args = _traced_formula, (*args, layout, _places(layout.entries, weight.device))
    if not torch.is_grad_enabled():
        return cast(Tensor, compute(*args))
    used: Tensor = checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=False)
    return used


def _traced_formula(
    weight: Tensor,
    anchor: Tensor | None,
    key: Tensor,
    threshold: Tensor,
    scale: Tensor,
    layout: Layout,
    places: Tensor,
) -> Tensor:
    mask = None if layout.is_elementwise else layout.mask
    view = (layout.entries,) if mask is None else layout.view
    flat = weight.reshape(view)
    towards = None if anchor is None else anchor.reshape(view)
    return masked_formula(flat, towards, key, threshold, scale, mask, places).view(weight.shape)


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
    if not is_traced():
        if is_batched(weight):
            return _evaluate(weight, anchor, key, law, layout, dtype)
        return drop_eagerly(weight, (anchor, key, law, layout, dtype))
    compiling = torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
    if compiling and dtype is None and layout.entries <= SEGMENT:
        return _in_graph(weight, anchor, key, law, layout)
    return _evaluate(weight, anchor, key, law, layout, dtype)


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
    fit = weight.numel() == layout.entries and (anchor is None or anchor.shape == weight.shape)
    by_kernel = fit and layout.is_elementwise and gpu.takes(place)
    if by_kernel and gpu.masked(weight, anchor, None, key, law, used=place) is not None:
        return
    place.copy_(drop_weight(weight.detach(), key, law, layout, anchor))


def drop_both(
    weight: Tensor,
    grad: Tensor | None,
    key: Key,
    law: Law,
    layout: Layout,
    anchor: Tensor | None,
    block: Block | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The masked weight, and the gradient of the weight given that of the masked weight: what a
    backward needs, of one mask. Not for traced code.

    Args:
        weight, key, law, layout, anchor, dtype: see `drop_weight`.
        grad: of the masked weight, of its shape. It may be overwritten. Or None.
        block: memory in which the masked weight may be put.

    Returns:
        both; the gradient in the dtype of the weight.
    """
    if layout.is_elementwise and layout.entries <= SEGMENT and not torch.is_grad_enabled():
        found = masks(weight, anchor, grad, key, law, block, dtype)
        if found is not None:
            return found
    used = drop_weight(weight, key, law, layout, anchor, dtype)
    if grad is None:
        return used, None
    return used, drop_weight(grad, key, law, layout, dtype=weight.dtype)
