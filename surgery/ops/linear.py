"""The product with a masked weight, and its gradients: what an operated Linear does.

`F.linear(x, drop_weight(W))` gives the same. But then backward draws the mask twice, for the masked
weight and for the gradient, and autograd keeps the masked weight unless hooks on saved tensors replace
it (`surgery.modules.recompute`, for all other modules). Here backward draws it once, for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..torch_private.compiler import constant_in_traces
from ..torch_private.functional import apply_of
from ..torch_private.modes import any_autocast
from ..torch_private.tensors import unviewed, version_of
from . import gpu
from .cpu.workspace import borrow, give_back
from .extension import loading
from .hash import Key
from .law import Law, Layout, Mask
from .mask import drop, drop_both
from .product import ROWS, How, convolution_gradients, matrix, of_input, of_weight
from .versions import check_unmodified

Rest = tuple[Mask, Tensor | None, str]
"""Mask, anchor and name of a weight: one argument of an autograd Function, as each costs time at every
call."""


class _MaskedLinear(torch.autograd.Function):
    """x, W, b -> x W_used^T + b. Keeps x, W and the key; and W_used, if it is a cast of W, as autograd
    does for a plain layer.

    `extension/linear.cpp` is the same in C++, and keeps the same.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rest: Rest) -> Tensor:
        mask, anchor, _ = rest
        kept = None
        # On a GPU, kernels convert to the dtype of the product; on the CPU, memory is used again.
        if _on_gpu(weight, rest) and (
            masked := gpu.masked(weight, anchor, None, mask, x.dtype, taken=True)
        ):
            used, _ = masked
            kept = used if used.dtype != weight.dtype else None
            found = _linear(x, used, bias, weight.requires_grad)
        else:
            found = product(x, weight, bias, mask, anchor, weight.requires_grad)
        ctx.save_for_backward(x if weight.requires_grad else None, kept)
        ctx.weight, ctx.version, ctx.rest = weight, version_of(weight), rest
        return unviewed(found)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, kept = ctx.saved_tensors
        want = ctx.needs_input_grad
        return *_gradients(grads[0], x, ctx.weight, kept, ctx.version, ctx.rest, want), None


def _gradients(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    kept: Tensor | None,
    version: int,
    rest: Rest,
    want: Sequence[bool],
    how: How = ROWS,
) -> tuple[Tensor | None, ...]:
    """Of x, weight and bias, in backward of the node, here and in C++.

    Args:
        kept: the masked weight, where the node keeps it.
        version: that the weight had in forward.
    """
    mask, anchor, name = rest
    if kept is None or torch.is_grad_enabled():
        check_unmodified(name, weight, version)
        return gradients(grad, x, weight, mask, anchor, want, _on_gpu(weight, rest), how)
    to_x = None
    if want[0]:
        to_x = of_input(matrix(grad), kept, how).view(*grad.shape[:-1], -1)
    none = False, *want[1:]
    return to_x, *gradients(grad, x, weight, mask, anchor, none, how=how)[1:]


def _gradients_of_filters(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    kept: Tensor | None,
    version: int,
    rest: Rest,
    want: Sequence[bool],
    how: How,
) -> tuple[Tensor | None, ...]:
    """The same of a convolution."""
    mask, anchor, name = rest
    if kept is None or torch.is_grad_enabled():
        check_unmodified(name, weight, version)
        kept = drop(weight, anchor, mask, grad.dtype)
    to_x, to_weight, to_bias = convolution_gradients(grad, x, kept, how, want)
    if to_weight is not None:
        to_weight = drop(to_weight, None, mask, weight.dtype)
    return to_x, to_weight, to_bias


def _on_gpu(weight: Tensor, rest: Rest) -> bool:
    mask, anchor, _ = rest
    return gpu.is_there(weight) and mask.layout.is_elementwise and gpu.reads(weight, anchor)


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Mask,
    anchor: Tensor | None,
    trained: bool,
) -> Tensor:
    """`F.linear(x, W_used, bias)`, with the masked weight in memory that is used again.

    Args:
        trained: whether a gradient of the weight will be wanted.
    """
    block = borrow(weight)
    used, _ = drop_both(weight, anchor, None, mask, block)
    found = _linear(x, used, bias, trained)
    give_back(block)
    return found


def _linear(x: Tensor, used: Tensor, bias: Tensor | None, trained: bool) -> Tensor:
    return F.linear(x, as_if_trained(used) if bias is None and trained else used, bias)


def gradients(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    mask: Mask,
    anchor: Tensor | None,
    want: Sequence[bool],
    on_gpu: bool = False,
    how: How = ROWS,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias; each None where it is not wanted.

    Args:
        grad: (..., out), of the product.
        x: (..., in); None where the gradient of the weight is not wanted.
        want: of x, weight and bias.
        on_gpu: whether the kernels of the GPU take the weight.
        how: no convolution.
    """
    rows = matrix(grad)
    to_x = to_weight = masked = block = None
    if want[1]:
        assert x is not None
        to_weight = of_weight(rows, x, how)
    if want[0]:
        if on_gpu and not torch.is_grad_enabled() and gpu.takes(rows):
            masked = gpu.masked(weight, anchor, to_weight, mask, rows.dtype, taken=True)
        if masked is None:
            block = borrow(weight)
            to_weight = None if to_weight is None else _as(weight, to_weight)
            masked = drop_both(weight, anchor, to_weight, mask, block)
        used, to_weight = masked
        to_x = of_input(rows, _as(rows, used), how)
        give_back(block)
        if grad.dim() > 2:
            to_x = to_x.view(*grad.shape[:-1], weight.shape[1])
    elif to_weight is not None:
        to_weight = drop(to_weight, None, mask, weight.dtype)
    return to_x, to_weight, rows.sum(0) if want[2] else None


def as_if_trained(used: Tensor) -> Tensor:
    """A masked weight that requires a gradient, although none is recorded. `matmul` looks at that when
    it chooses how to fold a batch, and so how to round. The result is a view, since autocast keeps the
    copies that it makes of leaves until it ends."""
    with torch.enable_grad():
        return used.detach().requires_grad_().view_as(used)


def _as(like: Tensor, tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    key: Key,
    law: Law,
    layout: Layout,
    anchor: Tensor | None = None,
    name: str = "weight",
) -> Tensor:
    """`F.linear(x, drop_weight(weight, key, law, layout, anchor), bias)`, to the bit, in eager code.

    Args:
        x: (..., in), at least two dimensions.
        weight: (out, in).
        bias: (out,), or None.
        key, law, layout, anchor: see `drop_weight`.
        name: of the weight, for the error.

    Returns:
        (..., out), differentiable any number of times. Backward raises `RuntimeError` if the weight was
        changed since, unless autograd keeps the masked weight: under autocast on a GPU.
    """
    rest: Rest = Mask(key, law, layout), anchor, name
    loading.note_product()
    narrow = autocast_dtype(x) if any_autocast() else None
    if narrow is not None:
        x, bias = x.to(narrow), None if bias is None else bias.to(narrow)
    found: Tensor = _apply(x, weight, bias, rest)
    return found


_apply = apply_of(_MaskedLinear)


def _gradients_of_node(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    kept: Tensor | None,
    version: int,
    key: Key,
    about: tuple[Law, Layout, Tensor | None, str, How],
    want: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    law, layout, anchor, name, how = about
    rest = Mask(key, law, layout), anchor, name
    of_kind = _gradients_of_filters if len(how) == 4 else _gradients
    found = of_kind(grad, x, weight, kept, version, rest, want, how)  # type: ignore[arg-type]
    loading.take_kernels()
    return found


loading.use(eager=_gradients_of_node)


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The tensors as `F.linear` would cast them."""
    dtype = autocast_dtype(x)
    if dtype is None:
        return x, *others
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in (x, *others))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of an input of a product; None where it leaves it."""
    kind = x.device.type
    if not has_autocast(kind) or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


@constant_in_traces
def has_autocast(kind: str) -> bool:
    """Whether there is autocast for a type of device. Until torch 2.10 dynamo cannot trace the
    question, and does not need to: the answer never changes."""
    return torch.amp.is_autocast_available(kind)
