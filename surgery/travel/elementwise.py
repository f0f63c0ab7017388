"""Functions of each entry alone.

One value: the function is put off, so that a formula of many steps is one function of one value. Its
moments come from closed forms (ReLU and its leaky kin, GELU), or from Gauss-Hermite quadrature.

    E[f(u)], Var[f(u)], and the gain E[f'(u)] = Cov(u, f(u)) / Var(u)          u ~ N(mean, variance)

Covariances move by the gain; what variance is left, f(u) - gain * u, is taken as new and
independent. It is uncorrelated with every Gaussian that u covaries with (Stein), so this is exact
for the covariance of f(u) with a Gaussian, and of first order for that of two such functions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..moments import torch_functions as table
from ..ops import independent
from ..ops.blocks import in_blocks
from .call import RULES, Call, rule
from .run import ALONE, Run
from .state import State, apart, fixed, linked, of_draws, same_columns
from .swing import of_swing
from .value import Later, Travelling

Function = Callable[[Tensor], Tensor]
Three = tuple[Tensor, Tensor, Tensor]
"""Mean and variance of a function of a Gaussian, and its gain."""


@rule("elementwise")
def elementwise(call: Call) -> Any:
    """Any function of the table's elementwise ones."""
    direct = [one for one in (*call.args, *call.kwargs.values()) if isinstance(one, Travelling)]
    if len(direct) != len(call.values):
        return NotImplemented
    value = direct[0]
    if any(one.origin is not value.origin for one in direct):
        return RULES["pair"](call)
    given = [_bound(arg) for arg in call.args]
    named = {key: _bound(arg) for key, arg in call.kwargs.items()}

    def function(u: Tensor) -> Tensor:
        result: Tensor = call.func(
            *(arg(u) if late else arg for late, arg in given),
            **{key: arg(u) if late else arg for key, (late, arg) in named.items()},
        )
        return result

    like = _like(call, value, function)
    positions = [i for i, arg in enumerate(call.args) if isinstance(arg, Travelling)]
    single = len(direct) == 1 and len(positions) == 1
    if single and like.is_floating_point() and table.is_affine(call.name, positions):
        make = _affine(call, value, positions[0])
        return Travelling.later(value, like, function, make, value.is_linear)

    run, origin, moments, is_linear = value.run, value.origin, value.moments, value.is_linear

    def make_state() -> State:
        if single and is_linear and origin.points is None:
            return of_function(call, _around(call, positions[0]), moments(), run)
        return of_function(call if single and moments() is origin else None, function, origin, run)

    def make_mean() -> Tensor:
        state = moments()
        mean, variance = torch.broadcast_tensors(state.at, state.variance)
        found = ops.expectation(_around(call, positions[0]), mean, variance, call.name)
        return found.to(state.mean.dtype)

    alone = single and is_linear and origin.points is None and not run.follows
    later = Later(make_state, mean=make_mean if alone and ops.has_closed_form(call.name) else None)
    result = Travelling.later(value, like, function, later, False)
    if single and call.name in table.RISING and _rises(call):
        result.under = _around(call, positions[0]), value.copied()
    return result


def _rises(call: Call) -> bool:
    """Whether an activation does with the parameters that it has: a leaky ReLU may have a negative
    slope. The limits of a clamp may be any."""
    given = (*call.args[1:], *call.kwargs.values())
    return call.name == "hardtanh" or all(
        isinstance(one, (int, float)) and one >= 0 for one in given
    )


def _like(call: Call, value: Travelling, function: Function) -> Tensor:
    """A tensor of the shape and dtype of the result: of a function of one value and numbers, not
    computed in every entry."""
    mean = fixed(value.origin.mean)
    others = (*call.args, *call.kwargs.values())
    if any(isinstance(one, Tensor) and not isinstance(one, Travelling) for one in others):
        return function(mean)
    if value.shape != mean.shape or call.name in table.COMPARISONS:
        return function(mean)
    if call.name in table.ACTIVATIONS:
        return mean
    dtype = call.func(*(_single(one) for one in call.args), **_singles(call.kwargs)).dtype
    return mean if dtype == mean.dtype else mean.to(dtype)


def _single(value: Any) -> Any:
    """One entry in the place of all."""
    if not isinstance(value, Travelling):
        return value
    return torch.ones(1, dtype=value.dtype, device=value.device)


def _singles(given: dict[str, Any]) -> dict[str, Any]:
    return {key: _single(value) for key, value in given.items()}


def _bound(arg: Any) -> tuple[bool, Any]:
    return (True, arg.apply) if isinstance(arg, Travelling) else (False, arg)


def _around(call: Call, position: int) -> Function:
    """The function of the one argument at this position."""

    def function(t: Tensor) -> Tensor:
        args = (*call.args[:position], t, *call.args[position + 1 :])
        result: Tensor = call.func(*args, **call.kwargs)
        return result

    return function


def _affine(call: Call, value: Travelling, position: int) -> Callable[[], State]:
    function, moments = _around(call, position), value.moments

    def make() -> State:
        state = moments()
        mean = function(state.mean)
        if call.name in table.ADDS and position == 0:
            return state.scaled(mean, 1.0)
        with apart():
            zero = torch.zeros((), dtype=state.variance.dtype, device=mean.device)
            scale = function(zero + 1) - function(zero)
        return state.scaled(mean, scale)

    return make


def of_function(call: Call | None, function: Function, state: State, run: Run) -> State:
    """The state of a function of a value that is taken as Gaussian.

    Args:
        call: of the function, if it is that call's alone; it may have a closed form.
    """
    with apart():
        if state.points is not None:
            mean, variance, gain = of_points(function, state)
        else:
            mean, variance, gain = three_of(call, function, state.at, state.variance, run.follows)
        if call is not None and call.name in table.PARTIAL:
            fine = mean.isfinite() & variance.isfinite() & gain.isfinite()
            if run is not ALONE and not bool(fine.all()):
                run.settles(call.name)
            mean = torch.where(fine, mean, function(state.at))
            variance, gain = (torch.where(fine, one, 0) for one in (variance, gain))
        bent = None
        if state.swing is not None and state.factors is not None:
            more = of_swing(state, *hermite(call, function, state.at, state.variance))
            square = variance + mean.square() + more.square
            mean, bent = mean + more.mean, more.columns
            variance = (square - mean.square()).clamp_min(0)
        mean = mean.to(state.mean.dtype)
    mean = linked(mean, state.mean, gain.to(mean.dtype))
    if not run.follows:
        return State(mean, variance)
    moved = state.scaled(mean, gain)
    if bent is not None and moved.factors is not None:
        factors = torch.add(*same_columns(moved.factors, bent.to(moved.factors.dtype)))
        carried = factors.to(variance.dtype).square().sum(0)
        moved = State(moved.mean, carried, factors)
    left = (variance - moved.variance).clamp_min(0)

    def safely(draw: Tensor) -> Tensor:
        """By its slope where it is not defined."""
        value = function(draw)
        straight = fixed(mean) + gain * (draw - fixed(state.mean))
        return torch.where(value.isfinite(), value, straight.to(value.dtype))

    partial_one = call is not None and call.name in table.PARTIAL

    def columns() -> Tensor | None:
        return of_draws(safely if partial_one else function, mean, run.columns, state)

    return run.after(mean, moved.variance, left, lambda: moved.factors, columns)


def three_of(
    call: Call | None, function: Function, mean: Tensor, variance: Tensor, moves: bool = True
) -> Three:
    """Mean, variance and gain of a function of a Gaussian, entry by entry. The gain is any number where
    nothing `moves` by it."""
    mean, variance = torch.broadcast_tensors(mean, variance)
    if call is not None:
        form = FORMS.get(call.name)
        if form is not None:
            return form(function, mean, variance, moves)
        if call.name in table.PARTIAL:
            return by_quadrature(function, mean, variance, 3)
        if ops.has_closed_form(call.name):
            found = by_quadrature(function, mean, variance)
            return (ops.expectation(function, mean, variance, call.name), *found[1:])
        if not _reads_others(call):
            return _blocked(partial(by_quadrature, function), mean, variance, moves)
    return by_quadrature(function, mean, variance)


def _blocked(
    three: Callable[[Tensor, Tensor], Three], mean: Tensor, variance: Tensor, moves: bool
) -> Three:
    if moves:
        return in_blocks(three, mean, variance)
    first, second = in_blocks(lambda m, v: three(m, v)[:2], mean, variance)
    return first, second, torch.zeros((), dtype=first.dtype, device=first.device)


def hermite(
    call: Call | None, function: Function, mean: Tensor, variance: Tensor
) -> tuple[Tensor, ...]:
    """E[f(u) He_n(x)] for n = 2, 3, 4 and E[f(u)^2 He_n(x)] for n = 3, 4, where x is u standardised: in
    closed form of a ReLU and its leaky kin, else by quadrature."""
    deviation = variance.sqrt()
    if call is not None and call.name in ("relu", "leaky_relu"):
        slope = -function(-torch.ones((), dtype=mean.dtype, device=mean.device))
        z = mean / deviation.clamp_min(torch.finfo(mean.dtype).tiny)
        kink = (1 - slope) * deviation * independent.normal_density(z)
        of_square = 2 * (1 + slope) * deviation * kink
        return kink, -z * kink, (z.square() - 1) * kink, of_square, -z * of_square
    base = function(mean)
    found = [torch.zeros_like(base) for _ in range(5)]
    for node, weight in ops.gauss_hermite(NODES):
        value = function(mean + node * deviation)
        change, square = value - base, value.square() - base.square()
        polynomials = node**2 - 1, node**3 - 3 * node, node**4 - 6 * node**2 + 3
        values = change, change, change, square, square
        for total, factor, one in zip(found, (*polynomials, *polynomials[1:]), values):
            total.add_(one, alpha=weight * factor)
    return tuple(found)


def _reads_others(call: Call) -> bool:
    """Whether it has a tensor among its arguments beside the one value, so that places matter."""
    given = (*call.args, *call.kwargs.values())
    return any(isinstance(one, Tensor) and not isinstance(one, Travelling) for one in given)


NODES = 16
"""Of the quadrature. For tanh, sigmoid, SiLU and softplus and standard deviations up to 2, mean,
variance and gain are within 1e-3 of their limits; a kink costs more."""

_NODES_AND_WEIGHTS = {count: ops.gauss_hermite(count) for count in (3, NODES)}


def of_points(function: Function, state: State) -> Three:
    """Of a value that has a few values, each with a probability."""
    assert state.points is not None
    mean, first, second, slope = state.at, *(torch.zeros_like(state.at) for _ in range(3))
    base = function(mean)
    for value, probability in state.points:
        change = function(value.to(mean.dtype)) - base
        first = first + probability * change
        second = second + probability * change.square()
        slope = slope + probability * (value - mean) * change
    some = state.variance > 0
    gain = torch.where(some, slope / torch.where(some, state.variance, 1), 0)
    return base + first, (second - first.square()).clamp_min(0), gain


def by_quadrature(function: Function, mean: Tensor, variance: Tensor, count: int = NODES) -> Three:
    """With so many nodes."""
    deviation = ops.safe_sqrt(variance)
    base = function(mean)
    first, second, slope = (torch.zeros_like(base) for _ in range(3))
    for node, weight in _NODES_AND_WEIGHTS[count]:
        change = function(mean + node * deviation) - base
        first = first + weight * change
        second = second + weight * change.square()
        slope = slope + weight * node * change
    gain = torch.where(deviation > 0, slope / torch.where(deviation > 0, deviation, 1), 0)
    return base + first, (second - first.square()).clamp_min(0), gain


Form = Callable[[Function, Tensor, Tensor, bool], Three]
"""Of the function, mean and variance of what it is of, and whether the gain is asked for."""


def _relu(function: Function, mean: Tensor, variance: Tensor, moves: bool) -> Three:
    return independent.leaky_relu(mean, variance, mean.new_zeros(()), moves)


def _leaky(function: Function, mean: Tensor, variance: Tensor, moves: bool) -> Three:
    return independent.leaky_relu(mean, variance, -function(-mean.new_ones(())), moves)


def _gelu(function: Function, mean: Tensor, variance: Tensor, moves: bool) -> Three:
    return independent.gelu(mean, variance, moves)


FORMS: dict[str, Form] = {
    "gelu": _gelu,
    "leaky_relu": _leaky,
    "relu": _relu,
}
"""Closed forms, by canonical names."""
