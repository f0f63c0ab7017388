"""Functions of two values: sums, products and what is made of them.

A product of two Gaussians, of covariance c, has

    mean      a b + c
    variance  va vb + a^2 vb + b^2 va + 2 a b c + c^2

and moves as `b da + a db` to first order; the rest of the variance is new.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.independent import rectified
from .call import Call, rule
from .run import Run
from .shapes import state_of
from .state import (
    State,
    apart,
    combined,
    covariance_of,
    linked,
    of_draws,
    sum_of,
)
from .value import Travelling


@rule("pair")
def of_pair(call: Call) -> Any:
    """A function of values that have different origins."""
    if len(call.args) < 2 or not all(
        isinstance(one, (Tensor, Travelling)) for one in call.args[:2]
    ):
        return NotImplemented
    rule = _RULES.get(call.name)
    return NotImplemented if rule is None else rule(call)


def _sum(call: Call) -> Any:
    alpha = float(call.kwargs.get("alpha", 1))
    sign = -alpha if call.name == "sub" else alpha
    one, other = (state_of(arg) for arg in call.args[:2])
    mean = one.mean + sign * other.mean
    run = call.run
    return Travelling.of(run, run.mixed(sum_of(one, other, sign, mean)))


def _reversed(call: Call) -> Any:
    return _sum(Call.of(torch.sub, (call.args[1], call.args[0]), call.kwargs))


def product_of(one: State, other: State, run: Run) -> State:
    """The state of the product of two values, entry by entry."""
    with apart():
        first, second = one.at, other.at
        covariance = covariance_of(one, other) if run.carrier == "exact" else None
        by_first = first.square() * other.variance
        by_second = second.square() * one.variance
        new = one.variance * other.variance
        both = torch.zeros_like(new) if covariance is None else covariance
        variance = by_first + by_second + 2 * first * second * both
        new = (new + both.square()).expand(variance.shape)
    mean = one.mean * other.mean
    if covariance is not None:
        mean = mean + both.to(mean.dtype)

    def linear() -> Tensor | None:
        return combined(mean, (one.factors, other.mean), (other.factors, one.mean))

    def columns() -> Tensor | None:
        together = covariance_of(one, other)  # which is no part of the mean: few draws
        middle = mean if together is None else mean + together.to(mean.dtype)
        return of_draws(torch.mul, middle, run.columns, one, other)

    return run.after(mean, variance.clamp_min(0), new, linear, columns)


def _product(call: Call) -> Any:
    one, other = (state_of(arg) for arg in call.args[:2])
    return Travelling.of(call.run, product_of(one, other, call.run))


def _quotient(call: Call) -> Any:
    if call.kwargs.get("rounding_mode") is not None:
        return NotImplemented
    return call.args[0] * torch.reciprocal(call.args[1])


def _where(call: Call) -> Any:
    """`where(condition, x, y)` with a condition that does not vary, or is taken at the mean."""
    condition, one, other = call.args
    if isinstance(condition, Travelling):
        condition = condition.expectation()
    first, second = (
        state_of(arg if isinstance(arg, Tensor) else torch.tensor(arg)) for arg in (one, other)
    )
    mean = torch.where(condition, first.mean, second.mean)
    with apart():
        variance = torch.where(condition, first.variance, second.variance)
        keep = condition.to(mean.dtype)
        factors = combined(mean, (first.factors, keep), (second.factors, 1 - keep))
    return Travelling.of(call.run, State(mean, variance, factors))


def larger_of(one: State, other: State, run: Run) -> State:
    """The larger of two Gaussians, entry by entry (Clark 1961)."""
    with apart():
        first, second = one.at, other.at
        gap = first - second
        spread = sum_of(one, other, -1.0, gap).variance
        added, _, share = rectified(gap, spread)  # E[max(one - other, 0)]
        expected = second + added
        density = added - gap * share  # deviation times density of the gap
        square = (
            (first.square() + one.variance) * share
            + (second.square() + other.variance) * (1 - share)
            + (first + second) * density
        )
        variance = (square - expected.square()).clamp_min(0)
        slope = share.to(one.mean.dtype)
        rest = 1 - slope
    mean = linked(linked(expected.to(one.mean.dtype), one.mean, slope), other.mean, rest)
    with apart():
        covariance = (one.variance + other.variance - spread) / 2
        linear = share.square() * one.variance + (1 - share).square() * other.variance
        linear = linear + 2 * share * (1 - share) * covariance
        linear = torch.minimum(linear, variance)

    def factors() -> Tensor | None:
        return combined(mean, (one.factors, share), (other.factors, 1 - share))

    def columns() -> Tensor | None:
        return of_draws(torch.maximum, mean, run.columns, one, other)

    return run.after(mean, linear, variance - linear, factors, columns)


def _maximum(call: Call) -> Any:
    one, other = (state_of(arg) for arg in call.args[:2])
    return Travelling.of(call.run, larger_of(one, other, call.run))


def _minimum(call: Call) -> Any:
    return -torch.maximum(-call.args[0], -call.args[1])


_RULES = {
    "add": _sum,
    "div": _quotient,
    "maximum": _maximum,
    "minimum": _minimum,
    "mul": _product,
    "rsub": _reversed,
    "sub": _sum,
    "where": _where,
}


def mixture(share: Any, one: Any, other: Any) -> Any:
    """`share * one + (1 - share) * other`. Without columns, the three are taken as independent: of the
    sum of two products, the second would not know that the share is the same."""
    values = [value for value in (share, one, other) if isinstance(value, Travelling)]
    if not values or values[0].run.carrier == "exact":
        return other + share * (one - other)
    run = values[0].run
    by, first, second = (state_of(value) for value in (share, one, other))
    gap = first.at - second.at
    with apart():
        moved = by.at.square() * first.variance + (1 - by.at).square() * second.variance
        moved = moved + gap.square() * by.variance
        new = by.variance * (first.variance + second.variance)
    mean = second.mean + by.mean * (first.mean - second.mean)

    def linear() -> Tensor | None:
        terms = (first.factors, by.at), (second.factors, 1 - by.at), (by.factors, gap)
        return combined(mean, *terms)

    def columns() -> Tensor | None:
        return of_draws(_mixed, mean, run.columns, by, first, second)

    return Travelling.of(run, run.after(mean, moved, new, linear, columns, mixes=True))


def _mixed(share: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return other + share * (one - other)
