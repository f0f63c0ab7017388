"""Elementwise functions of a `Gaussian`: put off, and what is known of the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from . import torch_functions as table
from .gaussian import Gaussian, Source
from .scope import Deferred, settle


class Call:
    """A call of a torch function, with Gaussians among its arguments or inside of them. Values that
    travel (`surgery.travel`) settle where they meet one.

    Args:
        func, name: the torch function, and its canonical name.
        args, kwargs: all arguments.
    """

    def __init__(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func, self.name = func, name
        self.args = tuple(map(_settled_other, args))
        self.kwargs = {key: _settled_other(value) for key, value in kwargs.items()}

    def gaussians(self) -> list[Gaussian]:
        """Those that are arguments themselves."""
        return [one for one in (*self.args, *self.kwargs.values()) if isinstance(one, Gaussian)]

    def settled(self) -> Any:
        """What the function makes of the expectations."""
        return self.func(*settle(self.args), **settle(self.kwargs))

    def of_first(self) -> Callable[[Any], Any]:
        """The function of its first argument alone; the others are settled now."""
        rest, named = settle(self.args[1:]), settle(self.kwargs)
        return lambda first: self.func(first, *rest, **named)


def _settled_other(value: Any) -> Any:
    drawn = isinstance(value, Gaussian) or not isinstance(value, Deferred)
    return value if drawn else settle(value)


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


def pointwise(call: Call) -> Any:
    """An elementwise function of Gaussians, at least one, and tensors.

    Returns:
        a Gaussian if all values have one source or the result is a sum of two, and otherwise the
        expectation of the result.
    """
    func, args, kwargs = call.func, call.args, call.kwargs
    values = call.gaussians()
    value = values[0]
    if any(other.source is not value.source for other in values):
        return _independent(call, values)
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
    alone = len(values) == 1 and any(arg is value for arg in args)
    normal = _affine(call, value) if alone else None
    return Gaussian(value.source, function, normal, captures)


def _bound(arg: Any) -> tuple[bool, Any]:
    """Whether an argument is a Gaussian; and its function of the source, or else the argument."""
    return (True, arg.apply) if isinstance(arg, Gaussian) else (False, arg)


def _affine(call: Call, value: Gaussian) -> tuple[Tensor, Tensor] | None:
    """Mean and variance after a shift or a scaling of the one Gaussian; None after anything else."""
    if call.kwargs or not _is_linear(call) or value.normal is None:
        return None
    mean, variance = value.normal
    moved: Tensor = _with(call, value, mean)
    if call.name in table.SCALES:
        scale = _with(call, value, torch.ones_like(mean))
        return moved, variance * scale * scale
    return moved, variance.expand_as(moved)


def _with(call: Call, value: Gaussian, tensor: Tensor) -> Any:
    """What the function makes of its arguments with a tensor in the place of the one Gaussian."""
    args = (tensor if arg is value else arg for arg in call.args)
    return call.func(*args, **call.kwargs)


def _is_linear(call: Call) -> bool:
    """Whether the result is affine in the one Gaussian among the arguments."""
    positions = [i for i, arg in enumerate(call.args) if isinstance(arg, Gaussian)]
    return table.is_affine(call.name, positions)


def _independent(call: Call, values: list[Gaussian]) -> Any:
    """A function of values of several sources.

    The sum of two independent Gaussians is a Gaussian. For any other function of independent values it
    is applied to their expectations, which is right for sums and products. If values are not
    independent (overlapping views of one pre-activation), it is applied to their values at the mean.
    """
    if not all(one.source.is_independent_of(two.source) for one, two in combinations(values, 2)):
        named = dict(zip(call.kwargs, _at_means(call.kwargs.values())))
        return call.func(*_at_means(call.args), **named)
    normals = [value.normal for value in values if value.normal is not None]
    result = call.settled()
    if call.name not in table.ADDS or call.kwargs or len(call.args) != 2 or len(normals) != 2:
        return result
    variance = normals[0][1] + normals[1][1]
    source = values[0].source
    site = f"{source.site} and {values[1].source.site}"
    parents = tuple(value.source for value in values)
    return Gaussian.of(Source(result, variance, site, source.draws, parents=parents))


def _at_means(args: Iterable[Any]) -> list[Any]:
    return [arg.at_mean() if isinstance(arg, Gaussian) else arg for arg in args]
