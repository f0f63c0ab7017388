"""What a site of DropConnect adds to what travels through it.

With D = W - A and r = p / (1 - p), a product of an input of mean m and variance v has

    element, input   W^2 v + r D^2 (m^2 + v)
    output, tensor   W^2 v + r ((D m)^2 + D^2 v)

The first term moves what came in; the second is born here. How outputs share it depends on the
unit, and on which rows share a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..moments import Points
from ..spec.config import Unit
from .birth import Birth, Diagonal, OfInputs, OfOutputs, OfWeights, root
from .run import Run
from .state import State, apart, certain, fixed, is_recorded, over_columns
from .value import Travelling

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Site(NamedTuple):
    """One product of an input with a weight that drops."""

    product: Product
    """`product(x, weight, bias)`."""
    weight: Tensor
    """The expectation of the masked weight."""
    moving: Tensor
    """What a mask multiplies, W - A."""
    ratio: Tensor
    """p / (1 - p)."""
    unit: Unit
    shares_rows: bool
    """Whether the rows of an example share their masks."""
    matrix: bool
    """Whether the product is `x @ weight.T`."""
    features: int
    """The dimension of the features in x and in the result, counted from the end."""
    bias: Tensor | None
    """Its expectation, (out,)."""
    bias_variance: Tensor | None
    """(out,): of a bias that is dropped entry by entry; None if none is."""

    def of_bias(self, like: Tensor) -> Tensor | None:
        """The variance of such a bias, in the shape of the result."""
        if self.bias_variance is None or self.unit in ("output", "tensor"):
            return None
        view = (-1, *(1,) * (-1 - self.features))
        return self.bias_variance.to(like.dtype).view(view).expand(like.shape)


def site_value(
    run: Run,
    x: Any,
    known: Callable[[Tensor], tuple[Tensor, Tensor]],
    points_of: Callable[[Tensor, Tensor], Points | None],
    site: Site,
) -> Travelling:
    """The pre-activation of a site.

    Args:
        x: its input, which may travel.
        known: mean and variance of the product for an input that does not vary.
        points_of: the few values that it then has, if it has few, from the input and the mean.
    """
    state = x.state() if isinstance(x, Travelling) else certain(x)
    with apart():
        mean, variance, fresh = _three(run, state, isinstance(x, Travelling), known, site)
        factors = state.factors
        if factors is not None:
            factors = over_columns(lambda t: site.product(t, site.weight, None), factors)
    if is_recorded(state.mean):
        mean = mean + site.product(state.mean - state.mean.detach(), site.weight, None)
    points = None if isinstance(x, Travelling) else points_of(state.mean, mean)
    moved, known_part = run.mixed(State(mean, variance, factors)), fresh
    if site.unit in ("output", "tensor") and site.moving is site.weight:
        fresh = fresh + site.ratio * moved.variance
    if not run.follows:
        return Travelling.of(run, State(mean, moved.variance + fresh, points=points))
    with apart():
        births = _births(
            state.at, root(state.at.square() + state.variance, state.at), known_part, fresh, site
        )
        if run.carrier == "exact" and site.unit == "element" and state.factors is not None:
            by = site.ratio * site.moving.to(state.factors.dtype).square()
            at = 2 * state.mean.detach()
            moved.swing = over_columns(lambda t: site.product(at * t, by, None), state.factors)
    for birth in births:
        moved = run.born(moved, birth)
    moved.points = points
    return Travelling.of(run, moved)


def _three(
    run: Run,
    state: State,
    varies: bool,
    known: Callable[[Tensor], tuple[Tensor, Tensor]],
    site: Site,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean; the variance that came in; and that which is born."""
    dtype = state.variance.dtype
    if not varies:
        mean, fresh = known(fixed(state.mean))
        return mean, torch.zeros_like(fresh, dtype=dtype), fresh.to(dtype)
    squared = site.weight.to(dtype).square()
    moving = squared if site.moving is site.weight else site.moving.to(dtype).square()
    if site.unit in ("output", "tensor"):
        mean, fresh = known(fixed(state.mean))
        fresh, variance = fresh.to(dtype), site.product(state.variance, squared, None)
        if moving is not squared:
            fresh = fresh + site.ratio * site.product(state.variance, moving, None)
        return mean, variance, fresh
    mean = site.product(fixed(state.mean), site.weight, site.bias)
    square = state.at.square().add_(state.variance).mul_(site.ratio)
    if run.follows or moving is not squared:
        variance = site.product(state.variance, squared, None)
        fresh = site.product(square, moving, None)
    else:  # one product for both
        both = square.add_(state.variance)
        fresh = site.product(both, squared, None)
        variance = torch.zeros((), dtype=dtype, device=fresh.device).expand(fresh.shape)
    added = site.of_bias(fresh)
    return mean, variance, fresh if added is None else fresh + added


def _births(x: Tensor, size: Tensor, known: Tensor, fresh: Tensor, site: Site) -> list[Birth]:
    """What is born.

    Args:
        x, size: the mean of the input, and the root of its expected square, signed.
        known: the part of `fresh` that the mean of the input causes.
        fresh: the variance of all that is born.
    """
    rows = tuple(range(-fresh.ndim, 0))
    if site.unit in ("output", "tensor"):
        effect = root(
            known, site.product(x.to(site.moving.dtype), site.moving, None).to(fresh.dtype)
        )
        own = () if site.shares_rows else tuple(dim for dim in rows if dim != site.features)
        own = (*own, site.features) if site.unit == "output" else own
        rest = (fresh - known).clamp_min(0)
        return [OfOutputs(effect, own), *([Diagonal(rest)] if bool(rest.any()) else [])]
    births: list[Birth] = []
    added = site.of_bias(fresh)
    if added is not None:
        fresh = (fresh - added).clamp_min(0)
        births.append(OfOutputs(added.sqrt(), (site.features,) if site.shares_rows else rows))
    noisy = (site.moving * site.ratio.sqrt()).to(size.dtype)
    if site.unit == "input":
        return [*births, OfInputs(fresh, size, noisy, site.shares_rows)]
    if not site.shares_rows or fresh.ndim == 2:
        return [*births, Diagonal(fresh)]
    run = site.product
    return [*births, OfWeights(fresh, size, noisy, lambda t, w: run(t, w, None), site.matrix)]
