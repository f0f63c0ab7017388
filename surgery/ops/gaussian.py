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
from . import gpu, native
from .engine import has_kernels
from .linear import has_autocast, matrix
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
    bias_law: Law | None = None,
) -> Moments:
    """Mean and variance of every pre-activation of a linear layer; see `moments_of`.

    Args:
        x: (..., in).
        weight, anchor: (out, in).
        bias, bias_anchor: (out,) or None.

    Returns:
        two tensors (..., out).
    """
    return moments_of(F.linear, x, weight, bias, law, unit, anchor, bias_anchor, bias_law)


def moments_of(
    product: Product,
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
        bfloat16, see `_dtype_of_squares`.

    Raises:
        ValueError: `unit="input"` with a kernel of more than one position.
    """
    if unit == "input" and math.prod(weight.shape[2:]) != 1:
        raise ValueError(
            f'unit="input" has no simple variance for a weight of shape {tuple(weight.shape)}: '
            "one mask entry multiplies several inputs of each output, whose products correlate. Use "
            'unit="element" or unit="output"'
        )
    mean_bias, spread_bias, wide = bias, None, law.scale.dtype
    if bias is not None and bias_law is not None:
        mean_bias = _average(bias, bias_anchor, bias_law)
        spread_bias = _difference(bias, bias_anchor, wide)
    mean = product(x, _average(weight, anchor, law), mean_bias)
    ratio = _ratio(law)
    with _no_autocast(x.device.type):
        if spread_bias is not None and bias_law is not None and bias_law is not law:
            spread = _difference(weight, anchor, wide)
            factors = x.to(wide), spread, spread_bias
            var = _variance_of_two(product, *factors, ratio, _ratio(bias_law), unit)
            return mean, var.to(mean.dtype)
        if unit in ("output", "tensor"):
            var = product(x.to(wide), _difference(weight, anchor, wide), spread_bias).square()
        else:
            squared_bias = None if spread_bias is None else spread_bias.square()
            given = x, weight, anchor, squared_bias
            found = None if law.numbers is None else _squares_on_gpu(*given, law, mean.dtype)
            if found is not None:
                return mean, product(*found).to(mean.dtype)
            block = _block_for_squares(weight, wide)
            squares = _squares(weight, anchor, wide, block)
            var = product(x.to(wide).square(), squares, squared_bias)
            give_back(block)
        return mean, (ratio * var).to(mean.dtype)


def _variance_of_two(
    product: Product,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    ratio: Tensor,
    bias_ratio: Tensor,
    unit: Unit,
) -> Tensor:
    """The variance where weight and bias differ in p. Where one number masks both, whichever has the
    smaller p is kept when the other is; so their covariance has the smaller ratio."""
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
    """What the product of the variance takes, its weight and bias times the ratio, by one kernel: where
    nobody differentiates by them, on a GPU; or None."""
    recorded = x, weight, squared_bias
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in recorded):
        return None
    if not gpu.takes(x, weight, anchor):
        return None
    squares = _dtype_of_squares(dtype, law.scale.dtype)
    found = gpu.factors(x, weight, anchor, squares, law.ratio, copies=False)
    if found is None:
        return None
    offset = None if squared_bias is None else (squared_bias * law.ratio).to(squares)
    return found.square_x, found.square_weight, offset


def _dtype_of_squares(dtype: torch.dtype, wide: torch.dtype) -> torch.dtype:
    """In which dtype a GPU multiplies squares, for a pre-activation of dtype `dtype`.

    bfloat16 has the range of float32, and products of it run many times faster, with sums in float32.
    A square is rounded by up to 2^-8 of itself. So the sum of n products of two, whose roundings are
    unrelated, is off by about 2^-9 sqrt(k / n) of itself, where k = E[(x w)^4] / E[(x w)^2]^2 is 9 for
    Gaussians, and the standard deviation by half of that. Rounding the sum to bfloat16 adds up to 2^-9.
    Neither is above what rounding the pre-activation costs, 2^-8; and the mean has none of it.
    Squares of float16 overflow above 256 and vanish below 2^-12: they are multiplied in float32.
    """
    return dtype if dtype == torch.bfloat16 else wide


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
        if gpu.takes(mean, var, noise):
            sample, slope = torch.empty_like(mean), torch.empty_like(mean)
            if gpu.draw(mean, var, noise, sample, slope, None):
                return sample, slope
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
        dtype: torch.dtype,
    ) -> Tensor:
        block = borrow(weight)
        factor, matrix_, square, squares = _factors(x, weight, anchor, dtype, block)
        offset = None if bias is None else bias.to(dtype)  # autocast would keep what it makes of it
        mean = unviewed(F.linear(factor, matrix_, offset))
        var = F.linear(square, squares)
        give_back(block)
        sample, slope = _drawn(mean, var, noise, ratio)
        ctx.save_for_backward(x, slope)
        ctx.weight, ctx.version, ctx.anchor = weight, version_of(weight), anchor
        ctx.bias_dtype = None if bias is None else bias.dtype
        return sample

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        check_unmodified("weight", ctx.weight, ctx.version)
        x, slope = (matrix(tensor) for tensor in ctx.saved_tensors)
        want_x, want_weight, want_bias = ctx.needs_input_grad[:3]
        rows, want = matrix(grads[0]), (want_x, want_weight)
        found = _gradients_on_gpu(rows, slope, x, ctx.weight, ctx.anchor, want)
        if found is None:
            found = _gradients(rows, slope, x, ctx.weight, ctx.anchor, want)
        of_x, of_weight = found
        if of_x is not None:
            of_x = of_x.view(*grads[0].shape[:-1], of_x.shape[1])
        of_bias = rows.sum(0, dtype=ctx.bias_dtype) if want_bias else None
        return of_x, of_weight, of_bias, None, None, None, None


Gradients = tuple[Tensor | None, Tensor | None]


def _gradients(
    rows: Tensor,
    slope: Tensor,
    x: Tensor,
    weight: Tensor,
    anchor: Tensor | None,
    want: tuple[bool, bool],
) -> Gradients:
    """Of x and of the weight, if they are wanted.

    Args:
        rows: (rows, out), the gradient of the sample.
        slope: of that shape, the derivative of the sample by the variance.
        x: (rows, in).
    """
    by_variance, dtype = rows * slope, rows.dtype
    of_x = of_weight = None
    # Neither tangents nor batches of gradients can be written to memory that is there.
    in_place = is_ordinary(rows) and not is_traced()
    block = borrow(weight) if in_place else None
    factor, matrix_ = x.to(dtype), weight.to(dtype)
    if want[0]:
        through = by_variance.mm(_squares(weight, anchor, dtype, block))
        of_x = _plus_twice(rows.mm(matrix_), factor, through, in_place).to(x.dtype)
    if want[1]:
        spread = _difference(weight, anchor, dtype)
        place = None if block is None else block.view(weight)
        through = torch.mm(by_variance.t(), factor.square(), out=place)
        of_weight = _plus_twice(rows.t().mm(factor), spread, through, in_place).to(weight.dtype)
    give_back(block)
    return of_x, of_weight


def _gradients_on_gpu(
    rows: Tensor,
    slope: Tensor,
    x: Tensor,
    weight: Tensor,
    anchor: Tensor | None,
    want: tuple[bool, bool],
) -> Gradients | None:
    """`_gradients` with one kernel before the products and one after them; None elsewhere."""
    if not gpu.takes(slope, x, weight, anchor) or not gpu.takes(rows := rows.contiguous()):
        return None
    found = gpu.factors(x, weight, anchor, rows.dtype, None, (rows, slope), want)
    if found is None or found.by_variance is None:
        return None
    by_variance = found.by_variance
    of_x = of_weight = None
    if want[0]:
        of_x = rows.mm(found.weight), x, by_variance.mm(found.square_weight)
    if want[1]:
        of_weight = rows.t().mm(found.x), weight, by_variance.t().mm(found.square_x)
    return gpu.add_twice(of_x, of_weight, anchor)


def _plus_twice(total: Tensor, one: Tensor, other: Tensor, in_place: bool) -> Tensor:
    return total.addcmul_(one, other, value=2) if in_place else total + 2 * (one * other)


def _drawn(mean: Tensor, var: Tensor, noise: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """mean + sd * noise with sd^2 = ratio * var, and its derivative by var; in place."""
    if gpu.takes(mean, var, noise) and gpu.draw(mean, var, noise, mean, var, ratio):
        return mean, var
    known = mean.dtype == torch.float32 and native.takes(mean, var, noise)
    if known and has_kernels("activations"):
        native.sample(mean, var, noise, ratio)
        return mean, var
    sd = var.to(noise.dtype).mul_(ratio).sqrt_()
    slope = torch.where(sd > 0, noise * (0.5 * ratio) / sd, 0).to(mean.dtype)
    return mean.addcmul_(sd, noise), slope


def _factors(
    x: Tensor, weight: Tensor, anchor: Tensor | None, dtype: torch.dtype, block: Block | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x and the weight, and the squares of x and of the weight less its anchor."""
    if gpu.takes(x, weight, anchor):
        found = gpu.factors(x, weight, anchor, dtype)
        if found is not None:
            return found[:4]
    squares = _squares(weight, anchor, dtype, block)
    x = x.to(dtype)
    return x, weight.to(dtype), x.square(), squares


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
    traffic where that is possible: in eager code, for tensors of one wide dtype, and on a GPU for
    products in bfloat16, whose squares are then of it too.

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
    dtype = _dtype_of_product(x)
    noise = torch.randn(*x.shape[:-1], len(weight), dtype=law.scale.dtype, device=x.device)
    args = (x, weight, bias, anchor, law.ratio, noise, dtype)
    sample: Tensor = _GaussianLinear.apply(*args)  # type: ignore[no-untyped-call]
    return sample


def _is_fast(x: Tensor, weight: Tensor, anchor: Tensor | None, law: Law) -> bool:
    """Whether `_GaussianLinear` is for these tensors: all of one wide dtype, or on a GPU and multiplied
    in bfloat16."""
    dtype, wide = _dtype_of_product(x), law.scale.dtype
    same = x.dtype == weight.dtype == dtype
    if dtype == wide:
        return same and weight.is_contiguous()
    cast = {x.dtype, weight.dtype} <= {dtype, wide} and _has_autocast_on(x.device.type)
    squares = _dtype_of_squares(dtype, wide)
    return (same or cast) and squares == dtype and gpu.takes(x, weight, anchor)


def _dtype_of_product(x: Tensor) -> torch.dtype:
    """The dtype that `F.linear` would give."""
    kind = x.device.type
    if x.dtype != torch.float64 and _has_autocast_on(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _has_autocast_on(kind: str) -> bool:
    return has_autocast(kind) and torch.is_autocast_enabled(kind)
