"""The pre-activation as a Gaussian: its exact first two moments, and a sample with them.

    u = W_used x + b        mean = W x + b        var = p / (1 - p) * ((W - A)^2 x^2)

Moments: Wan et al. 2013, section 3.2, with the factor that their scaling of weights leaves out and the
variance of a masked bias. Sampling: the local reparameterisation of Kingma, Salimans and Welling 2015.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec.config import Unit
from ..torch_private.tracing import is_traced
from . import gpu
from .cpu.workspace import Block, borrow, give_back
from .law import Law, ratio_of
from .linear import has_autocast
from .once import differentiable_once
from .ordinary import is_ordinary
from .random import drawn

ProductFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""`product(x, weight, bias)`: `F.linear`, a convolution, or any other operation in which every output
is the bias plus a sum of products of an input and a weight, with no weight twice in one sum."""

Moments = tuple[Tensor, Tensor]


def moments_of(
    product: ProductFunction,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    law: Law,
    unit: Unit,
    anchor: Tensor | None = None,
    bias_anchor: Tensor | None = None,
    bias_law: Law | None = None,
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
        bias_law: that of the bias, which is masked entry by entry, or by the number that masks its row
            for "output" and the whole weight for "tensor"; None: it is not masked.

    Returns:
        mean and variance, in the dtype of the product. The variance of narrow floats is computed in
        float32, where squares neither overflow nor vanish; on a GPU, that of bfloat16 of squares in
        bfloat16, see `dtype_of_squares`.

    Raises:
        ValueError: `unit="input"` with a kernel of more than one position.
    """
    if unit == "input" and math.prod(weight.shape[2:]) != 1:
        raise ValueError(
            f'unit="input" has no simple variance for a weight of shape {tuple(weight.shape)}: '
            "one mask entry multiplies several inputs of each output, whose products correlate. Use "
            'unit="element" or unit="output"'
        )
    mean_bias, moved_bias, wide = bias, None, law.scale.dtype
    if bias is not None and bias_law is not None:
        mean_bias = average(bias, bias_anchor, bias_law)
        moved_bias = difference(bias, bias_anchor, wide)
    mean = product(x, average(weight, anchor, law), mean_bias)
    ratio = _ratio(law)
    with _no_autocast(x.device.type):
        if moved_bias is not None and bias_law is not None and bias_law is not law:
            factors = x.to(wide), difference(weight, anchor, wide), moved_bias
            var = _variance_of_two(product, *factors, ratio, _ratio(bias_law), unit)
            return mean, var.to(dtype_of_squares(mean.dtype, wide))
        if unit in ("output", "tensor"):
            var = product(x.to(wide), difference(weight, anchor, wide), moved_bias).square()
        else:
            squared_bias = None if moved_bias is None else moved_bias.square()
            given = x, weight, anchor, squared_bias
            scaled = None if law.numbers is None else _squares_on_gpu(*given, law, mean.dtype)
            if scaled is not None:
                return mean, product(*scaled).to(dtype_of_squares(mean.dtype, wide))
            block = _block_for_squares(x, weight, wide)
            squares = squared_difference(weight, anchor, wide, block)
            var = product(x.to(wide).square(), squares, squared_bias)
            give_back(block)
        scaled_var = ratio * var if torch.is_grad_enabled() or is_traced() else var.mul_(ratio)
        return mean, scaled_var.to(dtype_of_squares(mean.dtype, wide))


linear_moments = functools.partial(moments_of, F.linear)
"""`moments_of` a linear layer: x is (..., in), the weight (out, in), and each moment (..., out)."""


def variance_of_product(
    product: ProductFunction, mean: Tensor, variance: Tensor, weight: Tensor, law: Law
) -> Tensor:
    """The variance of `product(x, W_used)` under masks by element or by input, towards zero, where the
    entries of x vary independently: `W^2 (p mean^2 + variance) / (1 - p)`, by one product.

    Args:
        mean, variance: of x, in a wide dtype.
        weight: not contiguous, or of a narrow dtype, it is copied.
    """
    wide = variance.dtype
    recorded = variance if variance.requires_grad else mean
    block = _block_for_squares(recorded, weight, wide)
    squares = squared_difference(weight, None, wide, block)
    if law.numbers is None:
        share = law.threshold.to(wide) * 2.0**-32 + 0.5
        both = (variance + share * mean.square()) * law.scale.to(wide)
        return product(both, squares, None)
    p, scale = (law.numbers[0] + 2**31) / 2**32, law.numbers[1]
    both = torch.addcmul(variance, mean, mean, value=p)
    if block is not None and weight.numel() < both.numel():
        squares.mul_(scale)
    else:
        both = both * scale
    found = product(both, squares, None)
    give_back(block)
    return found


def _variance_of_two(
    product: ProductFunction,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    ratio: Tensor,
    bias_ratio: Tensor,
    unit: Unit,
) -> Tensor:
    """The variance where weight and bias differ in p.

    Where one random number masks both, the one of smaller p is kept whenever the other is. So their
    covariance has the smaller of the two ratios.
    """
    if unit not in ("output", "tensor"):
        return product(x.square(), ratio * weight.square(), bias_ratio * bias.square())
    of_weight = product(x, weight, None)
    of_bias = product(x, weight, bias) - of_weight
    shared = 2 * torch.minimum(ratio, bias_ratio) * of_weight * of_bias
    return ratio * of_weight.square() + bias_ratio * of_bias.square() + shared


def _squares_on_gpu(
    x: Tensor,
    weight: Tensor,
    anchor: Tensor | None,
    squared_bias: Tensor | None,
    law: Law,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """The arguments of the product that gives the variance, of which weight and bias are multiplied by
    the ratio, by one kernel. None on other devices than a GPU, and where somebody differentiates by
    them."""
    recorded = x, weight, squared_bias
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in recorded):
        return None
    if not gpu.takes(x, weight, anchor):
        return None
    squares = dtype_of_squares(dtype, law.scale.dtype)
    factors = gpu.factors(x, weight, anchor, squares, law.ratio, copies=False)
    if factors is None:
        return None
    offset = None if squared_bias is None else (squared_bias * law.ratio).to(squares)
    return factors.square_x, factors.square_weight, offset


def dtype_of_squares(dtype: torch.dtype, wide: torch.dtype) -> torch.dtype:
    """In which dtype a GPU multiplies squares, for a pre-activation of dtype `dtype`.

    bfloat16 has the range of float32, and its products run many times faster, with sums in float32.
    Rounding a square changes it by up to 2^-8 of itself. The errors of different squares are unrelated,
    so a sum of n products of two squares is off by about 2^-9 sqrt(k / n) of itself, where
    k = E[(x w)^4] / E[(x w)^2]^2 is 9 for Gaussians, and its root, the standard deviation, by half of
    that. Rounding the sum to bfloat16 adds up to 2^-9. Both are no more than the error of 2^-8 that the
    pre-activation itself has in bfloat16, and the mean is not affected.

    Squares of float16 overflow above 256 and vanish below 2^-12: they are multiplied in float32.
    """
    return dtype if dtype == torch.bfloat16 else wide


def _block_for_squares(x: Tensor, weight: Tensor, wide: torch.dtype) -> Block | None:
    """Memory for the squares of a weight; None where autograd would have to keep them, for the gradient
    of the weight or of x."""
    recorded = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if recorded or is_traced() or not weight.is_contiguous() or weight.dtype != wide:
        return None
    return borrow(weight) if is_ordinary(x) else None


def _no_autocast(kind: str) -> AbstractContextManager[Any]:
    if has_autocast(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def _ratio(law: Law) -> Tensor:
    return ratio_of(law) if is_traced() else law.ratio


def average(weight: Tensor, anchor: Tensor | None, law: Law) -> Tensor:
    """The expectation of the masked weight: the weight, unless every entry is dropped."""
    if law.numbers is not None and not law.drops_all:
        return weight
    zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
    return torch.where(law.scale == 0, zero if anchor is None else anchor, weight)


def difference(weight: Tensor, anchor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """W - A in that dtype: what a mask multiplies."""
    wide = weight.to(dtype)
    return wide if anchor is None else wide - anchor.to(dtype)


def safe_sqrt(var: Tensor) -> Tensor:
    """The square root, with gradient 0 at 0.

    A variance is zero where weights or inputs are zero, and the gradient of a square at zero is zero:
    so nothing would come of an infinite slope but NaN.
    """
    positive = var > 0
    return torch.where(positive, torch.where(positive, var, 1).sqrt(), 0)


def _drawn(mean: Tensor, var: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """mean + sqrt(var) * noise, and its derivative by var."""
    if gpu.takes(mean, var, noise):
        sample, slope = torch.empty_like(mean), torch.empty_like(mean)
        if gpu.draw(mean, var, noise, sample, slope, None):
            return sample, slope
    sd = safe_sqrt(var.to(noise.dtype))
    slope = torch.where(sd > 0, noise / (2 * sd), 0)
    return (mean + sd * noise).to(mean.dtype), slope.to(mean.dtype)


NOISE = "a draw of sampling='gaussian'"


class _Sample(torch.autograd.Function):
    """mean + sqrt(var) * noise. Keeps one tensor for backward, the derivative by var. For eager code:
    in a traced graph the compiler decides what to keep."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor, noise: Tensor, edge: Tensor) -> Tensor:
        sample, slope = _drawn(mean, var, noise)
        ctx.save_for_backward(slope, edge)
        return sample

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        slope, edge = ctx.saved_tensors
        with torch.no_grad():
            of_var = grads[0] * slope
        (of_var,) = differentiable_once(NOISE, (of_var,), (grads[0], edge))
        return grads[0], of_var, None, None


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
    edge = var.unsqueeze(0)[:0].clone()  # no values: backward knows of which variance
    sample: Tensor = _Sample.apply(mean, var, noise, edge)  # type: ignore[no-untyped-call]
    return sample


def squared_difference(
    weight: Tensor, anchor: Tensor | None, dtype: torch.dtype, block: Block | None
) -> Tensor:
    """(W - A)^2 in that dtype, in a block of memory if there is one."""
    moved = difference(weight, anchor, dtype)
    return moved.square() if block is None else torch.square(moved, out=block.view(weight))
