"""What is known of a travelling value: mean, variance, and how it varies with others."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..moments import Points


class _Recording(threading.local):
    """Whether a graph is recorded by which means are differentiated by what is born, and by nothing
    else: see `adjoint`. In any other forward, gradients flow as ever."""

    def __init__(self) -> None:
        self.on = False


_recording = _Recording()


def record(on: bool) -> None:
    """From now on, in this thread."""
    _recording.on = on


def apart() -> AbstractContextManager[Any]:
    """For what has no part in such a graph: variances, weights, and what means are made of by another
    way than a gain."""
    return torch.no_grad() if _recording.on else nullcontext()


def fixed(tensor: Tensor) -> Tensor:
    """A tensor that has no part in such a graph."""
    return tensor.detach() if _recording.on else tensor


def is_recorded(mean: Tensor) -> bool:
    """Whether a mean has a part in one."""
    return _recording.on and mean.requires_grad


class _Linked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, source: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        ctx.shape = source.shape
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        own = grads[0] if ctx.needs_input_grad[0] else None
        return own, (grads[0] * slope).sum_to_size(ctx.shape), None


def linked(value: Tensor, source: Tensor, slope: Tensor) -> Tensor:
    """The value; in a graph that is recorded it has this slope by its source."""
    if not is_recorded(source):
        return value
    found: Tensor = _Linked.apply(value, source, slope)  # type: ignore[no-untyped-call]
    return found


@dataclass(eq=False)
class State:
    """Moments of a tensor of one shape."""

    mean: Tensor
    """Has a graph while a run records for backward passes; see `adjoint`."""
    variance: Tensor
    """Of each entry; the shape of the mean, at least float32. Has no graph while a run records."""
    factors: Tensor | None = None
    """(columns, *shape) or None: column k is what the value does when the k-th latent of the run,
    of mean 0 and variance 1, grows by 1; of draws, by how much the k-th differs from the mean, over
    the root of their number. Two values of a run covary by the sum of products of their columns."""

    points: Points | None = None
    """The few values that an entry can have, if they are so few: then the value is no Gaussian."""

    views: dict[Any, Any] = field(default_factory=dict)
    """What views of it are, by name and arguments: the same view again is the same state."""

    swing: Tensor | None = None
    """Columns of the variance that was born last, perhaps fewer: see `swing`. Known between a site and
    the activation that follows it, where columns are exact."""

    @property
    def at(self) -> Tensor:
        """The mean without its graph, in the dtype of the variance."""
        return fixed(self.mean).to(self.variance.dtype)

    def draw(self, index: int, sign: float = 1.0) -> Tensor:
        """One of the draws, in a run with draws. With sign -1 its mirror image."""
        mean = fixed(self.mean)
        if self.factors is None:
            return mean
        return torch.add(mean, self.factors[index], alpha=sign * math.sqrt(len(self.factors)))

    def moved(self, function: Callable[[Tensor], Tensor], factors: Tensor | None = None) -> State:
        """After a function that only moves entries or copies them."""
        with apart():
            variance = function(self.variance)
            if factors is None and self.factors is not None:
                factors = over_columns(function, self.factors)
        points = self.points
        if points is not None:
            points = tuple((function(value), probability) for value, probability in points)
        return State(function(self.mean), variance, factors, points)

    def scaled(self, mean: Tensor, scale: Tensor | float) -> State:
        """After a function that is affine in each entry.

        Args:
            mean: what it makes of the mean.
            scale: its slopes; broadcasts to `mean`.
        """
        with apart():
            unchanged = isinstance(scale, float) and abs(scale) == 1
            variance = self.variance if unchanged else self.variance * scale**2
            variance, factors = variance.expand(mean.shape), self.factors
            if factors is not None:
                factors = (aligned(factors, mean.ndim) * scale).to(mean.dtype)
                factors = factors.expand(len(factors), *mean.shape)
        return State(mean, variance, factors)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of variances of values of a dtype."""
    return torch.promote_types(dtype, torch.float32)


def certain(mean: Tensor) -> State:
    """The state of a tensor that does not vary."""
    zeros = torch.zeros((), dtype=wide(mean.dtype), device=mean.device)
    return State(mean, zeros.expand(mean.shape))


def of_draws(
    function: Callable[..., Tensor], mean: Tensor, count: int, *states: State
) -> Tensor | None:
    """The columns of a function of values in a run with draws: by how much it differs from its mean at
    each, over the root of their number. None if nothing varies.

    One by one, so that what is made on the way stays in the cache.
    """
    if all(state.factors is None for state in states):
        return None
    middle, root, found = fixed(mean), math.sqrt(count), None
    for draw in range(count):
        value = function(*(state.draw(draw) for state in states))
        if found is None:
            shape = torch.broadcast_shapes(value.shape, middle.shape)
            found = torch.empty(count, *shape, dtype=middle.dtype, device=middle.device)
        torch.sub(value, middle, out=found[draw]).mul_(1 / root)
    return found


def average_of_draws(function: Callable[[Tensor], Tensor], state: State) -> Tensor:
    """The mean of a function over all draws of a value that varies, and their mirror images: to second
    order as exact as their covariance is."""
    assert state.factors is not None
    total, count = torch.zeros(()), len(state.factors)
    for draw in range(count):
        for sign in (1.0, -1.0):
            value = function(state.draw(draw, sign))
            total = total + value if draw == 0 and sign > 0 else total.add_(value)
    return total / (2 * count)


def over_columns(function: Callable[[Tensor], Tensor], factors: Tensor) -> Tensor:
    """What a linear function makes of every column."""
    moved: Tensor = torch.vmap(function)(factors)
    return moved


def aligned(factors: Tensor, ndim: int) -> Tensor:
    """The columns with dimensions of size 1 put in, so that they broadcast to values of `ndim`
    dimensions."""
    missing = ndim - (factors.ndim - 1)
    return (
        factors.view(len(factors), *(1,) * missing, *factors.shape[1:]) if missing > 0 else factors
    )


def carried_by(factors: Tensor, dtype: torch.dtype) -> Tensor:
    """The variance of each entry that columns have."""
    total = torch.zeros(factors.shape[1:], dtype=dtype, device=factors.device)
    for column in factors:  # a sum along the first dimension would first write all squares
        own = column.to(dtype)
        total.addcmul_(own, own)
    return total


def same_columns(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both with as many columns: the later one knows of more latents."""
    count = max(len(one), len(other))
    return _padded(one, count), _padded(other, count)


def _padded(factors: Tensor, count: int) -> Tensor:
    missing = count - len(factors)
    return (
        factors
        if not missing
        else torch.cat([factors, factors.new_zeros(missing, *factors.shape[1:])])
    )


def covariance_of(one: State, other: State) -> Tensor | None:
    """The covariance of two values, entry by entry (they broadcast); None if it is not carried."""
    if one.factors is None or other.factors is None:
        return None
    ndim = max(one.mean.ndim, other.mean.ndim)
    first, second = same_columns(aligned(one.factors, ndim), aligned(other.factors, ndim))
    return (first * second).sum(0).to(one.variance.dtype)


def sum_of(one: State, other: State, sign: float, mean: Tensor) -> State:
    """The state of `one + sign * other`, whose mean is `mean`.

    Draws know every variance with the same relative error. So they tell which share of the
    variance of independent values is left, also where they nearly cancel.
    """
    with apart():
        variance = torch.add(one.variance, other.variance, alpha=sign**2).expand(mean.shape)
        factors = combined(mean, (one.factors, 1.0), (other.factors, sign))
        if one.factors is None or other.factors is None:
            return State(mean, variance, factors)
        assert factors is not None
        together = carried_by(factors, variance.dtype)
        first, second = (
            carried_by(aligned(state.factors, mean.ndim), variance.dtype)
            for state in (one, other)
            if state.factors is not None
        )
        alone = torch.add(first, second, alpha=sign**2)
        share = torch.where(alone > 0, together / torch.where(alone > 0, alone, 1), 1)
    return State(mean, variance * share, factors)


def combined(mean: Tensor, *terms: tuple[Tensor | None, Tensor | float]) -> Tensor | None:
    """The sum of columns times slopes; all broadcast to `mean`. None if there are no columns."""
    total: Tensor | None = None
    for factors, slope in terms:
        if factors is None:
            continue
        term = aligned(factors, mean.ndim)
        if isinstance(slope, Tensor) or slope != 1:
            term = term * slope
        if total is None:
            total = term
        else:
            total, term = same_columns(total, term)
            total = total + term
    return None if total is None else total.to(mean.dtype).expand(len(total), *mean.shape)
