"""A call of a torch function that reads travelling values, and how it finds its rule.

Where there is no rule, the values settle: the function gets their means, and the run notes where.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..base.torch_names import canonical, of_two, spelling, twin_of, writes
from ..moments.torch_functions import ATTRIBUTES, ELEMENTWISE, QUERIES, VIEWS
from ..torch_private.tensors import without_torch_function
from ..torch_private.trees import tree_map
from .run import Run
from .state import certain
from .value import KEEPING, Apply, Travelling, expected
from .weight import Weight


class Call:
    """A call of a torch function, with travelling values or weights that drop among its arguments or
    inside of them."""

    def __init__(
        self, func: Any, spelled: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.func, self.spelled, self.name = func, spelled, name
        self._values: list[Travelling] = []
        self.weights: list[Weight] = []
        """All that drop."""
        self.args = tuple([self._noted(one) for one in args])
        self.kwargs = {key: self._noted(one) for key, one in kwargs.items()}

    @classmethod
    def of(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        if not args and "input" in kwargs:
            args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
        spelled = property_of(func) or spelling(func)
        return cls(func, spelled, of_two(canonical(spelled), args), args, kwargs)

    def _noted(self, value: Any) -> Any:
        """The same, with values inside of it seen."""
        if isinstance(value, (tuple, list, dict)):
            return tree_map(self._note, value)
        return self._note(value)

    def _note(self, value: Any) -> Any:
        if isinstance(value, Travelling):
            value.refresh()
            self._values.append(value)
            return value
        if isinstance(value, Weight):
            self.weights.append(value)
            return value
        return expected(value)

    @property
    def values(self) -> list[Travelling]:
        """All that travel."""
        return self._values

    @property
    def run(self) -> Run:
        """The run that they are part of."""
        return self._values[0].run if self._values else self.weights[0].run

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
        args, kwargs = tree_map(expected, (self.args, self.kwargs))
        return self.func(*args, **kwargs)

    def settles(self) -> Any:
        """The same, noted by the run."""
        result = self.settled()
        varies = self.weights or any(one.dtype.is_floating_point for one in self.values)
        if varies and _holds_numbers(result):
            self.run.settles(self.name)
        return result

    def without_weights(self) -> Any:
        """What the function makes of the expectations of the weights."""
        if not self.values:
            return self.settles()
        self.run.settles(self.name)
        args, kwargs = tree_map(_of_weight, (self.args, self.kwargs))
        return self.func(*args, **kwargs)


def _of_weight(value: Any) -> Any:
    return value.expectation() if isinstance(value, Weight) else value


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

OF_WEIGHTS: set[str] = set()
"""Functions whose rule takes weights that drop."""


def rule(*names: str, weights: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for functions of these canonical names.

    Args:
        weights: whether it takes a `Weight` where the function takes a weight.
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        OF_WEIGHTS.update(names if weights else ())
        return function

    return register


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a torch function makes of its arguments."""
    read = property_of(func)
    if read is not None and read not in KEEPING:
        return _told(func, args, kwargs)
    call = Call.of(func, args, kwargs)
    asks = read is None and (call.name in QUERIES or call.name in ATTRIBUTES)
    if asks or not (call.values or call.weights):
        return _told(func, call.args, call.kwargs)
    if call.kwargs.get("out") is not None:
        return call.settles()
    if writes(call.spelled) or call.kwargs.get("inplace") is True:
        return _in_place(call)
    return _result(call)


def property_of(func: Any) -> str | None:
    """The name of a property that is read, whose getter `func` is."""
    name: str | None = getattr(func, "__name__", None)
    return getattr(func.__self__, "__name__", name) if name == "__get__" else None


def _told(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the form of a value tells, as its shape."""
    first = args[0] if args else None
    if isinstance(first, Travelling):
        first.refresh()
    if isinstance(first, (Travelling, Weight)) and first.like is not None:
        return func(first.like, *args[1:], **kwargs)
    with without_torch_function():
        return func(*args, **kwargs)


def _result(call: Call) -> Any:
    if call.weights and call.name not in OF_WEIGHTS:
        return call.without_weights()
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
        twin, kwargs = twin_of(call.spelled), call.kwargs
    if twin is None:
        return call.settles()
    result = _result(Call.of(twin, call.args, kwargs))
    if isinstance(target, Travelling):
        if isinstance(result, Travelling):
            return target.take_form(result) if call.name in VIEWS else target.become(result)
        return target.become(Travelling.of(target.run, certain(result)))
    return result  # of `x += y` Python takes what is returned


Travelling.dispatch = staticmethod(dispatch)
