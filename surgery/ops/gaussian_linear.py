"""A draw from the Gaussian of a Linear's pre-activation, with less memory traffic and fewer launches
than its parts one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec.config import Unit
from ..torch_private.tensors import unviewed, version_of
from ..torch_private.tracing import is_traced
from . import gpu
from .cpu import native
from .cpu.workspace import Block, borrow, give_back
from .engine import has_kernels
from .extension import loading
from .gaussian import (
    NOISE,
    difference,
    dtype_of_squares,
    gaussian_sample,
    moments_of,
    squared_difference,
)
from .law import Law
from .linear import autocast_dtype
from .once import differentiable_once
from .ordinary import is_ordinary
from .product import matrix
from .versions import check_unmodified


class _GaussianLinear(torch.autograd.Function):
    """x, W, b -> a draw from the Gaussian of x W_used^T + b. Keeps x, W and the derivative by the
    variance; the squares of W are computed again, in memory that is kept. `extension/gaussian.h` is the
    same on a GPU."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor | None,
        ratio: Tensor,
        noise: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        on_gpu = gpu.takes(x, weight, anchor)
        factors = gpu.factors(x, weight, anchor, dtype) if on_gpu else None
        block = borrow(weight) if factors is None else None
        if factors is None:
            factors = _factors(x, weight, anchor, dtype, block)
        offset = None if bias is None else bias.to(dtype)  # autocast would keep what it makes of it
        mean = unviewed(F.linear(factors.x, factors.weight, offset))
        var = F.linear(factors.square_x, factors.square_weight)
        give_back(block)
        sample, slope = _drawn(mean, var, noise, ratio, on_gpu)
        ctx.save_for_backward(x, slope)
        ctx.weight, ctx.version, ctx.anchor = weight, version_of(weight), anchor
        ctx.bias_dtype = None if bias is None else bias.dtype
        return sample

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, slope = ctx.saved_tensors
        rest, want = (ctx.anchor, ctx.bias_dtype), ctx.needs_input_grad[:3]
        found = _gradients_of_node(grads[0], x, slope, ctx.weight, ctx.version, rest, want)
        return *found, None, None, None, None


def _gradients_of_node(
    grad: Tensor,
    x: Tensor,
    slope: Tensor,
    weight: Tensor,
    version: int,
    rest: Any,
    want: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Of x, weight and bias, in backward of the node, here and in C++.

    Args:
        slope: the derivative of the sample by the variance.
        version: that the weight had in forward.
        rest: its anchor, and the dtype of the bias.
    """
    check_unmodified("weight", weight, version)
    anchor, bias_dtype = rest[0], rest[-1]
    with torch.no_grad():
        rows, kept = matrix(grad), (matrix(slope), matrix(x), weight, anchor)
        both = _gradients_on_gpu(rows, kept, want)
        of_x, of_weight = _gradients(rows, kept, want) if both is None else both
        if of_x is not None:
            of_x = of_x.view(*grad.shape[:-1], of_x.shape[1])
        of_bias = rows.sum(0, dtype=bias_dtype) if want[2] else None
    loading.take_kernels()
    return differentiable_once(NOISE, (of_x, of_weight, of_bias), (grad, x, weight))


loading.use(gaussian=_gradients_of_node)


Gradients = tuple[Tensor | None, Tensor | None]
Kept = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""For backward: the derivative of the sample by the variance (rows, out), x (rows, in), the weight and
its anchor."""


def _gradients(rows: Tensor, kept: Kept, want: Sequence[bool]) -> Gradients:
    """The gradients of x and of the weight, each None where it is not wanted.

    Args:
        rows: (rows, out), the gradient of the sample.
    """
    slope, x, weight, anchor = kept
    by_variance, dtype = rows * slope, rows.dtype
    of_x = of_weight = None
    # Tangents, and batches of gradients, cannot be written to memory that exists already.
    in_place = is_ordinary(rows) and not is_traced()
    block = borrow(weight) if in_place else None
    factor, matrix_ = x.to(dtype), weight.to(dtype)
    if want[0]:
        through = by_variance.mm(squared_difference(weight, anchor, dtype, block))
        of_x = _plus_twice(rows.mm(matrix_), factor, through, in_place).to(x.dtype)
    if want[1]:
        moved = difference(weight, anchor, dtype)
        out = None if block is None else block.view(weight)
        through = torch.mm(by_variance.t(), factor.square(), out=out)
        of_weight = _plus_twice(rows.t().mm(factor), moved, through, in_place).to(weight.dtype)
    give_back(block)
    return of_x, of_weight


def _gradients_on_gpu(rows: Tensor, kept: Kept, want: Sequence[bool]) -> Gradients | None:
    """`_gradients` with one kernel before the products and one after them; None elsewhere."""
    slope, x, weight, anchor = kept
    rows = rows.contiguous()
    if not gpu.takes(rows, *kept):
        return None
    wanted = bool(want[0]), bool(want[1])
    factors = gpu.factors(x, weight, anchor, rows.dtype, None, (rows, slope), wanted)
    if factors is None or factors.by_variance is None:
        return None
    by_variance = factors.by_variance
    of_x = of_weight = None
    if want[0]:
        of_x = rows.mm(factors.weight), x, by_variance.mm(factors.square_weight)
    if want[1]:
        of_weight = rows.t().mm(factors.x), weight, by_variance.t().mm(factors.square_x)
    return gpu.add_twice(of_x, of_weight, anchor)


def _plus_twice(total: Tensor, one: Tensor, other: Tensor, in_place: bool) -> Tensor:
    return total.addcmul_(one, other, value=2) if in_place else total + 2 * (one * other)


def _drawn(
    mean: Tensor, var: Tensor, noise: Tensor, ratio: Tensor, on_gpu: bool
) -> tuple[Tensor, Tensor]:
    """mean + sd * noise with sd^2 = ratio * var, and its derivative by var; in place by kernels.

    Args:
        on_gpu: whether those of the GPU take tensors now.
    """
    if on_gpu and gpu.draw(mean, var, noise, mean, var, ratio):
        return mean, var
    known = mean.dtype == torch.float32 and native.takes(mean, var, noise)
    if known and has_kernels("activations"):
        native.sample(mean, var, noise, ratio)
        return mean, var
    # A mode that looks on may keep what products give: selective activation checkpoints do.
    sd = (var.to(noise.dtype) * ratio).sqrt()
    slope = torch.where(sd > 0, noise * (0.5 * ratio) / sd, 0).to(mean.dtype)
    return torch.addcmul(mean, sd, noise).to(mean.dtype), slope


def _factors(
    x: Tensor, weight: Tensor, anchor: Tensor | None, dtype: torch.dtype, block: Block | None
) -> gpu.Factors:
    """x and the weight, and the squares of x and of the weight less its anchor."""
    squares = squared_difference(weight, anchor, dtype, block)
    x = x.to(dtype)
    return gpu.Factors(x, weight.to(dtype), x.square(), squares, None)


def gaussian_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    law: Law,
    unit: Unit,
    anchor: Tensor | None = None,
) -> Tensor:
    """`gaussian_sample` of `moments_of` a linear layer whose bias is not dropped.

    It reads and writes less memory where that is possible: in eager code, for tensors of one wide
    dtype, and on a GPU for products in bfloat16, whose squares then have that dtype too.

    Args:
        x: (..., in).
        weight, anchor: (out, in).
        bias: (out,) or None.
        law, unit: see `moments_of`.

    Returns:
        (..., out), differentiable once.
    """
    plain = type(x) is Tensor and x.dim() > 1 and unit in ("element", "input")
    known = not is_traced() and law.numbers is not None and not law.drops_all
    if not (plain and known and _is_fast(x, weight, anchor, law)):
        return gaussian_sample(*moments_of(F.linear, x, weight, bias, law, unit, anchor))
    dtype = autocast_dtype(x) or x.dtype
    noise = torch.randn(*x.shape[:-1], len(weight), dtype=law.scale.dtype, device=x.device)
    if loading.gaussian is not None:
        rest = anchor, law.ratio, None if bias is None else bias.dtype
        found = loading.gaussian(x, weight, bias, rest, noise)
        if found is not None:
            return found
    args = (x, weight, bias, anchor, law.ratio, noise, dtype)
    sample: Tensor = _GaussianLinear.apply(*args)  # type: ignore[no-untyped-call]
    loading.note_product()
    return sample


def _is_fast(x: Tensor, weight: Tensor, anchor: Tensor | None, law: Law) -> bool:
    """Whether `_GaussianLinear` is for these tensors: all of one wide dtype, or on a GPU and multiplied
    in bfloat16."""
    dtype, wide = (autocast_dtype(x) or x.dtype), law.scale.dtype
    same = x.dtype == weight.dtype == dtype
    if dtype == wide:
        return same and weight.is_contiguous()
    cast = {x.dtype, weight.dtype} <= {dtype, wide} and autocast_dtype(x) is not None
    squares = dtype_of_squares(dtype, wide)
    return (same or cast) and squares == dtype and gpu.takes(x, weight, anchor)
