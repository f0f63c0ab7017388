"""A value that is a function of a Gaussian, which torch functions take for a tensor."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from ..base.torch_names import WRITERS, canonical
from ..torch_private.tensors import version_of
from .pieces import Piece, disjoint
from .scope import Deferred
from .torch_functions import ELEMENTWISE, VIEWS

Apply = Callable[[Tensor], Tensor]
Points = tuple[tuple[Tensor, Tensor], ...]


@dataclasses.dataclass(eq=False)
class Source:
    """The Gaussian that a site made: independent elements, and independent of every other source."""

    mean: Tensor
    variance: Tensor
    site: str
    draws: int | None
    """Z, if expectations are estimated by that many draws."""

    points: Points | None = None
    """The values that an element can have, each with its probability, if they are few: where one mask
    entry multiplies the whole pre-activation."""

    shared: bool = False
    """Whether elements share mask entries: then parts of it are not independent."""

    root: Source | None = None
    """What this is a view of."""

    piece: Piece = ()
    """Which part of the root it is."""

    parents: tuple[Source, ...] = ()
    """What it was added up or joined of."""

    views: dict[Any, Any] = dataclasses.field(default_factory=dict)
    """Views of this one, so that the same view twice is the same source."""

    def is_independent_of(self, other: Source) -> bool:
        """Whether no mask entry is behind both."""
        if self.roots().isdisjoint(other.roots()):
            return True
        same = (self.root or self) is (other.root or other)
        return same and not self.shared and disjoint(self.piece, other.piece)

    def roots(self) -> frozenset[int]:
        """The pre-activations of sites behind it."""
        whole = self.root or self
        if not whole.parents:
            return frozenset({id(whole)})
        return frozenset().union(*(parent.roots() for parent in whole.parents))


def _same(u: Tensor) -> Tensor:
    return u


def _hashable(key: Any) -> Any:
    """The same key for the same view, as slices are no keys of a dict; None if it cannot be one."""
    if isinstance(key, slice):
        return ("slice", key.start, key.stop, key.step)
    if isinstance(key, (tuple, list)):
        parts = [_hashable(part) for part in key]
        return None if any(part is None for part in parts) else tuple(parts)
    if key is None:
        return "None"
    return key if isinstance(key, (str, int, float, type(Ellipsis), torch.dtype)) else None


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
        self.base: Gaussian | None = None
        """What this is a view of."""
        self.overwritten = False
        """Whether something was written into a view of it."""
        self.writes: list[Piece] = []
        """Which parts were written to, of this value and of all that share its memory."""
        self.seen = 0
        """How many of these writes it has seen."""
        self.shown: tuple[Tensor, int] | None = None
        """The expectation that views were handed out of, and its version then."""

    @classmethod
    def of(cls, source: Source) -> Gaussian:
        """The Gaussian itself."""
        return cls(source, normal=(source.mean, source.variance))

    def expectation(self) -> Tensor:
        """The mean of the value; of what is no floating-point number, the value at the mean."""
        source = self.source
        self.check()
        if self.normal is not None:
            return self.normal[0]
        if source.draws is None and self.closed is not None:
            return self.closed()
        like = self.at_mean()
        if not like.is_floating_point():
            return like
        if source.points is not None:
            expected = sum(self.apply(value) * probability for value, probability in source.points)
            assert isinstance(expected, Tensor)
        elif source.draws is not None:
            expected = self._by_draws(source.draws)
        else:
            expected = ops.expectation(self.apply, source.mean, source.variance)
        return expected.to(like.dtype)

    def at_mean(self) -> Tensor:
        """The value at the mean of the source: a tensor of the same form."""
        return self.apply(self.source.mean) if self.normal is None else self.normal[0]

    def check(self) -> None:
        """Take what was written into a view of the expectation; raise if the value is not known any
        more."""
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
        """A view: of a Gaussian, new ones; of a function of one, that of its expectation.

        `key` names the view, if it can be named: the same one again is then the same source.
        """
        self.check()
        if self.normal is None or self.shown is not None:
            return function(self._show())
        name = _hashable(key) if self.apply is _same else None
        sources = None if name is None else self.source.views.get(name)
        if sources is None:
            sources = self._views(function, key)
            if name is not None:
                self.source.views[name] = sources
        if isinstance(sources, Source):
            return self._view(sources)
        return tuple(map(self._view, sources))

    def _show(self) -> Tensor:
        """The expectation, as one tensor for all views: what is written into one is seen in others, and
        in this value. In a compiled graph, where versions are not followed, it is not."""
        if torch.compiler.is_compiling():
            return self.expectation()
        if self.shown is None:
            value = self.expectation()
            if value.is_inference():  # such a tensor does not count writes
                with torch.inference_mode(False):
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
        """Take another value, as functions that write into their argument do."""
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
        self.closed, self.captures = value.closed, value.captures

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


_OPERATORS = (
    "add radd sub rsub mul rmul truediv rtruediv pow rpow neg pos abs matmul rmatmul mod floordiv "
    "gt lt ge le eq ne and or xor rand ror rxor invert getitem setitem len bool float int iter contains"
)
_WRITERS = (name for name in WRITERS if canonical(name) in ELEMENTWISE)
for _name in (*_OPERATORS.split(), *_WRITERS):
    setattr(Gaussian, f"__{_name}__", _operator(f"__{_name}__"))
