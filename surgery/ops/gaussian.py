"""The pre-activation as a Gaussian: its exact first two moments, and a sample with them.

    u = W_used x + b        mean = W x + b        var = p / (1 - p) * ((W - A)^2 x^2)

Moments: Wan et al. 2013, section 3.2, with the factor that their scaling of weights leaves out and the
variance of a masked bias. Sampling: the local reparameterisation of Kingma, Salimans and Welling 2015.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Unit
from ..errors import check_unmodified, version_of
from . import native
from .engine import has_kernels
from .linear import autocast, has_autocast, matrix
from .mask import Law
from .ordinary import is_ordinary, unviewed
from .random import drawn
from .tracing import is_traced
from .workspace import Block, borrow, give_back

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""`product(x, weight, bias)`: any operation in which every output is the sum of the bias and of
products of an input and a weight, each weight at most once: `F.linear`, or a convolution."""

Moments = tuple[Tensor, Tensor]


def linear_moments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    law: Law,
    unit: Unit,
    anchor: Tensor | None = None,
    bias_anchor: Tensor | None = None,
    drop_bias: bool = False,
) -> Moments:
    """Mean and variance of every pre-activation of a linear layer; see `moments_of`.

    Args:
        x: (..., in).
        weight, anchor: (out, in).
        bias, bias_anchor: (out,) or None.

    Returns:
        two tensors (..., out).
    """
    return moments_of(F.linear, x, weight, bias, law, unit, anchor, bias_anchor, drop_bias)


def moments_of(
    product: Product,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    law: Law,
    unit: Unit,
    anchor: Tensor | None = None,
    bias_anchor: Tensor | None = None,
    drop_bias: bool = False,
) -> Moments:
    """The exact mean and variance over masks of each entry of `product(x, W_used, b_used)`.

    Args:
        product: how input, weight and bias combine. Padding, stride, dilation and groups are its own.
        x, weight, bias: its arguments; bias may be None.
        law: the drop probability p. The mean is that of the unmasked product for every p below 1; for
            p = 1, where every weight is its anchor, the product with the anchors.
        unit: what shares a mask entry. "input" needs a weight whose dimensions after the second have
            one entry each: elsewhere it multiplies several inputs, whose products correlate.
        anchor, bias_anchor: where dropped weights go; None is zero.
        drop_bias: whether the bias is masked: entry by entry, or with its row for "output", with the
            whole weight for "tensor".

    Returns:
        mean and variance, in the dtype of the product. The variance of narrow floats is computed in
        float32, where squares neither overflow nor vanish.

    Raises:
        ValueError: `unit="input"` with a kernel of more than one position.
    """
    if unit == "input" and math.prod(weight.shape[2:]) != 1:
        raise ValueError(
            f'unit="input" has no simple variance for a weight of shape {tuple(weight.shape)}: '
            "one mask entry multiplies several inputs of each output, whose products correlate. Use "
            'unit="element" or unit="output"'
        )
    mean_bias = _average(bias, bias_anchor, law) if drop_bias and bias is not None else bias
    mean = product(x, _average(weight, anchor, law), mean_bias)
    ratio = _ratio(law)
    wide = law.scale.dtype
    spread_bias = _difference(bias, bias_anchor, wide) if drop_bias and bias is not None else None
    with _no_autocast(x.device.type):
        if unit in ("output", "tensor"):
            var = product(x.to(wide), _difference(weight, anchor, wide), spread_bias).square()
        else:
            squared_bias = None if spread_bias is None else spread_bias.square()
            block = _block_for_squares(weight, wide)
            squares = _squares(weight, anchor, wide, block)
            var = product(x.to(wide).square(), squares, squared_bias)
            give_back(block)
        return mean, (ratio * var).to(mean.dtype)


def _block_for_squares(weight: Tensor, wide: torch.dtype) -> Block | None:
    """Memory for the squares of a weight, if nobody differentiates by it."""
    recorded = torch.is_grad_enabled() and weight.requires_grad
    if recorded or is_traced() or not weight.is_contiguous() or weight.dtype != wide:
        return None
    return borrow(weight)


def _no_autocast(kind: str) -> AbstractContextManager[Any]:
    if has_autocast(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def _ratio(law: Law) -> Tensor:
    """p / (1 - p), or 0 if everything is dropped."""
    return torch.where(law.scale == 0, 0, law.scale - 1) if is_traced() else law.ratio


def _average(weight: Tensor, anchor: Tensor | None, law: Law) -> Tensor:
    """The expectation of the masked weight: the weight, unless every entry is dropped."""
    if law.numbers is not None and not law.drops_all:
        return weight
    zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
    return torch.where(law.scale == 0, zero if anchor is None else anchor, weight)


def _difference(weight: Tensor, anchor: Tensor | None, dtype: torch.dtype) -> Tensor:
    wide = weight.to(dtype)
    return wide if anchor is None else wide - anchor.to(dtype)


def safe_sqrt(var: Tensor) -> Tensor:
    """The square root, with gradient 0 at 0.

    A variance of zero comes from weights or inputs that are zero themselves, whose own gradient from a
    square is zero too.
    """
    positive = var > 0
    return torch.where(positive, torch.where(positive, var, 1).sqrt(), 0)


class _Sample(torch.autograd.Function):
    """mean + sqrt(var) * noise, keeping one tensor: the derivative by var. Of a traced graph, its
    compiler decides what to keep."""

    @staticmethod
    def forward(mean: Tensor, var: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        sd = safe_sqrt(var.to(noise.dtype))
        slope = torch.where(sd > 0, noise / (2 * sd), 0)
        return (mean + sd * noise).to(mean.dtype), slope.to(mean.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (slope,) = ctx.saved_tensors
        return grads[0], grads[0] * slope, None


def gaussian_sample(mean: Tensor, var: Tensor) -> Tensor:
    """A draw from N(mean, var), entry by entry, through torch's generator.

    Args:
        mean, var: the same shape; var is at least 0.

    Returns:
        `mean + sqrt(var) * noise`, dtype of `mean`; differentiable once in both, where the gradient of
        the variance is 0 at var = 0.
    """
    wide = torch.promote_types(mean.dtype, torch.float32)
    noise = drawn(torch.randn_like, mean, dtype=wide)
    if is_traced():
        return (mean + safe_sqrt(var.to(wide)) * noise).to(mean.dtype)
    sample: Tensor = _Sample.apply(mean, var, noise)[0]  # type: ignore[no-untyped-call]
    return sample


class _GaussianLinear(torch.autograd.Function):
    """x, W, b -> a draw from the Gaussian of x W_used^T + b. Keeps x, W and the derivative by the
    variance; the squares of W are computed again, in memory that is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor | None,
        ratio: Tensor,
        noise: Tensor,
    ) -> Tensor:
        mean = unviewed(F.linear(x, weight, bias))
        block = borrow(weight)
        var = F.linear(x.square(), _squares(weight, anchor, weight.dtype, block))
        give_back(block)
        sample, slope = _drawn(mean, var, noise, ratio)
        ctx.save_for_backward(x, slope)
        ctx.weight, ctx.version, ctx.anchor = weight, version_of(weight), anchor
        return sample

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        check_unmodified("weight", ctx.weight, ctx.version)
        x, slope = (matrix(tensor) for tensor in ctx.saved_tensors)
        want_x, want_weight, want_bias = ctx.needs_input_grad[:3]
        weight, rows = ctx.weight, matrix(grads[0])
        by_variance = rows * slope
        of_x = of_weight = None
        # Neither tangents nor batches of gradients can be written to memory that is there.
        in_place = is_ordinary(rows) and not is_traced()
        block = borrow(weight) if in_place else None
        if want_x:
            through = by_variance.mm(_squares(weight, ctx.anchor, weight.dtype, block))
            of_x = _plus_twice(rows.mm(weight), x, through, in_place)
            of_x = of_x.view(*grads[0].shape[:-1], weight.shape[1])
        if want_weight:
            spread = _difference(weight, ctx.anchor, weight.dtype)
            place = None if block is None else block.view(weight)
            through = torch.mm(by_variance.t(), x.square(), out=place)
            of_weight = _plus_twice(rows.t().mm(x), spread, through, in_place)
        give_back(block)
        return of_x, of_weight, rows.sum(0) if want_bias else None, None, None, None


def _plus_twice(total: Tensor, one: Tensor, other: Tensor, in_place: bool) -> Tensor:
    return total.addcmul_(one, other, value=2) if in_place else total + 2 * (one * other)


def _drawn(mean: Tensor, var: Tensor, noise: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """mean + sd * noise with sd^2 = ratio * var, and its derivative by var; in place."""
    known = mean.dtype == torch.float32 and native.takes(mean, var, noise)
    if known and has_kernels("activations"):
        native.sample(mean, var, noise, ratio)
        return mean, var
    sd = var.mul_(ratio).sqrt_()
    slope = torch.where(sd > 0, noise * (0.5 * ratio) / sd, 0)
    return mean.addcmul_(sd, noise), slope


def _squares(
    weight: Tensor, anchor: Tensor | None, dtype: torch.dtype, block: Block | None
) -> Tensor:
    spread = _difference(weight, anchor, dtype)
    return spread.square() if block is None else torch.square(spread, out=block.view(weight))


def gaussian_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    law: Law,
    unit: Unit,
    anchor: Tensor | None = None,
) -> Tensor:
    """`gaussian_sample` of `moments_of` a linear layer whose bias is not dropped, with less memory
    traffic where that is possible: in eager code, for tensors of one wide dtype.

    Args:
        x: (..., in).
        weight, anchor: (out, in).
        bias: (out,) or None.
        law, unit: see `moments_of`.

    Returns:
        (..., out), differentiable once.
    """
    wide = x.dtype == weight.dtype == law.scale.dtype and weight.is_contiguous()
    plain = type(x) is Tensor and x.dim() > 1 and unit in ("element", "input")
    if is_traced() or not (wide and plain) or law.drops_all or autocast(x)[0] is not x:
        return gaussian_sample(*moments_of(F.linear, x, weight, bias, law, unit, anchor))
    noise = torch.randn(*x.shape[:-1], len(weight), dtype=x.dtype, device=x.device)
    args = (x, weight, bias, anchor, law.ratio, noise)
    sample: Tensor = _GaussianLinear.apply(*args)  # type: ignore[no-untyped-call]
    return sample
