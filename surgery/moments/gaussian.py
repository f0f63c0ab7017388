"""A value that is a function of a Gaussian, which torch functions take for a tensor."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from ..scope import Deferred
from .elementwise import VIEWS

Apply = Callable[[Tensor], Tensor]


@dataclasses.dataclass(eq=False)
class Source:
    """The Gaussian that a site made: independent elements, and independent of every other source."""

    mean: Tensor
    variance: Tensor
    site: str
    draws: int | None
    """Z, if expectations are estimated by that many draws."""


def _same(u: Tensor) -> Tensor:
    return u


class Gaussian(Deferred):
    """`apply(u)` with `u` a Gaussian source: what the rest of a forward takes for a tensor."""

    dispatch: ClassVar[Callable[..., Any]]
    """`dispatch(func, args, kwargs)`: what a torch function makes of it; `functions` puts it here."""

    def __init__(
        self,
        source: Source,
        apply: Apply = _same,
        normal: tuple[Tensor, Tensor] | None = None,
        closed: Callable[[], Tensor] | None = None,
        captures: bool = False,
    ) -> None:
        self.source = source
        self.apply = apply
        self.normal = normal
        """Mean and variance, while the value is Gaussian itself."""
        self.closed = closed
        """The expectation, if there is a better way to it than through `apply`."""
        self.captures = captures
        """Whether `apply` holds tensors of the shape of its argument, or looks at dimensions."""

    @classmethod
    def of(cls, mean: Tensor, variance: Tensor, site: str, draws: int | None) -> Gaussian:
        """A fresh Gaussian, independent of all others."""
        return cls(Source(mean, variance, site, draws), normal=(mean, variance))

    def expectation(self) -> Tensor:
        """The mean of the value; of what is no floating-point number, the value at the mean."""
        source = self.source
        if self.normal is not None:
            return self.normal[0]
        if source.draws is None and self.closed is not None:
            return self.closed()
        like = self.at_mean()
        if not like.is_floating_point():
            return like
        if source.draws is not None:
            return self._by_draws(source.draws).to(like.dtype)
        return ops.expectation(self.apply, source.mean, source.variance).to(like.dtype)

    def at_mean(self) -> Tensor:
        """The value at the mean of the source: a tensor of the same form."""
        return self.apply(self.source.mean) if self.normal is None else self.normal[0]

    def _by_draws(self, count: int) -> Tensor:
        mean, variance = self.source.mean, self.source.variance
        if not self.captures:
            return ops.expectation_by_draws(self.apply, mean, variance, count)
        total = self.apply(ops.gaussian_sample(mean, variance))
        for _ in range(count - 1):
            total = total + self.apply(ops.gaussian_sample(mean, variance))
        return total / count

    def rearranged(self, function: Callable[[Tensor], Any]) -> Any:
        """A view: of a Gaussian, new ones; of a function of one, that of its expectation."""
        if self.normal is None:
            return function(self.expectation())
        source, (mean, variance) = self.source, self.normal
        means, variances = function(mean), function(variance)
        if isinstance(means, Tensor):
            return Gaussian.of(means, variances, source.site, source.draws)
        return tuple(
            Gaussian.of(one, other, source.site, source.draws)
            for one, other in zip(means, variances)
        )

    def become(self, value: Any) -> Gaussian:
        """Take another value, as functions that write into their argument do."""
        if not isinstance(value, Gaussian):
            source = self.source
            value = Gaussian.of(value, torch.zeros_like(value), source.site, source.draws)
        self.source, self.apply, self.normal = value.source, value.apply, value.normal
        self.closed, self.captures = value.closed, value.captures
        return self

    def __repr__(self) -> str:
        return f"Gaussian(site={self.source.site!r}, shape={tuple(self.shape)})"

    def __getattr__(self, name: str) -> Any:
        member = getattr(Tensor, name)
        if callable(member):
            return functools.partial(_call, member, self)
        if name in VIEWS:
            return self.rearranged(lambda t: getattr(t, name))
        return getattr(self.at_mean(), name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return Gaussian.dispatch(func, args, kwargs or {})


def _call(member: Any, *args: Any, **kwargs: Any) -> Any:
    return Gaussian.dispatch(member, args, kwargs)


def _operator(name: str) -> Callable[..., Any]:
    member = getattr(Tensor, name)

    def operator(self: Gaussian, *args: Any) -> Any:
        return Gaussian.dispatch(member, (self, *args), {})

    return operator


_OPERATORS = (
    "add radd sub rsub mul rmul truediv rtruediv pow rpow neg pos abs matmul rmatmul mod floordiv "
    "gt lt ge le eq ne and or xor rand ror rxor invert getitem setitem len bool float int iter contains"
)
for _name in _OPERATORS.split():
    setattr(Gaussian, f"__{_name}__", _operator(f"__{_name}__"))
for _name, _writer in {"iadd": "add_", "isub": "sub_", "imul": "mul_", "itruediv": "div_"}.items():
    setattr(Gaussian, f"__{_name}__", _operator(_writer))
