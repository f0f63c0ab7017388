"""What a forward takes for a tensor: a function of a value whose moments are known.

A `Travelling` tensor has a shape and a dtype, and no memory. Every torch function that reads one
comes to `__torch_function__`, which looks for a rule. Elementwise functions are put off, so that
`x * sigmoid(1.702 * x)` is one function of one value; see `elementwise`. Where there is no rule,
the value settles: the function gets the mean, and the run notes where.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..base.torch_names import WRITERS, canonical, of_two, spelling, writes
from ..moments.torch_functions import ATTRIBUTES, ELEMENTWISE, QUERIES
from ..torch_private.tensors import tensor_without_memory, without_torch_function
from ..torch_private.trees import tree_map
from .run import Run
from .state import State, certain

Apply = Callable[[Tensor], Tensor]
Make = Callable[[], State]


def same(u: Tensor) -> Tensor:
    """The identity: what a value is of itself."""
    return u


class Travelling(Tensor):
    """`apply(u)`, where the moments of `u` are known."""

    dispatch: ClassVar[Callable[[Call], Any]]
    """What a torch function makes of it; `rules` puts it here."""

    run: Run
    origin: State
    """The moments of `u`."""
    apply: Apply
    is_linear: bool
    """Whether `apply` is affine, so that the value is as Gaussian as `u` is."""
    make: Make | None
    known: State | None
    under: tuple[Apply, Travelling] | None
    """Of an activation that rises: the function, and the value that it is of."""

    @staticmethod
    def of(run: Run, state: State) -> Travelling:
        """A value with these moments."""
        value = _empty(state.mean)
        value.run, value.origin, value.apply, value.is_linear = run, state, same, True
        value.make, value.known, value.under = None, state, None
        return value

    @staticmethod
    def later(
        source: Travelling, like: Tensor, apply: Apply, make: Make, linear: bool
    ) -> Travelling:
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
        value.make, value.known, value.under = make, None, None
        return value

    def copied(self) -> Travelling:
        """The value as it is now: a write into this one does not change it."""
        return _empty(self).become(self)

    def state(self) -> State:
        """The moments."""
        if self.known is None:
            assert self.make is not None
            self.known = self.make()
        return self.known

    def become(self, other: Travelling) -> Travelling:
        """Take another value, as an argument does that is written to."""
        self.run, self.origin, self.apply = other.run, other.origin, other.apply
        self.is_linear, self.under = other.is_linear, other.under
        self.make, self.known = other.make, other.known
        return self

    def settled(self) -> Tensor:
        """The mean; of a value that is no number, as a comparison, the value at the mean."""
        if not self.dtype.is_floating_point:
            return self.apply(self.origin.mean.detach())
        return self.state().mean

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        with without_torch_function():
            return f"Travelling(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __iter__(self) -> Any:
        return iter(self.unbind(0))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return Travelling.dispatch(Call.of(func, args, kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """An operation that no torch function stands before: of the means."""
        return Call.of(func, args, kwargs or {}).settled()


def _empty(like: Tensor) -> Travelling:
    made: Travelling = tensor_without_memory(Travelling, like)
    return made


class Call:
    """A call of a torch function, with travelling values among its arguments or inside of them."""

    def __init__(
        self, func: Any, spelled: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.func, self.spelled, self.name = func, spelled, name
        self.args, self.kwargs = args, kwargs
        self._values: list[Travelling] = []
        tree_map(self._note, (args, kwargs))

    @classmethod
    def of(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        if not args and "input" in kwargs:
            args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
        spelled = spelling(func)
        if spelled == "get":  # of a property, whose own name tells what it is
            spelled = getattr(func.__self__, "__name__", spelled)
        return cls(func, spelled, of_two(canonical(spelled), args), args, kwargs)

    def _note(self, value: Any) -> Any:
        if isinstance(value, Travelling):
            self._values.append(value)
        return value

    @property
    def values(self) -> list[Travelling]:
        """All that travel."""
        return self._values

    @property
    def run(self) -> Run:
        """The run that they are part of."""
        return self._values[0].run

    @property
    def first(self) -> Any:
        return self.args[0] if self.args else None

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by its position or name."""
        return self.kwargs.get(name, self.args[position] if len(self.args) > position else default)

    def on(self, *first: Any) -> Any:
        """The function with other first arguments."""
        return self.func(*first, *self.args[len(first) :], **self.kwargs)

    def of_first(self) -> Apply:
        """The function of its first argument."""
        return lambda first: self.on(first)

    def settled(self) -> Any:
        """What the function makes of the means."""
        args, kwargs = tree_map(_settled, (self.args, self.kwargs))
        return self.func(*args, **kwargs)

    def settles(self) -> Any:
        """The same, noted by the run."""
        result = self.settled()
        if any(one.dtype.is_floating_point for one in self.values) and _holds_numbers(result):
            self.run.settles(self.name)
        return result


def _settled(value: Any) -> Any:
    return value.settled() if isinstance(value, Travelling) else value


def _holds_numbers(result: Any) -> bool:
    found: list[bool] = []
    tree_map(
        lambda one: found.append(isinstance(one, Tensor) and one.dtype.is_floating_point), result
    )
    return any(found)


Rule = Callable[[Call], Any]
RULES: dict[str, Rule] = {}
"""What a torch function makes of travelling values, by its canonical name. A rule returns
`NotImplemented` where it does not know; then the values settle."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for functions of these canonical names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


_KEEPING = ("T", "mT", "H", "mH", "data", "real", "imag")
"""Properties whose value varies."""


def dispatch(call: Call) -> Any:
    """What a torch function makes of its arguments."""
    func, name = call.func, call.name
    is_property = call.spelled != spelling(func)
    asks = call.spelled not in _KEEPING if is_property else name in QUERIES or name in ATTRIBUTES
    if asks or not call.values:
        with without_torch_function():
            return func(*call.args, **call.kwargs)
    if call.kwargs.get("out") is not None:
        return call.settles()
    if writes(call.spelled) or call.kwargs.get("inplace") is True:
        return _in_place(call)
    return _result(call)


def _result(call: Call) -> Any:
    known = RULES.get(call.name)
    if known is None and call.name in ELEMENTWISE:
        known = RULES["elementwise"]
    if known is not None:
        found = known(call)
        if found is not NotImplemented:
            return found
    return call.settles()


def _in_place(call: Call) -> Any:
    """What a function does that writes into its first argument; returns that argument."""
    target = call.first
    if call.spelled == "setitem":
        return RULES["setitem"](call)
    if call.spelled == "requires_grad_":
        return target
    if call.kwargs.get("inplace") is True:
        kwargs = {k: v for k, v in call.kwargs.items() if k != "inplace"}
        twin = call.func
    else:
        twin, kwargs = _twin(call.spelled), call.kwargs
    if twin is None:
        return call.settles()
    args = call.args
    if isinstance(target, Travelling):  # what is put off reads the value from before
        before = target.copied()
        args = tuple(before if one is target else one for one in args)
    result = _result(Call.of(twin, args, kwargs))
    if isinstance(target, Travelling):
        if isinstance(result, Travelling):
            return target.become(result)
        return target.become(Travelling.of(target.run, certain(result)))
    return result  # of `x += y` Python takes what is returned


def _twin(spelled: str) -> Any:
    """The function that returns what the one of this spelling would write; None if there is none."""
    if spelled in WRITERS:
        return getattr(Tensor, f"__{WRITERS[spelled]}__")
    plain = spelled.removesuffix("_")
    twin = getattr(Tensor, plain, None) or getattr(torch.nn.functional, plain, None)
    return twin if callable(twin) else None


Travelling.dispatch = staticmethod(dispatch)
