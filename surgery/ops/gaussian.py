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
from .engine import is_traced
from .mask import Law

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
    every = law.scale == 0
    mean_bias = _mean(bias, bias_anchor, every) if drop_bias else bias
    mean = product(x, _average(weight, anchor, every), mean_bias)
    ratio = torch.where(every, 0, law.scale - 1)  # p / (1 - p)
    wide = law.scale.dtype
    spread = _difference(weight, anchor, wide)
    spread_bias = _difference(bias, bias_anchor, wide) if drop_bias and bias is not None else None
    with _no_autocast(x.device.type):
        if unit in ("output", "tensor"):
            var = product(x.to(wide), spread, spread_bias).square()
        else:
            squared_bias = None if spread_bias is None else spread_bias.square()
            var = product(x.to(wide).square(), spread.square(), squared_bias)
        return mean, (ratio * var).to(mean.dtype)


def _no_autocast(kind: str) -> AbstractContextManager[Any]:
    if torch.amp.is_autocast_available(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def _average(weight: Tensor, anchor: Tensor | None, every: Tensor) -> Tensor:
    """The expectation of the masked weight: the weight, unless every entry is dropped."""
    zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
    return torch.where(every, zero if anchor is None else anchor, weight)


def _mean(bias: Tensor | None, anchor: Tensor | None, every: Tensor) -> Tensor | None:
    return None if bias is None else _average(bias, anchor, every)


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
    noise = torch.randn_like(mean, dtype=wide)
    if is_traced():
        return (mean + safe_sqrt(var.to(wide)) * noise).to(mean.dtype)
    sample: Tensor = _Sample.apply(mean, var, noise)[0]  # type: ignore[no-untyped-call]
    return sample
