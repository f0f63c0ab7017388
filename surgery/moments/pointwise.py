"""Elementwise functions of a `Gaussian`: put off, and what is known of the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from .. import ops
from . import torch_functions as table
from .gaussian import Gaussian, Source
from .scope import settle


def leaves_domain(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a Gaussian gets into a place of a function that is not defined on the whole line or has a
    pole (`log(u)`, `1 / u`). Then there is no expectation."""
    if name in table.PARTIAL:
        reached = args[:1]
    elif "div" in name:
        reached = args[1:]
    elif name == "pow":
        whole = isinstance(args[1], (int, float)) and args[1] >= 0 and args[1] == int(args[1])
        reached = () if whole else args[:1]
    else:
        return False
    return any(isinstance(one, Gaussian) and one.normal is not None for one in reached)


def pointwise(
    func: Any, name: str, values: list[Gaussian], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """An elementwise function of Gaussians and tensors.

    Args:
        func, name: the torch function, and its canonical name.
        values: the Gaussians among the arguments, at least one.
        args, kwargs: all arguments.

    Returns:
        a Gaussian if all values have one source or the result is a sum of two, and otherwise the
        expectation of the result.
    """
    if any(value.source is not values[0].source for value in values):
        return _independent(func, name, values, args, kwargs)
    value = values[0]
    value.check()
    # Arguments as they are now: a value can be written to before the function is applied.
    given = [_bound(arg) for arg in args]
    named = {k: _bound(arg) for k, arg in kwargs.items()}

    def function(u: Tensor) -> Tensor:
        result: Tensor = func(
            *(arg(u) if late else arg for late, arg in given),
            **{k: v(u) if late else v for k, (late, v) in named.items()},
        )
        return result

    others = (*args, *kwargs.values())
    captures = any(one.captures for one in values)
    captures = captures or any(isinstance(other, Tensor) and other.ndim > 0 for other in others)
    normal = _affine(func, name, args, kwargs)
    closed = _closed(func, name, args, kwargs) if len(values) == 1 else None
    return Gaussian(value.source, function, normal, closed, captures)


def _bound(arg: Any) -> tuple[bool, Any]:
    """Whether an argument is a Gaussian; and its function of the source, or else the argument."""
    return (True, arg.apply) if isinstance(arg, Gaussian) else (False, arg)


def _affine(
    func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """Mean and variance after a shift or a scaling of one Gaussian; None after anything else."""
    if kwargs or not _is_linear(name, args):
        return None
    value = next(arg for arg in args if isinstance(arg, Gaussian))
    if value.normal is None:
        return None
    mean, variance = value.normal
    moved: Tensor = func(*(mean if arg is value else arg for arg in args))
    if name in table.SCALES:
        scale = func(*(torch.ones_like(mean) if arg is value else arg for arg in args))
        return moved, variance * scale * scale
    return moved, variance.expand_as(moved)


def _is_linear(name: str, args: tuple[Any, ...]) -> bool:
    """Whether the result is affine in the one Gaussian among the arguments."""
    return table.is_affine(name, [i for i, arg in enumerate(args) if isinstance(arg, Gaussian)])


def _closed(
    func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], Tensor] | None:
    """Computes the expectation of a function of one value without its composition with what came
    before: for an activation that reads a Gaussian itself (some have closed forms), and for what is
    affine in the result of such a one. None for others."""
    value = next((arg for arg in args if isinstance(arg, Gaussian)), None)
    if value is None or name in table.COMPARISONS or value.source.points is not None:
        return None
    before = value.closed
    if before is not None and not kwargs and _is_linear(name, args):
        return lambda: func(*(before() if arg is value else arg for arg in args))
    if value.normal is None:
        return None
    mean, variance = value.normal

    def activation(t: Tensor) -> Tensor:
        result: Tensor = func(*(t if arg is value else arg for arg in args), **kwargs)
        return result

    tanh = kwargs.get("approximate") == "tanh"  # the other GELU
    mean, variance = torch.broadcast_tensors(mean, variance)
    return lambda: ops.expectation(activation, mean, variance, None if tanh else name)


def _independent(
    func: Any, name: str, values: list[Gaussian], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A function of values of several sources.

    The sum of two independent Gaussians is a Gaussian. For any other function of independent values it
    is applied to their expectations, which is right for sums and products. If values are not
    independent (overlapping views of one pre-activation), it is applied to their values at the mean.
    """
    if not all(one.source.is_independent_of(two.source) for one, two in combinations(values, 2)):
        return func(*_at_means(args), **dict(zip(kwargs, _at_means(kwargs.values()))))
    normals = [value.normal for value in values if value.normal is not None]
    result = func(*settle(args), **settle(kwargs))
    if name not in table.ADDS or kwargs or len(args) != 2 or len(normals) != 2:
        return result
    variance = normals[0][1] + normals[1][1]
    source = values[0].source
    site = f"{source.site} and {values[1].source.site}"
    parents = tuple(value.source for value in values)
    return Gaussian.of(Source(result, variance, site, source.draws, parents=parents))


def _at_means(args: Iterable[Any]) -> list[Any]:
    return [arg.at_mean() if isinstance(arg, Gaussian) else arg for arg in args]
