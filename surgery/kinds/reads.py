"""Which parameters a module's forward reads, found in its source.

Some modules read the weights of their children instead of calling them: `nn.MultiheadAttention` uses
`self.out_proj.weight`, Mamba's mixer `self.dt_proj.weight`. A mask that is drawn in the child's
forward would then silently never act. The source of the class tells: `reads(cls)` lists the attribute
chains that start at `self` in `forward`, in every method it mentions, and in the functions that these
hand `self` or a child to.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..base.caching import cached_weakly
from .source import ANY, Bindings, Call, Chain, bound, first_parameter, source_of

METADATA = frozenset(
    {
        "data_ptr",
        "device",
        "dim",
        "dtype",
        "grad",
        "is_meta",
        "ndim",
        "numel",
        "requires_grad",
        "shape",
        "size",
    }
)
"""Attributes of a tensor that do not depend on its values: reading them is not reading the weight."""

_ONLY_INSPECTS: tuple[type[nn.Module], ...] = (nn.TransformerEncoder,)
"""Classes that look at their children's weights (to choose a path) but always call the children."""

_ONLY_SETTINGS = frozenset({"attention_interface"})
"""What transformers calls the function that computes attention: it is given the module for settings and
for its own parameters, and reads nothing of the children."""

GIVEN = ("<given>",)
"""Chain of an argument of the forward, in `reads(cls, given)`."""

_DEEPEST = 8
"""Length of the chains that are followed into functions, so that recursion ends."""


@dataclass(frozen=True)
class Reads:
    """What the forward of a class reads of `self`."""

    chains: frozenset[Chain]
    complete: bool
    """False if the source is missing, or reads attributes whose names are computed, or hands `self` to
    a function that it does not show."""
    handed: frozenset[Chain] = frozenset()
    """What is given to a call that the source does not show; `self` is the empty chain."""
    passed: frozenset[tuple[Chain, int | str, Chain]] = frozenset()
    """What is given to a call of a child: (the child, position or name of the argument, what)."""

    def reads(self, path: Chain) -> bool:
        """Whether a chain reads the value found at `path`."""
        return any(_reads(chain, path) for chain in self.chains if len(chain) >= len(path))

    def concerns(self, depth: int) -> bool:
        """Whether anything that it reads, hands out or passes on may be found at a path so long."""
        if self.handed or self.passed:
            return True
        return any(len(chain) >= depth for chain in self.chains)

    def hands_out(self, path: Chain) -> bool:
        """Whether the module at `path`, or one that contains it, is given to a call that the source
        does not show, and that may read its weights."""
        return any(is_at(chain, path) for chain in self.handed if len(chain) <= len(path))


def _reads(chain: Chain, path: Chain) -> bool:
    if _is_no_value(chain[len(path) :]):
        return False
    return is_at(chain, path)


def is_at(chain: Chain, path: Chain) -> bool:
    """Whether a chain may lead to `path`, or into it, or to what contains it."""
    return all(have in (want, ANY) for have, want in zip(chain, path))


def _is_no_value(rest: Chain) -> bool:
    """Whether what is read of a parameter is no value of it: its shape, or something that others hung
    on it."""
    if rest[:1] == ("data",):
        rest = rest[1:]
    if not rest or not rest[0].isidentifier():
        return False
    return rest[0] in METADATA or not hasattr(Tensor, rest[0])


@cached_weakly
def reads(cls: type[nn.Module], given: int | str | None = None, method: str = "forward") -> Reads:
    """The chains that `cls.forward`, the methods it mentions, and the functions that these give a part
    of `self` to read from `self`.

    Args:
        cls: a plain class of module.
        given: an argument, by position or name: what is read from it are the chains that start with
            `GIVEN`.
        method: look at this one instead of the forward.
    """
    if issubclass(cls, _ONLY_INSPECTS):
        return Reads(frozenset(), complete=True)
    walk = _Walk(cls)
    walk.run(method, () if given is None else ((given, GIVEN),))
    return Reads(
        frozenset(walk.chains), walk.complete, frozenset(walk.handed), frozenset(walk.passed)
    )


class _Walk:
    """From a forward to all that it calls and that its source shows."""

    def __init__(self, cls: type[nn.Module]) -> None:
        self._cls = cls
        self._todo: list[tuple[Callable[..., Any], Bindings]] = []
        self._done: set[tuple[Callable[..., Any], Bindings]] = set()
        self._mentioned: set[str] = set()
        self.chains: set[Chain] = set()
        self.handed: set[Chain] = set()
        self.passed: set[tuple[Chain, int | str, Chain]] = set()
        self.complete = True

    def run(self, method: str, given: tuple[tuple[int | str, Chain], ...]) -> None:
        """Start at a method, whose arguments may stand for something."""
        if given:
            self._follow(Call((method,), None, method, given))
        self._mention(method)
        while self._todo:
            one = self._todo.pop()
            if one in self._done:
                continue
            self._done.add(one)
            source = source_of(*one)
            if source is None:
                self.complete = False
                continue
            self.complete = self.complete and not source.computed
            self.chains |= source.chains
            for chain in source.chains:
                self._mention(chain[0])
            for call in source.calls:
                self._follow(call)

    def _mention(self, name: str) -> None:
        """Look into a method of the class, once."""
        if name in self._mentioned:
            return
        self._mentioned.add(name)
        for function in _methods(self._cls, name):
            own = first_parameter(function)
            if own is None:
                self.complete = False
            else:
                self._todo.append((function, frozenset({(own, ())})))

    def _follow(self, call: Call) -> None:
        """Look into what is called with what it is given, or note that it cannot be seen."""
        given = tuple((key, chain) for key, chain in call.given if len(chain) <= _DEEPEST)
        for function, shift in _called(self._cls, call):
            keyed = [(key + shift if isinstance(key, int) else key, chain) for key, chain in given]
            own = first_parameter(function) if shift else None
            bindings = bound(function, tuple(keyed)) | ({(own, ())} if own is not None else set())
            self._todo.append((function, bindings))
        if not _is_hidden(self._cls, call):
            return
        chains = {chain for _, chain in call.given}
        self.complete = self.complete and () not in chains
        if call.method is not None:
            self.passed.update((call.method, key, chain) for key, chain in call.given)
        elif call.name not in _ONLY_SETTINGS:
            self.handed |= chains


def _called(cls: type, call: Call) -> list[tuple[Callable[..., Any], int]]:
    """The functions that a call may run, each with the position of its first argument."""
    if call.method is not None:
        if len(call.method) != 1:
            return []
        static = isinstance(inspect.getattr_static(cls, call.method[0], None), staticmethod)
        return [(function, 0 if static else 1) for function in _methods(cls, call.method[0])]
    function = call.function
    if inspect.isfunction(function) and not _is_torchs(function):
        return [(inspect.unwrap(function), 0)]
    return []


def _is_hidden(cls: type, call: Call) -> bool:
    """Whether what is called with a part of `self` cannot be looked into, and may read weights."""
    if _called(cls, call) or inspect.isbuiltin(call.function) or _is_torchs(call.function):
        return False
    return getattr(call.function, "__module__", None) != "builtins"


def _is_torchs(function: Any) -> bool:
    """torch's own functions (`checkpoint`, `functional_call`) call a module that they are given."""
    return str(getattr(function, "__module__", "")).partition(".")[0] == "torch"


def _methods(cls: type, name: str) -> list[Callable[..., Any]]:
    """Every definition of a method in the class and its parents (for `super()`), nn.Module's not."""
    found = []
    for base in cls.__mro__:
        if base in (nn.Module, object):
            continue
        function = base.__dict__.get(name)
        if isinstance(function, property):
            function = function.fget
        if isinstance(function, staticmethod):
            function = function.__func__
        if inspect.isfunction(function):
            found.append(inspect.unwrap(function))
    return found
