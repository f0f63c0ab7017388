"""Linear functions: products with weights, sums, means and pooling.

mean  W m + b        variance  W^2 v  (entries independent; see `Run.mixed`)        columns  W F
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import Call, rule
from .run import Run
from .state import State, apart, fixed, of_draws, over_columns, same_columns
from .value import Travelling, expected
from .weight import Weight

Map = Callable[[Tensor], Tensor]


def mapped(
    state: State, run: Run, mean: Map, linear: Map, squares: Map, columns: Map | None = None
) -> Travelling:
    """The value after a linear function.

    Args:
        mean: the function, with what it adds.
        linear: the same without.
        squares: with its coefficients squared.
        columns: of all columns together, where that is faster than one by one.
    """
    with apart():
        variance = squares(state.variance)
        factors = state.factors
        if factors is not None:
            factors = over_columns(linear, factors) if columns is None else columns(factors)
    return Travelling.of(run, run.mixed(State(mean(state.mean), variance, factors)))


def _travels(value: Any) -> bool:
    return isinstance(value, Travelling)


@rule("linear", weights=True)
def linear(call: Call) -> Any:
    x, weight, bias = call.first, call.argument(1, "weight"), call.argument(2, "bias")
    if isinstance(weight, Weight):
        return weight.product(x, bias)
    if isinstance(bias, Weight):
        return bias.added_to(F.linear(x, weight))
    if not _travels(x) or _travels(weight) or _travels(bias):
        return NotImplemented
    weight = fixed(weight)
    state = x.state()
    squared = weight.to(state.variance.dtype).square()
    return mapped(
        state,
        x.run,
        lambda t: F.linear(t, weight, bias),
        lambda t: F.linear(t, weight),
        lambda t: F.linear(t, squared),
        lambda t: F.linear(t, weight),
    )


@rule("addmm", "addmv", "baddbmm")
def added(call: Call) -> Any:
    """`bias + x @ weight`."""
    if call.kwargs.get("beta", 1) != 1 or call.kwargs.get("alpha", 1) != 1:
        return NotImplemented
    return torch.matmul(call.args[1], call.args[2]) + call.args[0]


_CONVOLUTIONS = tuple(f"conv{n}d" for n in (1, 2, 3))
_TRANSPOSED = tuple(f"conv_transpose{n}d" for n in (1, 2, 3))


@rule(*_CONVOLUTIONS, *_TRANSPOSED)
def convolution(call: Call) -> Any:
    names: tuple[str, ...] = ("input", "weight", "bias", "stride", "padding")
    names += (
        ("dilation", "groups")
        if call.name in _CONVOLUTIONS
        else ("output_padding", "groups", "dilation")
    )
    given = {**dict(zip(names, call.args)), **call.kwargs}
    x, weight, bias = given.pop("input"), fixed(given.pop("weight")), given.pop("bias", None)
    if not _travels(x) or _travels(weight) or _travels(bias):
        return NotImplemented
    state = x.state()
    function = getattr(F, call.name)
    squared = weight.to(state.variance.dtype).square()
    batched = state.mean.ndim == weight.ndim
    return mapped(
        state,
        x.run,
        lambda t: function(t, weight, bias, **given),
        lambda t: function(t, weight, None, **given),
        lambda t: function(t, squared, None, **given),
        (lambda t: folded(lambda u: function(u, weight, None, **given), t)) if batched else None,
    )


def folded(function: Map, columns: Tensor) -> Tensor:
    """A function that works row by row, of all columns as rows."""
    moved = function(columns.flatten(0, 1))
    found: Tensor = moved.unflatten(0, columns.shape[:2])
    return found


@rule("matmul", "mm", "bmm", "mv", "dot", "rmatmul")
def matmul(call: Call) -> Any:
    one, other = call.args[:2]
    if call.name == "rmatmul":
        one, other = other, one
    return _bilinear(call, torch.matmul, one, other)


@rule("einsum")
def einsum(call: Call) -> Any:
    """Of two operands."""
    equation, *operands = call.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return NotImplemented
    return _bilinear(call, lambda a, b: torch.einsum(equation, a, b), *operands)


def _bilinear(call: Call, product: Callable[[Tensor, Tensor], Tensor], one: Any, other: Any) -> Any:
    run = call.run
    if _travels(one) and _travels(other):
        return Travelling.of(run, bilinear(product, one.state(), other.state(), run))
    if not _travels(one):
        return _bilinear(call, lambda a, b: product(b, a), other, one)
    plain = fixed(other)
    squared = plain.to(one.state().variance.dtype).square()
    return mapped(
        one.state(),
        run,
        lambda t: product(t, plain),
        lambda t: product(t, plain),
        lambda t: product(t, squared),
    )


def bilinear(
    product: Callable[[Tensor, Tensor], Tensor], one: State, other: State, run: Run
) -> State:
    """The state of a sum of products of two values. How they covary is part of the mean where there are
    columns: those of draws have the right sum of products in expectation. For the variance of what
    is new they are taken as independent.
    """
    mean = product(one.mean, other.mean)
    with apart():
        squares, others = one.at.square(), other.at.square()
        if not run.follows:  # what is moved and what is new, together
            variance = product(squares.add_(one.variance), other.variance)
            return State(mean, variance.add_(product(one.variance, others)))
        moved = product(squares, other.variance) + product(one.variance, others)
        new = product(one.variance, other.variance)
        together: Tensor | None = None
        if one.factors is not None and other.factors is not None:
            count = min(len(one.factors), len(other.factors))
            together = torch.vmap(product)(one.factors[:count], other.factors[:count])
    if together is not None:
        mean = mean + together.sum(0)

    def linear() -> Tensor | None:
        parts = []
        if one.factors is not None:
            parts.append(torch.vmap(lambda t: product(t, fixed(other.mean)))(one.factors))
        if other.factors is not None:
            parts.append(torch.vmap(lambda t: product(fixed(one.mean), t))(other.factors))
        return torch.add(*same_columns(*parts)) if len(parts) == 2 else parts[0] if parts else None

    def columns() -> Tensor | None:
        return of_draws(product, mean, run.columns, one, other)

    return run.after(mean, moved, new, linear, columns, mixes=True)


@rule("sum", "mean")
def total(call: Call) -> Any:
    value = call.first
    if not _travels(value):
        return NotImplemented
    state = value.state()
    function = call.of_first()
    mean = function(state.mean)
    count = 1 if call.name == "sum" else state.mean.numel() // max(1, mean.numel())
    return mapped(state, value.run, function, function, lambda t: function(t) / count)


@rule("cumsum")
def cumulative(call: Call) -> Any:
    value = call.first
    if not _travels(value):
        return NotImplemented
    function = call.of_first()
    return mapped(value.state(), value.run, function, function, function)


_AVERAGES = tuple(f"{kind}avg_pool{n}d" for kind in ("", "adaptive_") for n in (1, 2, 3))


@rule(*_AVERAGES)
def average_pool(call: Call) -> Any:
    """The square of each coefficient is what the function makes of a single 1, squared: entries count
    alike, so that it is the mean over `share` entries."""
    value = call.first
    if not _travels(value):
        return NotImplemented
    state, function = value.state(), call.of_first()
    spatial = int(call.name[-2])
    mean = function(state.mean)
    inside = math.prod(state.mean.shape[-spatial:])
    if call.name.startswith("adaptive"):
        share = inside / math.prod(mean.shape[-spatial:])
    else:
        kernel = call.argument(1, "kernel_size")
        share = kernel**spatial if isinstance(kernel, int) else math.prod(kernel)
    return mapped(
        state,
        value.run,
        function,
        function,
        lambda t: function(t) / share,
        (lambda t: folded(function, t)) if state.mean.ndim == spatial + 2 else None,
    )


@rule("embedding", weights=True)
def embedding(call: Call) -> Any:
    """Rows of a weight that varies."""
    weight = call.argument(1, "weight")
    if isinstance(weight, Weight):
        return weight.looked_up(expected(call.first))
    if not _travels(weight) or _travels(call.first):
        return NotImplemented
    index, state = call.first, weight.state()
    return Travelling.of(weight.run, state.moved(lambda t: F.embedding(index, t)))
