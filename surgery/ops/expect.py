"""The expectation of an activation over a Gaussian pre-activation: E[f(u)] for u ~ N(mean, var).

A closed form where one is known (`register_closed_form`), else Gauss-Hermite quadrature, or the
samples that the paper draws (Wan et al. 2013, section 3.2, algorithm 2).

The closed forms of piecewise linear functions are `f(mean)` plus, for each kink, its change of slope
times `excess(mean - kink, var)`: exact at var = 0, and without cancellation in the tails.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..base.torch_names import is_of_torch, name_of, spelling, writes
from ..torch_private.tracing import is_traced
from . import gpu
from .cpu import native
from .engine import CHUNK, has_kernels
from .gaussian import gaussian_sample, safe_sqrt

Function = Callable[[Tensor], Tensor]
ClosedForm = Callable[[Function, Tensor, Tensor], Tensor]
"""`form(f, mean, var)`, which may evaluate f to learn its slopes and limits."""

_FORMS: dict[str, ClosedForm] = {}
_NAMES: dict[Any, str] = {}

NODES = 64
"""Nodes of the quadrature; the outer ones, of weight below 1e-17, are left out."""


def register_closed_form(name: str, form: ClosedForm, *spellings: Any) -> None:
    """Make `expectation` use a closed form.

    Args:
        name: what callers may call the function.
        form: the expectation, for float32 or float64 mean and var of one shape.
        spellings: functions, and classes of modules, that are this function. Not needed for those of
            torch whose canonical name it is (see `surgery.base.torch_names`).
    """
    _FORMS[name] = form
    _NAMES.update(dict.fromkeys(spellings, name))


def has_closed_form(name: str) -> bool:
    """Whether one was registered under this name."""
    return name in _FORMS


def expectation(f: Function, mean: Tensor, var: Tensor, name: str | None = None) -> Tensor:
    """E[f(u)] for u ~ N(mean, var), entry by entry.

    Args:
        f: an elementwise function.
        mean, var: the same shape; var is at least 0.
        name: of a closed form; None looks f up. A name without a closed form is ignored.

    Returns:
        the shape and dtype of `mean`, computed in at least float32; at var = 0 it is f(mean). Where a
        gradient by var would be infinite or 0 / 0, at var = 0, it is 0.
    """
    form = _FORMS.get(name or _name_of(f) or "")
    if _is_in_place(f):
        f = _on_copies(f)
    by_kernel = _on_gpu(_ON_GPU.get(form), mean, var)
    if by_kernel is not None:
        return by_kernel
    wide = torch.promote_types(mean.dtype, torch.float32)
    args = f, mean.to(wide), var.to(wide)
    expected: Tensor = _quadrature(*args) if form is None else form(*args)
    return expected.to(mean.dtype)


def expectation_by_draws(f: Function, mean: Tensor, var: Tensor, samples: int) -> Tensor:
    """The mean of f over `samples` draws from N(mean, var): the inference of the paper.

    Draws come from torch's generator. So many are evaluated at once that a small tensor needs few calls
    and a large one little memory.

    Raises:
        ValueError: samples is not positive.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    wide = torch.promote_types(mean.dtype, torch.float32)
    rows = mean.reshape(1) if mean.dim() == 0 else mean
    variances = var.reshape(rows.shape)
    at_once = max(1, min(samples, CHUNK // max(1, mean.numel())))
    total = torch.zeros_like(rows, dtype=wide)
    for start in range(0, samples, at_once):
        count = min(at_once, samples - start)
        # along the first dimension, so that f still finds channels where it expects them
        repeats = (count, *(1,) * (rows.dim() - 1))
        drawn = f(gaussian_sample(rows.repeat(repeats), variances.repeat(repeats)))
        total = total + drawn.view(count, *rows.shape).sum(0, dtype=wide)
    return (total / samples).to(mean.dtype).view(mean.shape)


def _name_of(f: Function) -> str | None:
    if getattr(f, "approximate", "none") != "none":  # nn.GELU(approximate="tanh")
        return None
    called = type(f) if isinstance(f, nn.Module) else f
    return _NAMES.get(called) or (name_of(called) if is_of_torch(called) else None)


def _is_in_place(f: Function) -> bool:
    """Whether f writes its values over its argument, which is needed afterwards."""
    return getattr(f, "inplace", False) is True or writes(spelling(f))


def _on_copies(f: Function) -> Function:
    return lambda t: f(t.clone())


@functools.cache
def gauss_hermite(count: int) -> tuple[tuple[float, float], ...]:
    """Nodes and weights for the standard normal, the nodes in ascending order; those whose weight is
    below 1e-17 are left out.

    By Newton's method on orthonormal Hermite polynomials (Press et al., Numerical Recipes, section 4.6,
    `gauher`). Not by torch: what LAPACK computes at import starts threads, with which torch hangs in
    processes that are forked later.

    Args:
        count: at most 128, up to which the first guesses are good.
    """
    if not 1 <= count <= 128:
        raise ValueError(f"there are rules of 1 to 128 nodes here, not of {count}")
    found: list[tuple[float, float]] = []
    roots: list[float] = []
    for i in range((count + 1) // 2):
        root, slope = _hermite_root(count, _first_guess(count, roots))
        roots.append(root)
        weight = 2 / slope**2 / math.sqrt(math.pi)
        node = math.sqrt(2) * root
        found += [(node, weight)] if 2 * i + 1 == count else [(node, weight), (-node, weight)]
    return tuple(sorted((node, weight) for node, weight in found if weight > 1e-17))


def _first_guess(count: int, roots: list[float]) -> float:
    """Of the next smaller root, from those above it."""
    if not roots:
        return math.sqrt(2 * count + 1) - 1.85575 * math.pow(2 * count + 1, -1 / 6)
    last = roots[-1]
    if len(roots) == 1:
        return last - 1.14 * math.pow(count, 0.426) / last
    share = {2: 0.86, 3: 0.91}.get(len(roots), 1.0)
    return last + share * (last - roots[-2])


def _hermite_root(count: int, guess: float) -> tuple[float, float]:
    """A root of the polynomial of that degree, and its slope there."""
    root = guess
    for _ in range(20):
        value, below = math.pi**-0.25, 0.0
        for degree in range(count):
            value, below = (
                root * math.sqrt(2 / (degree + 1)) * value
                - math.sqrt(degree / (degree + 1)) * below,
                value,
            )
        slope = math.sqrt(2 * count) * below
        step = value / slope
        root -= step
        if abs(step) < 1e-15 * max(1.0, abs(root)):
            break
    return root, slope


_RULE = gauss_hermite(NODES)


def _quadrature(f: Function, mean: Tensor, var: Tensor) -> Tensor:
    """f(mean) plus the weighted differences to it, a node at a time, in forward and backward."""
    sd = safe_sqrt(var)
    value = f(mean)
    recompute = _is_recorded(mean, var)

    def at(mean: Tensor, sd: Tensor, node: float, weight: float) -> Tensor:
        return weight * f(mean + node * sd)

    if is_traced():
        return value + _stacked(f, mean, sd, value)
    total = torch.zeros_like(value)
    for node, weight in _RULE:
        if recompute:
            args = (at, mean, sd, node, weight)
            part: Tensor = checkpoint(*args, use_reentrant=False, preserve_rng_state=False)
        else:
            part = at(mean, sd, node, weight)
        total = total + (part - weight * value)
    return value + total


def _stacked(f: Function, mean: Tensor, sd: Tensor, value: Tensor) -> Tensor:
    """All nodes along a new first dimension: one small graph, which inductor makes one loop."""
    nodes, weights = torch.tensor(_RULE, dtype=mean.dtype, device=mean.device).unbind(1)
    ones = (1,) * mean.dim()
    drawn = f(mean + nodes.view(-1, *ones) * sd)
    return (weights.view(-1, *(1,) * value.dim()) * (drawn - value)).sum(0)


def _density(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)


_cdf: Function = torch.special.ndtr


def _score(mean: Tensor, sd: Tensor) -> Tensor:
    """mean / sd, within the 50 beyond which nothing is left of the density; anything where sd is 0."""
    return (mean / torch.where(sd > 0, sd, 1)).clamp(-50, 50)


def excess(mean: Tensor, var: Tensor) -> Tensor:
    """What a kink adds: E[relu(u)] - relu(mean) for u ~ N(mean, var), the same for relu(-u).

    It is sd * g(|mean| / sd) with g(t) = phi(t) - t * Phi(-t), computed by erfcx, which does not vanish
    in the tail. At mean = 0 it has the slope of its left side: torch gives relu the slope 0 there, and
    the sum of both is right.
    """
    by_kernel = _on_gpu("excess", mean, var)
    if by_kernel is not None:
        return by_kernel
    if _has_kernel(mean, var):
        return native.excess(mean, var)
    sd = safe_sqrt(var)
    z = _score(mean, sd)
    t = torch.where(mean > 0, z, -z)
    mills = math.sqrt(math.pi / 2) * torch.special.erfcx(t / math.sqrt(2))
    added: Tensor = sd * _density(t) * (1 - t * mills)
    return added


def _has_kernel(mean: Tensor, var: Tensor) -> bool:
    """Whether a kernel of the CPU computes `excess`: nobody differentiates it, and it takes these
    tensors."""
    if _is_recorded(mean, var) or is_traced() or mean.dtype != torch.float32:
        return False
    same = mean.shape == var.shape
    return same and native.takes(mean, var) and has_kernels("activations")


def _is_recorded(mean: Tensor, var: Tensor) -> bool:
    return torch.is_grad_enabled() and (mean.requires_grad or var.requires_grad)


def _on_gpu(name: str | None, mean: Tensor, var: Tensor) -> Tensor | None:
    """What the kernel for the GPU computes in one pass; None where there is none for these tensors, and
    where somebody differentiates by them."""
    if name is None or mean.dtype == torch.float64 or mean.shape != var.shape:
        return None
    if _is_recorded(mean, var) or not gpu.takes(mean, var):
        return None
    return gpu.expect(name, mean, var)


def _identity(f: Function, mean: Tensor, var: Tensor) -> Tensor:
    return mean


def _relu(f: Function, mean: Tensor, var: Tensor) -> Tensor:
    if _has_kernel(mean, var):
        return native.excess(mean, var, True)
    return f(mean) + excess(mean, var)


def _rectified(f: Function, mean: Tensor, var: Tensor) -> Tensor:
    """Of any f that is linear on either side of 0; its slopes are f(1) and -f(-1)."""
    one = mean.new_ones(())
    return f(mean) + (f(one) + f(-one)) * excess(mean, var)


def _clipped(mean: Tensor, var: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """E[u clamped to an interval]. Slopes at its ends are those on the left, as in `excess`."""
    clipped = torch.where(mean > high, high, torch.where(mean > low, mean, low))
    return clipped + excess(mean - low, var) - excess(mean - high, var)


def _clamped(f: Function, mean: Tensor, var: Tensor) -> Tensor:
    """Of any f that clamps to an interval, which its limits tell."""
    far = mean.new_full((), math.inf)
    return _clipped(mean, var, f(-far), f(far))


def _hard_sigmoid(f: Function, mean: Tensor, var: Tensor) -> Tensor:
    return _clipped(mean + 3, var, 0.0, 6.0) / 6


def _hard_swish(f: Function, mean: Tensor, var: Tensor) -> Tensor:
    """u * h(u) / 6 with h = relu6(u + 3); E[u h(u)] = mean E[h(u)] + var E[h'(u)] (Stein)."""
    sd = safe_sqrt(var)
    low, high = (_cdf(_score(mean + kink, sd)) for kink in (3, -3))
    return (mean * _clipped(mean + 3, var, 0.0, 6.0) + var * (low - high)) / 6


def _gelu(f: Function, mean: Tensor, var: Tensor) -> Tensor:
    """u * Phi(u), where E[Phi(u)] = Phi(mean / sqrt(1 + var)); then Stein as above."""
    sd = (1 + var).sqrt()
    z = mean / sd
    return mean * _cdf(z) + var / sd * _density(z)


_ON_GPU: dict[ClosedForm | None, str] = {_relu: "relu", _gelu: "gelu"}
"""What the kernel of `gpu.expect` knows as a whole."""

for _name, _form in {
    "clamp": _clamped,
    "clamp_max": _clamped,
    "clamp_min": _clamped,
    "gelu": _gelu,
    "hardsigmoid": _hard_sigmoid,
    "hardswish": _hard_swish,
    "hardtanh": _clamped,
    "identity": _identity,
    "leaky_relu": _rectified,
    "relu": _relu,
    "relu6": _clamped,
}.items():
    register_closed_form(_name, _form)
