"""What a forward takes for a tensor: a function of a value whose moments are known.

A `Travelling` tensor has a shape and a dtype, and no memory. Every torch function that reads one
comes to `__torch_function__`; `call` says what it makes of it. Elementwise functions are put off, so
that `x * sigmoid(1.702 * x)` is one function of one value; see `elementwise`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..moments.scope import Deferred, same
from ..moments.torch_functions import OPERATORS
from ..torch_private.tensors import tensor_without_memory, without_torch_function
from ..torch_private.tracing import is_traced
from ..torch_private.trees import tree_map
from .run import ALONE, Run
from .state import State, certain, same_columns

Apply = Callable[[Tensor], Tensor]
Make = Callable[[], State]


KEEPING = ("T", "mT", "H", "mH", "data", "real", "imag")
"""Properties whose value varies."""


class Later:
    """A state that is computed once, when somebody needs it. Of some the mean alone takes less time."""

    def __init__(
        self,
        make: Make | None,
        known: State | None = None,
        mean: Callable[[], Tensor] | None = None,
    ) -> None:
        self._make, self._known, self._mean = make, known, mean

    def __call__(self) -> State:
        if self._known is None:
            assert self._make is not None
            self._known = self._make()
        return self._known

    def mean(self) -> Tensor:
        """The mean of the state."""
        if self._known is None and self._mean is not None:
            return self._mean()
        return self().mean


class Travelling(Deferred):
    """`apply(u)`, where the moments of `u` are known."""

    dispatch: ClassVar[Callable[..., Any]]
    """`dispatch(func, args, kwargs)`: what a torch function makes of it; `call` puts it here."""

    run: Run
    origin: State
    """The moments of `u`."""
    apply: Apply
    is_linear: bool
    """Whether `apply` is affine, so that the value is as Gaussian as `u` is."""
    moments: Later
    """Its own."""
    base: Travelling | None
    """The value that it is a view of, as `taken` takes it: what is written into one is seen in the
    other. Graphs do not follow that."""
    taken: Apply
    changes: int
    """How often something was written to it."""
    seen: int
    """How often to the base, when the view was taken."""
    like: Tensor | None
    """Has its shape, dtype and device, where it is no tensor that has them itself."""
    under: tuple[Apply, Travelling] | None
    """Of an activation that rises: the function, and the value that it is of."""

    @staticmethod
    def of(run: Run, state: State) -> Travelling:
        """A value with these moments."""
        value = _empty(state.mean)
        value.run, value.origin, value.apply, value.is_linear = run, state, same, True
        value.moments, value.under = Later(None, state), None
        value.stays = run is not ALONE
        return value

    @staticmethod
    def made_of(run: Run, value: Any) -> Travelling:
        """The value itself, or a tensor as one that does not vary."""
        return value if isinstance(value, Travelling) else Travelling.of(run, certain(value))

    def viewed(self, state: State, taken: Apply) -> Travelling:
        """A view of this value, with these moments."""
        value = Travelling.of(self.run, state)
        if not is_traced():
            value.base, value.taken, value.seen = self, taken, self.changed()
        return value

    def changed(self) -> int:
        """How often it was written to, or what it is a view of."""
        return self.changes if self.base is None else self.changes + self.base.changed()

    def refresh(self) -> None:
        """Take the view again, if something was written to what it is a view of."""
        if self.base is not None and self.seen != self.base.changed():
            self.base.refresh()
            self.adopt(Travelling.of(self.run, self.base.moments().moved(self.taken)))
            self.seen = self.base.changed()

    @staticmethod
    def later(source: Travelling, like: Any, apply: Apply, make: Make, linear: bool) -> Travelling:
        """A function of the origin of another value; its moments are computed when they are needed.

        Args:
            like: of the shape and dtype of the value.
            apply: the function of `u`.
            make: computes the moments.
            linear: whether the function is affine.
        """
        value = _empty(like)
        value.run, value.origin, value.apply, value.is_linear = (
            source.run,
            source.origin,
            apply,
            linear,
        )
        value.moments = make if isinstance(make, Later) else Later(make)
        value.under, value.stays = None, source.stays
        return value

    def copied(self) -> Travelling:
        """The value as it is now: a write into this one does not change it."""
        value = _empty(self if self.like is None else self.like)
        value.run, value.stays = self.run, self.stays
        value.adopt(self)
        return value

    def state(self) -> State:
        """The moments."""
        self.refresh()
        return self.moments()

    def become(self, other: Travelling) -> Travelling:
        """Take another value, as an argument does that is written to."""
        self.adopt(other)
        self.changes += 1
        if self.base is not None:
            self.base.write(self.taken, self.moments())
            self.seen = self.base.changed()
        return self

    def take_form(self, other: Travelling) -> Travelling:
        """Take the form of a view of itself: no write."""
        self.adopt(other)
        self.like = other.state().mean
        return self

    def adopt(self, other: Travelling) -> None:
        self.origin, self.apply, self.is_linear = other.origin, other.apply, other.is_linear
        self.moments, self.under = other.moments, other.under

    def write(self, taken: Apply, part: State) -> None:
        """Write into a view of it."""
        state = self.state()
        shape = state.mean.shape
        index = taken(torch.arange(shape.numel(), device=state.mean.device).view(shape))

        def put(into: Tensor, values: Tensor) -> Tensor:
            return into.flatten().index_put((index,), values.to(into.dtype)).view(shape)

        factors = state.factors
        if factors is not None or part.factors is not None:
            pairs = zip(*same_columns(*(_columns(one) for one in (state, part))))
            factors = torch.stack([put(*pair) for pair in pairs])
        written = State(put(state.mean, part.mean), put(state.variance, part.variance), factors)
        self.become(Travelling.of(self.run, written))

    def expectation(self) -> Tensor:
        """The mean; of a value that is no number, as a comparison, the value at the mean."""
        self.refresh()
        if not self.dtype.is_floating_point:
            return self.apply(self.origin.mean.detach())
        return self.moments.mean()

    def __repr__(self, *, tensor_contents: Any = None) -> Any:
        with without_torch_function():
            return f"Travelling(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __float__(self) -> float:
        return float(self.expectation())

    def __iter__(self) -> Any:
        return iter(self.unbind(0))

    def __getattr__(self, name: str) -> Any:
        member = getattr(Tensor, name)
        if callable(member):
            return functools.partial(_call, member, self)
        if name in KEEPING:
            return Travelling.dispatch(_READERS[name], (self,), {})
        return getattr(self.like, name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return Travelling.dispatch(func, args, kwargs or {})


def _call(member: Any, *args: Any, **kwargs: Any) -> Any:
    return Travelling.dispatch(member, args, kwargs)


def _reader(name: str) -> Apply:
    """A property as a function of this name."""

    def read(tensor: Tensor) -> Tensor:
        found: Tensor = getattr(tensor, name)
        return found

    read.__name__ = name
    return read


_READERS = {name: _reader(name) for name in KEEPING}


def _operator(name: str) -> Callable[..., Any]:
    member = getattr(Tensor, name)

    def operator(self: Travelling, *args: Any) -> Any:
        return _call(member, self, *args)

    return operator


for _name in OPERATORS:
    setattr(Travelling, f"__{_name}__", _operator(f"__{_name}__"))


def of_expectations(
    cls: type,
    func: Any,
    types: Any,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> Any:
    """An operation that no torch function stands before: of the expectations."""
    args, kwargs = tree_map(expected, (args, kwargs or {}))
    return func(*args, **kwargs)


class TravellingTensor(Tensor, Travelling):
    """The same as a tensor without memory, so that `isinstance` and torch's own modules take it for
    one."""

    __repr__ = Travelling.__repr__  # type: ignore[assignment]
    __float__ = Travelling.__float__
    __iter__ = Travelling.__iter__
    __torch_function__ = Travelling.__torch_function__
    __torch_dispatch__: Any = classmethod(of_expectations)


def _columns(state: State) -> Tensor:
    """The columns; none as a tensor, too."""
    return state.mean.new_zeros(0, *state.mean.shape) if state.factors is None else state.factors


def _empty(like: Any) -> Travelling:
    made: Travelling
    if is_traced():
        made = Travelling()
        made.like = like
    else:
        made = tensor_without_memory(TravellingTensor, like)
        made.like = None
    made.base, made.changes = None, 0
    return made


def expected(value: Any) -> Any:
    """The tensor in the place of what is taken for one; anything else as it is."""
    return value.expectation() if isinstance(value, Deferred) else value
