"""A value that is a function of a Gaussian, which torch functions take for a tensor.

A `Source` is the Gaussian that a site made; a `Gaussian` is a value `apply(u)` of it, where u has
the shape of the source's mean.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from ..torch_private.modes import outside_of_inference
from ..torch_private.tensors import version_of
from .pieces import Piece, disjoint
from .scope import Deferred, hashable, same
from .torch_functions import OPERATORS, VIEWS

Apply = Callable[[Tensor], Tensor]
Points = tuple[tuple[Tensor, Tensor], ...]
"""Pairs of a value, of the shape of the mean, and its probability, which broadcasts to that shape."""


@dataclasses.dataclass(eq=False)
class Source:
    """The Gaussian that a site made. Its entries are taken as independent, as are those of different
    sites. `mean` and `variance` have one shape."""

    mean: Tensor
    variance: Tensor
    site: str
    draws: int
    """`samples=Z`: how many draws estimate an expectation."""

    points: Points | None = None
    """The few values that an entry can have, where one mask entry multiplies the whole pre-activation
    (`unit="output"` and `"tensor"`); None if the entries are sums of many terms."""

    shared: bool = False
    """Whether entries share mask entries; then two parts of this source are not independent."""

    root: Source | None = None
    """The source that this one is a view of."""

    piece: Piece = ()
    """Which part of the root it is."""

    parents: tuple[Source, ...] = ()
    """The sources of which it is a sum, or which were joined."""

    views: dict[Any, Any] = dataclasses.field(default_factory=dict)
    """Views that were taken of this one, by their names: the same view again is the same source."""

    def is_independent_of(self, other: Source) -> bool:
        """Whether no mask entry is behind both."""
        if self.roots().isdisjoint(other.roots()):
            return True
        same = (self.root or self) is (other.root or other)
        return same and not self.shared and disjoint(self.piece, other.piece)

    def roots(self) -> frozenset[int]:
        """The ids of the sources of sites that it was made of."""
        whole = self.root or self
        if not whole.parents:
            return frozenset({id(whole)})
        return frozenset().union(*(parent.roots() for parent in whole.parents))


class Gaussian(Deferred):
    """`apply(u)` with `u` a Gaussian source: what the rest of a forward takes for a tensor."""

    dispatch: ClassVar[Callable[..., Any]]
    """`dispatch(func, args, kwargs)`: what a torch function makes of it; `functions` puts it here."""

    def __init__(
        self,
        source: Source,
        apply: Apply = same,
        normal: tuple[Tensor, Tensor] | None = None,
        captures: bool = False,
    ) -> None:
        self.source = source
        self.apply = apply
        self.normal = normal
        """Mean and variance, while the value is Gaussian itself."""
        self.captures = captures
        """Whether `apply` works for the shape of the source only: it holds tensors of that shape,
        or looks at dimensions. Then draws cannot be stacked."""
        self.base: Gaussian | None = None
        """The value that this one is a view of."""
        self.overwritten = False
        """Whether something was written into a view of it."""
        self.writes: list[Piece] = []
        """Which parts were written to. One list for all values that would share memory as tensors."""
        self.seen = 0
        """How many of these writes it has seen."""
        self.shown: tuple[Tensor, int] | None = None
        """The tensor of which views were handed out, and its version at that time; a later version
        tells that somebody wrote into a view."""

    @classmethod
    def of(cls, source: Source) -> Gaussian:
        """The Gaussian itself."""
        return cls(source, normal=(source.mean, source.variance))

    def expectation(self) -> Tensor:
        """The mean of the value, in its dtype and shape: known where the value is Gaussian itself or
        the source has few values, else that of draws. A value that is no floating-point number, as a
        comparison, has none: it is taken at the mean of the source.

        Raises:
            RuntimeError: it was written to in a way that cannot be followed; see `check`.
        """
        source = self.source
        self.check()
        if self.normal is not None:
            return self.normal[0]
        like = self.at_mean()
        if not like.is_floating_point():
            return like
        if source.points is not None:
            expected = sum(self.apply(value) * probability for value, probability in source.points)
            assert isinstance(expected, Tensor)
        else:
            expected = self._by_draws(source.draws)
        return expected.to(like.dtype)

    def at_mean(self) -> Tensor:
        """The value at the mean of the source: a tensor of the same form."""
        return self.apply(self.source.mean) if self.normal is None else self.normal[0]

    def check(self) -> None:
        """Take over what was written into views of the expectation.

        Raises:
            RuntimeError: a part was written to through another view, so that the value is not known.
        """
        if self.shown is not None and version_of(self.shown[0]) != self.shown[1]:
            value = self.shown[0]
            self.shown = value, version_of(value)
            self._take(self._constant(value))
        others = self.writes[self.seen :]
        if self.overwritten or not all(disjoint(self.source.piece, piece) for piece in others):
            raise RuntimeError(
                f"{self.source.site}: inference='moments' cannot follow a write into a view of what "
                "this site returned (`u[:, :4].relu_()`), nor a view that was taken before a write; "
                "write `u = torch.cat([...])`, use a function that does not write in place, or give "
                "this site inference='mean'"
            )

    def _by_draws(self, count: int) -> Tensor:
        mean, variance = self.source.mean, self.source.variance
        if not self.captures:
            return ops.expectation_by_draws(self.apply, mean, variance, count)
        total = self.apply(ops.gaussian_sample(mean, variance))
        for _ in range(count - 1):
            total = total + self.apply(ops.gaussian_sample(mean, variance))
        return total / count

    def rearranged(self, function: Callable[[Tensor], Any], key: Any = None) -> Any:
        """A view, or several of them in a tuple (`chunk`). Views of a Gaussian are Gaussians; those
        of a function of one are tensors, views of its expectation.

        Args:
            function: makes the view of a tensor.
            key: the name and arguments of the view: the same view again is then the same source. None
                if it has no name.
        """
        self.check()
        if self.normal is None or self.shown is not None:
            return function(self._show())
        name = hashable(key) if self.apply is same else None
        sources = None if name is None else self.source.views.get(name)
        if sources is None:
            sources = self._views(function, key)
            if name is not None:
                self.source.views[name] = sources
        if isinstance(sources, Source):
            return self._view(sources)
        return tuple(map(self._view, sources))

    def _show(self) -> Tensor:
        """The expectation as one tensor for all views, so that what is written into one view is seen in
        the others and in this value. Compiled graphs do not follow versions: there, writes are not
        seen."""
        if torch.compiler.is_compiling():
            return self.expectation()
        if self.shown is None:
            value = self.expectation()
            if value.is_inference():  # such a tensor does not count writes
                with outside_of_inference():
                    value = value.clone()
            self.shown = value, version_of(value)
        return self.shown[0]

    def _view(self, source: Source) -> Gaussian:
        view = Gaussian.of(source)
        view.base, view.writes, view.seen = self, self.writes, len(self.writes)
        return view

    def _views(self, function: Callable[[Tensor], Any], key: Any) -> Any:
        assert self.normal is not None
        source, whole = self.source, self.normal[0].shape
        points = [(function(self.apply(value)), one) for value, one in source.points or ()]
        means, variances = (function(one) for one in self.normal)

        def part(mean: Tensor, variance: Tensor, values: list[Tensor], index: int | None) -> Source:
            new = tuple((value, one) for value, (_, one) in zip(values, points)) or None
            piece = (*source.piece, (key, index, whole))
            root = source.root or source
            return Source(
                mean, variance, source.site, source.draws, new, source.shared, root, piece
            )

        if isinstance(means, Tensor):
            return part(means, variances, [value for value, _ in points], None)
        return [
            part(mean, variance, [value[i] for value, _ in points], i)
            for i, (mean, variance) in enumerate(zip(means, variances))
        ]

    def become(self, value: Any) -> Gaussian:
        """Take another value, a Gaussian or a tensor, as an argument does that is written to."""
        base = self.base
        while base is not None:
            base.overwritten, base = True, base.base
        self.writes.append(self.source.piece)
        self.seen = len(self.writes)
        self._take(value if isinstance(value, Gaussian) else self._constant(value))
        if self.shown is not None and self.shown[0].shape != self.shape:  # `unsqueeze_`: no write
            self.shown = None
        if self.shown is not None:  # its views see what is written
            shown, self.shown = self.shown[0], None
            shown.copy_(self.expectation())
            self.shown = shown, version_of(shown)
        return self

    def _constant(self, value: Tensor) -> Gaussian:
        source = self.source
        return Gaussian.of(Source(value, torch.zeros_like(value), source.site, source.draws))

    def _take(self, value: Gaussian) -> None:
        self.source, self.apply, self.normal = value.source, value.apply, value.normal
        self.captures = value.captures

    def __float__(self) -> float:
        return float(self.expectation())

    def __repr__(self) -> str:
        return f"Gaussian(site={self.source.site!r}, shape={tuple(self.shape)})"

    def __getattr__(self, name: str) -> Any:
        member = getattr(Tensor, name)
        if callable(member):
            return functools.partial(_call, member, self)
        if name in VIEWS:
            return self.rearranged(lambda t: getattr(t, name), name)
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


for _name in (*OPERATORS, "iter"):
    setattr(Gaussian, f"__{_name}__", _operator(f"__{_name}__"))


def points_of_two(
    mean: Tensor, of_weight: Tensor, of_bias: Tensor, scale: Tensor, bias_scale: Tensor
) -> Points:
    """The points of a pre-activation whose weight and bias each have one mask entry, of one draw: both
    are kept, or the one of smaller p, or none.

    Args:
        of_weight, of_bias: what the masks multiply.
        scale, bias_scale: 1 / (1 - p) of each; 0 where p is 1.
    """
    # p = 1 is in the mean already: nothing moves, as for p = 0.
    of_weight, of_bias = (
        torch.where(one == 0, 0, part) for one, part in ((scale, of_weight), (bias_scale, of_bias))
    )
    scale, bias_scale = (torch.where(one == 0, 1, one) for one in (scale, bias_scale))
    none = mean - of_weight - of_bias
    weight_kept, bias_kept = none + scale * of_weight, none + bias_scale * of_bias
    one = torch.where(scale < bias_scale, weight_kept, bias_kept)
    both = weight_kept + bias_scale * of_bias
    often, seldom = 1 / torch.minimum(scale, bias_scale), 1 / torch.maximum(scale, bias_scale)
    points = (both, seldom), (one, often - seldom), (none, 1 - often)
    return tuple((value.to(mean.dtype), probability) for value, probability in points)
