"""Mean and variance of functions of Gaussians that are independent of each other.

Each is a formula. Where nobody follows its operations, a kernel of the CPU computes it in one pass
(`cpu/kernels/moments.cpp`), and without one it goes through a large tensor in parts (`blocks.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..torch_private.tracing import is_traced
from .blocks import in_blocks
from .cpu import native
from .engine import has_kernels
from .gaussian import safe_sqrt

Two = tuple[Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]
"""Mean and variance of f(u) for u ~ N(mean, variance), and the gain E[f'(u)], entry by entry."""


def leaky_relu(mean: Tensor, variance: Tensor, slope: Tensor, moves: bool) -> Three:
    """Of `slope * u + (1 - slope) * relu(u)`.

    Args:
        mean, variance: of one shape and a wide dtype.
        slope: 0-d.
        moves: whether the gain is asked for; else it is any number.
    """
    formula = partial(_leaky_relu, slope=slope)
    return _by_entry("leaky_relu_moments", formula, mean, variance, moves, slope)


def gelu(mean: Tensor, variance: Tensor, moves: bool) -> Three:
    """Of u Phi(u): mean and gain in closed form; for the variance the series of Hermite,
    sum of variance^k / k! * E[f^(k)]^2, up to the third term. The tanh form differs by less than
    1e-3."""
    return _by_entry("gelu_moments", _gelu, mean, variance, moves)


def _by_entry(
    name: str,
    formula: Callable[[Tensor, Tensor], Three],
    mean: Tensor,
    variance: Tensor,
    moves: bool,
    *parameters: Tensor,
) -> Three:
    given = _for_kernel(mean, variance)
    if given is not None:
        numbers = [float(one) for one in parameters]
        first, second, gain = native.moments_of_entries(name, *given, moves, *numbers)
    elif moves:
        return in_blocks(formula, mean, variance)
    else:
        first, second = in_blocks(lambda m, v: formula(m, v)[:2], mean, variance)
        gain = None
    return first, second, mean.new_zeros(()) if gain is None else gain


def softmax(mean: Tensor, variance: Tensor) -> Two:
    """Of a softmax along the last dimension, to second order: with s = softmax(m) and
    w_i = (1 - 2 s_i) v_i + sum_j s_j^2 v_j, the mean is softmax(m + w / 2) and the variance s^2 w."""
    given = _for_kernel(mean, variance)
    if given is not None:
        return native.moments_of_softmax(*given)
    return in_blocks(_softmax, mean, variance, width=mean.shape[-1])


def norm(
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
) -> Two:
    """Of a layer norm along the last dimension; if it is not `centred`, of a root-mean-square norm."""
    given = _for_kernel(mean, variance, weight, bias)
    if given is not None:
        return native.moments_of_norm(*given, weight, bias, eps, centred)

    def formula(m: Tensor, v: Tensor) -> Two:
        share = 1 / m.shape[-1] if centred else 0.0
        added = v.mean(-1, keepdim=True) * (1 - share) + eps
        y, inverse = normed(m, added, (-1,), centred)
        moved = moved_by_norm(y, v, (-1,), centred)
        scale = inverse if weight is None else inverse * weight
        y = y if weight is None else y * weight
        return (y if bias is None else y + bias), moved * scale.square()

    return in_blocks(formula, mean, variance, width=mean.shape[-1])


def _for_kernel(mean: Tensor, variance: Tensor, *others: Tensor | None) -> Two | None:
    """Mean and variance as the kernels take them; None where there is no kernel for them, or somebody
    follows the operations."""
    if is_traced() or mean.dtype != torch.float32 or mean.shape != variance.shape:
        return None
    recorded = torch.is_grad_enabled()
    if recorded and any(t is not None and t.requires_grad for t in (mean, variance, *others)):
        return None
    if not (mean.is_cpu and mean.numel() and has_kernels("moments")):
        return None
    mean, variance = mean.contiguous(), variance.contiguous()
    return (mean, variance) if native.takes(mean, variance, *others) else None


def _cdf(z: Tensor) -> Tensor:
    return torch.erfc(z * -math.sqrt(0.5)).mul_(0.5)


def normal_density(z: Tensor) -> Tensor:
    """Of the standard normal."""
    return z.square().mul_(-0.5).sub_(math.log(2 * math.pi) / 2).exp_()


def rectified(mean: Tensor, variance: Tensor) -> Three:
    """Of max(u, 0): mean, expected square, and the probability that u is positive."""
    deviation = safe_sqrt(variance)
    z = mean / deviation.clamp_min(torch.finfo(mean.dtype).tiny)
    positive, density = _cdf(z), normal_density(z)
    first = mean * positive + deviation * density
    second = (mean.square() + variance) * positive + mean * deviation * density
    return first, second, positive


def _leaky_relu(mean: Tensor, variance: Tensor, slope: Tensor) -> Three:
    first, second, positive = rectified(mean, variance)
    of_relu = second - first.square()
    rest = 1 - slope
    total = slope**2 * variance + rest**2 * of_relu + 2 * slope * rest * variance * positive
    return slope * mean + rest * first, total.clamp_min(0), slope + rest * positive


def _gelu(mean: Tensor, variance: Tensor) -> Three:
    narrower = (1 + variance).reciprocal()
    inverse = narrower.sqrt()
    z = mean * inverse
    density, below = normal_density(z), _cdf(z)
    falling = z * density * narrower
    gain = below + falling
    bend = torch.addcmul(narrower, z.square(), narrower, value=-1).add(1)
    density = density * inverse
    first = below.mul(mean).addcmul(variance, density)
    third = bend.add(narrower, alpha=2).mul(falling)
    inner = density.mul(bend).square().mul(0.5).addcmul(variance, third.square(), value=1 / 6)
    total = gain.square().addcmul(variance, inner).mul(variance)
    return first, total, gain


def _softmax(mean: Tensor, variance: Tensor) -> Two:
    share = mean.softmax(-1).nan_to_num(0)
    square = share.square()
    common = (square * variance).sum(-1, keepdim=True)
    spread = (variance * (1 - 2 * share) + common).clamp_min(0)
    return (mean + spread / 2).softmax(-1), square * spread


def normed(mean: Tensor, added: Tensor, dims: tuple[int, ...], centred: bool) -> Two:
    """The mean after a norm over `dims`, counted from the end, and by what it was multiplied.

    Args:
        added: what the expected square has beside that of the mean.
    """
    if centred:
        mean = mean - mean.mean(dims, keepdim=True)
    inverse = (mean.square().mean(dims, keepdim=True) + added).rsqrt()
    return mean * inverse, inverse


def moved_by_norm(y: Tensor, variance: Tensor, dims: tuple[int, ...], centred: bool) -> Tensor:
    """The variance after a norm, without the square of that factor. With y the normalised mean and n
    entries, entry i moves as dx_i - mean(dx) - y_i mean(y dx)."""
    count = math.prod([y.shape[dim] for dim in dims])
    square = y.square()
    by_square = variance * square
    moved = variance * (1 - 2 / count) if centred else variance.clone()
    moved = moved.add(by_square, alpha=-2 / count)
    moved = moved.addcmul(square, by_square.sum(dims, keepdim=True) / count**2)
    if centred:
        along = (variance * y).sum(dims, keepdim=True) * (2 / count**2)
        moved = moved.add(variance.sum(dims, keepdim=True) / count**2).addcmul(y, along)
    return moved.clamp_min(0)
