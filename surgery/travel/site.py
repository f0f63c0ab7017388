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

from torch import Tensor

from ..moments import Points
from ..ops import Law, ratio_of, variance_of_product
from ..spec.config import Unit
from .birth import Birth, Diagonal, OfInputs, OfOutputs, root
from .numbers import Numbers
from .of_weights import OfWeights
from .run import Run
from .state import State, apart, certain, fixed, over_columns, wide
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
    law: Law
    """The drop probability p."""
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
    shared: Numbers | None = None
    """The numbers of the mask, if other products may use it too."""
    of_shared_bias: Numbers | None = None
    """The same of the bias."""

    def ratio(self) -> Tensor:
        """p / (1 - p). No property: dynamo of torch 2.9 does not know those of named tuples."""
        return ratio_of(self.law)

    def has_one_mask(self) -> bool:
        """Whether the weight has one mask by element for all rows of an example."""
        return self.unit == "element" and (self.shares_rows or self.shared is not None)

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
    varies = isinstance(x, Travelling)
    if not varies and not run.follows:
        return _of_plain(run, x, known, points_of)
    state = x.state() if varies else certain(x)
    mean = site.product(state.mean, site.weight, site.bias) if varies else None
    with apart():
        mean, variance, fresh = _three(run, state, mean, known, site)
        brings = run.carrier == "draws" and site.has_one_mask()
        factors = None if brings else state.factors
        if factors is not None:
            factors = over_columns(lambda t: site.product(t, site.weight, None), factors)
    points = None if varies else points_of(state.mean, mean)
    if not run.follows and _is_one_product(site):
        return Travelling.of(run, State(mean, fresh, points=points))
    moved, known_part = run.mixed(State(mean, variance, factors)), fresh
    if site.unit in ("output", "tensor") and site.moving is site.weight:
        fresh = fresh + site.ratio() * moved.variance
    if not run.follows:
        return Travelling.of(run, State(mean, moved.variance + fresh, points=points))
    with apart():
        births = _births(state, known_part, fresh, site, run)
        if run.carrier == "exact" and site.unit == "element" and state.factors is not None:
            by = site.ratio() * site.moving.to(state.factors.dtype).square()
            at = 2 * state.mean.detach()
            moved.swing = over_columns(lambda t: site.product(at * t, by, None), state.factors)
    for birth in births:
        moved = run.born(moved, birth)
    if brings and varies:
        moved = run.mixed(moved)
    moved.points = points
    return Travelling.of(run, moved)


def _of_plain(
    run: Run,
    x: Tensor,
    known: Callable[[Tensor], tuple[Tensor, Tensor]],
    points_of: Callable[[Tensor, Tensor], Points | None],
) -> Travelling:
    """The pre-activation of an input that does not vary, where nobody follows covariances."""
    mean, fresh = known(x)
    state = State(mean, fresh.to(wide(x.dtype)), points=points_of(x, mean))
    return Travelling.of(run, state)


def _is_one_product(site: Site) -> bool:
    """Whether one product gives the variances of what comes in and what is born, together."""
    return site.moving is site.weight and site.unit in ("element", "input")


def _three(
    run: Run,
    state: State,
    mean: Tensor | None,
    known: Callable[[Tensor], tuple[Tensor, Tensor]],
    site: Site,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean; the variance that came in; and that which is born.

    Args:
        mean: None of an input that does not vary.
    """
    dtype = state.variance.dtype
    if mean is None:
        mean, fresh = known(fixed(state.mean))
        fresh = fresh.to(dtype)
        return mean, fresh.new_zeros(()).expand(fresh.shape), fresh
    if not run.follows and _is_one_product(site):
        fresh = variance_of_product(site.product, state.at, state.variance, site.weight, site.law)
        added = site.of_bias(fresh)
        variance = fresh.new_zeros(()).expand(fresh.shape)
        return mean, variance, fresh if added is None else fresh + added
    squared = site.weight.to(dtype).square()
    moving = squared if site.moving is site.weight else site.moving.to(dtype).square()
    if site.unit in ("output", "tensor"):
        fresh = known(fixed(state.mean))[1].to(dtype)
        variance = site.product(state.variance, squared, None)
        if moving is not squared:
            fresh = fresh + site.ratio() * site.product(state.variance, moving, None)
        return mean, variance, fresh
    square = state.at.square().add_(state.variance).mul_(site.ratio())
    variance = site.product(state.variance, squared, None)
    fresh = site.product(square, moving, None)
    added = site.of_bias(fresh)
    return mean, variance, fresh if added is None else fresh + added


def _births(state: State, known: Tensor, fresh: Tensor, site: Site, run: Run) -> list[Birth]:
    """What is born.

    Args:
        state: of the input.
        known: the part of `fresh` that the mean of the input causes.
        fresh: the variance of all that is born.
    """
    x, rows, ratio = state.at, tuple(range(-fresh.ndim, 0)), site.ratio()
    if site.unit in ("output", "tensor"):
        return _of_outputs(state, known, fresh, site, run)
    births: list[Birth] = []
    added = site.of_bias(fresh)
    if added is not None:
        fresh = (fresh - added).clamp_min(0)
        own = (site.features,) if site.shares_rows else rows
        births.append(OfOutputs(added.sqrt(), own, ratio, site.of_shared_bias))
    noisy = (site.moving * ratio.sqrt()).to(x.dtype)
    if site.unit == "input":
        own_rows = site.shares_rows, ratio, site.shared
        return [*births, OfInputs(fresh, state, noisy, *own_rows)]
    alone = run.carrier == "exact" and site.shared is None and fresh.ndim == 2
    if alone or not site.has_one_mask():
        return [*births, Diagonal(fresh)]

    def product(t: Tensor, weight: Tensor) -> Tensor:
        return site.product(t, weight, None)

    weights = site.weight, site.moving, site.law, noisy
    form = site.matrix, site.features
    return [*births, OfWeights(fresh, state, *weights, product, *form, site.shared)]


def _of_outputs(state: State, known: Tensor, fresh: Tensor, site: Site, run: Run) -> list[Birth]:
    """Where one mask entry multiplies a channel, or all."""
    x, rows = state.at, tuple(range(-fresh.ndim, 0))

    def part(t: Tensor) -> Tensor:
        return site.product(t.to(site.moving.dtype), site.moving, None).to(fresh.dtype)

    effect = root(known, part(x))
    own = () if site.shares_rows else tuple(dim for dim in rows if dim != site.features)
    own = (*own, site.features) if site.unit == "output" else own
    rest = (fresh - known).clamp_min(0)
    columns = run.draws(state)
    if columns is not None:
        columns = over_columns(lambda t: part(t) * site.ratio().sqrt(), columns)
    found: list[Birth] = [OfOutputs(effect, own, site.ratio(), site.shared, columns)]
    if bool(rest.any()):  # which these columns have
        found.append(Diagonal(rest, lambda count, _: rest.new_zeros(count, *rest.shape)))
    return found
