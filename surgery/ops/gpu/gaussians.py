"""Gaussian pre-activations on the GPU: what stands between their products, in one launch each.

Training at usual sizes is bound by the host here, which launches kernels more slowly than they run.
So one kernel squares input and weight, another draws, and backward has one before its products and one
after them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..hash import SEGMENT
from .launch import ADD_TWICE, DRAW, FACTORS, Kernel, form, repeated

BLOCK = 1024
"""Entries of a program."""

KERNELS = {
    FACTORS: Kernel("gaussian_kernels", "factors", num_warps=4),
    DRAW: Kernel("gaussian_kernels", "draw", num_warps=4),
    ADD_TWICE: Kernel("gaussian_kernels", "add_twice", num_warps=4),
}


class Factors(NamedTuple):
    """What the products multiply, all in their dtype."""

    x: Tensor
    weight: Tensor
    square_x: Tensor
    square_weight: Tensor
    by_variance: Tensor | None
    """The gradient of the variance, if a gradient was given."""


def factors(
    x: Tensor,
    weight: Tensor,
    anchor: Tensor | None,
    dtype: torch.dtype,
    ratio: Tensor | None = None,
    gradient: tuple[Tensor, Tensor] | None = None,
    want: tuple[bool, bool] = (True, True),
    copies: bool = True,
) -> Factors | None:
    """`x`, `weight`, `x^2` and `(weight - anchor)^2`, each computed wide and rounded once.

    Args:
        x, weight, anchor: as `launch.takes` takes them. The anchor may be None.
        dtype: of the products.
        ratio: 0-d, what the squares of the weight are multiplied by; None is 1.
        gradient: of the sample, and its slope: their product is the gradient of the variance.
        want: whether the gradient of x is wanted, which needs what is made of the weight, and the
            gradient of the weight, which needs what is made of x. What nobody needs is not written.
        copies: whether x and the weight are needed in that dtype too; else they are returned as given.

    Returns:
        all of them; None where it was not done, see `Kernel.launch`.
    """
    grad, slope = (None, None) if gradient is None else gradient
    want_weight, want_x = want
    sizes = (
        x.numel() if want_x else 0,
        weight.numel() if want_weight else 0,
        0 if grad is None else grad.numel(),
    )
    copies = copies and not x.dtype == weight.dtype == dtype
    if max(sizes) > SEGMENT:
        return None
    square_x = torch.empty_like(x, dtype=dtype)
    square_weight = torch.empty_like(weight, dtype=dtype)
    copy_x = torch.empty_like(x, dtype=dtype) if copies else x
    copy_weight = torch.empty_like(weight, dtype=dtype) if copies else weight
    by_variance = None if grad is None else torch.empty_like(grad)
    tensors = (
        *(x, weight, anchor, grad, slope),
        *(copy_x, copy_weight, square_x, square_weight, by_variance, ratio),
    )
    double = dtype == torch.float64
    options = anchor is not None, grad is not None, copies, ratio is not None, double, BLOCK
    about = x, weight, anchor, grad, square_x
    done = _launch(FACTORS, sizes, x.device, tensors, options, about, ratio is None)
    return Factors(copy_x, copy_weight, square_x, square_weight, by_variance) if done else None


def _launch(
    which: int,
    sizes: tuple[int, ...],
    device: torch.device,
    tensors: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
    about: tuple[Tensor | None, ...],
    plain: bool = True,
) -> bool:
    """A launch of programs for each of some sizes, one after the other.

    Args:
        which: the number of the kernel.
        about: see `Repeated.plan`.
        plain: whether it can be repeated.
    """
    programs = sum(-(-size // BLOCK) for size in sizes)
    if programs == 0:
        return True
    kinds = form(*tensors)
    plan = repeated.plan(which, tensors, kinds, about, sizes, None, sizes) if plain else None
    key = (*kinds, *((size % 16 == 0, size == 1) for size in sizes))
    args = *tensors, *sizes
    return KERNELS[which].launch((programs, 1, 1), device, key, args, options, plan)


def draw(
    mean: Tensor, var: Tensor, noise: Tensor, sample: Tensor, slope: Tensor, ratio: Tensor | None
) -> bool:
    """Write `sample = mean + sd * noise` with `sd^2 = ratio * var`, and `slope`, its derivative by var,
    which is 0 where sd is 0.

    Args:
        mean, var, noise: of one shape, as `launch.takes` takes them.
        sample, slope: of that shape; they may be `mean` and `var`.
        ratio: 0-d; None is 1.

    Returns:
        whether it was done: see `Kernel.launch`.
    """
    size = mean.numel()
    tensors = mean, var, noise, sample, slope, ratio
    double = noise.dtype == torch.float64
    options = ratio is not None, double, BLOCK
    about, plain = (mean, noise), ratio is not None and sample is mean and slope is var
    return size <= SEGMENT and _launch(DRAW, (size,), mean.device, tensors, options, about, plain)


def add_twice(
    of_x: tuple[Tensor, Tensor, Tensor] | None,
    of_weight: tuple[Tensor, Tensor, Tensor] | None,
    anchor: Tensor | None,
) -> tuple[Tensor | None, Tensor | None] | None:
    """`total + 2 * value * through` for x and for the weight, from which the anchor is taken.

    Args:
        of_x, of_weight: `(total, value, through)`, dense and of one shape; None is left out.
        anchor: of the weight, or None.

    Returns:
        both, in the dtypes of their values; None where it was not done, see `Kernel.launch`.
    """
    some = of_x or of_weight
    if some is None:
        return None, None
    (total_x, x, through_x), (total, weight, through) = of_x or some, of_weight or some
    sizes = x.numel() if of_x else 0, weight.numel() if of_weight else 0
    new_x = None if of_x is None else _like(x, total_x)
    new_weight = None if of_weight is None else _like(weight, total)
    tensors = (
        *(total_x, x, through_x, x if new_x is None else new_x),
        *(total, weight, anchor, through, weight if new_weight is None else new_weight),
    )
    double = x.dtype == torch.float64
    options = anchor is not None and of_weight is not None, double, BLOCK
    about = total_x, x, weight, anchor
    if max(sizes) > SEGMENT or not _launch(ADD_TWICE, sizes, x.device, tensors, options, about):
        return None
    return new_x, new_weight


def _like(value: Tensor, total: Tensor) -> Tensor:
    """Where the result goes: over the total, if that has its dtype."""
    return total if total.dtype == value.dtype else torch.empty_like(value)
