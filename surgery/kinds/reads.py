"""Which parameters the forward of a module reads.

Some modules read the weights of their children instead of calling them: `nn.MultiheadAttention` uses
`self.out_proj.weight`, Mamba's mixer `self.dt_proj.weight`. A mask that is drawn in the child's
forward would then never act. The kind of a module may declare what its forward reads; for any other
class the source tells: `forward_in_source(cls)` lists the attribute chains that start at `self` in
`forward`, in every method that it mentions, and in the functions that these give `self` or a child to.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..base.caching import cached_weakly
from .expressions import ANY_ITEM, AttributeChain, Bindings, Call, Given, uses_value
from .kind import kind_of
from .source import bound, source_of

_ONLY_SETTINGS = frozenset({"attention_interface"})
"""What transformers calls the function that computes attention: it is given the module for settings and
for its own parameters, and reads nothing of the children."""

ARGUMENT = ("<argument>",)
"""The chain of the argument that `forward_in_source(cls, argument)` follows."""

_SELF: Given = ((0, ()),)
"""A method is given `self` first."""

_DEEPEST = 8
"""Length of the chains that are followed into functions, so that recursion ends."""


@dataclass(frozen=True)
class Forward:
    """What a forward does with what it finds at `self`."""

    chains: frozenset[AttributeChain]
    """What it reads."""
    complete: bool = True
    """False if it may read more: the source is missing, or has attributes whose names are computed, or
    gives `self` to a function that it does not show."""
    handed: frozenset[AttributeChain] = frozenset()
    """What it gives to calls that the source does not show."""
    passed: frozenset[tuple[AttributeChain, int | str, AttributeChain]] = frozenset()
    """What it gives to calls of children: (the child, position or name of the argument, what)."""

    methods: frozenset[AttributeChain] = frozenset()
    """Methods of children that it calls, other than their forward: `("embed", "look_up")`. These may
    read what the child's forward reads, outside of it."""

    def reads(self, path: AttributeChain) -> bool:
        """Whether it uses the value of the parameter at `path`, as `("proj", "weight")`."""
        return any(
            is_at(chain, path) and uses_value(chain[len(path) :])
            for chain in self.chains
            if len(chain) >= len(path)
        )

    def concerns(self, depth: int) -> bool:
        """Whether anything that it reads, hands out or passes on may be found at a path so long."""
        return bool(self.handed or self.passed or self.methods) or any(
            len(chain) >= depth for chain in self.chains
        )

    def hands_out(self, path: AttributeChain) -> bool:
        """Whether it gives the module at `path`, or one that contains it, to a call that the source
        does not show, and that may read its weights."""
        return any(is_at(chain, path) for chain in self.handed if len(chain) <= len(path))


def is_at(chain: AttributeChain, path: AttributeChain) -> bool:
    """Whether a chain may lead to `path`, or into what is there, or to what contains it."""
    return all(have in (want, ANY_ITEM) for have, want in zip(chain, path))


def forward_of(cls: type[nn.Module], module: nn.Module) -> Forward:
    """What the forward of a module does: as its kind declares, else as the source tells.

    Args:
        cls: the plain class of the module.
        module: itself, which may be operated.
    """
    declared = kind_of(module).reads(cls, module)
    if declared is None:
        return forward_in_source(cls)
    return Forward(frozenset(tuple(name.split(".")) for name in declared))


@cached_weakly
def forward_in_source(
    cls: type[nn.Module], argument: int | str | None = None, method: str = "forward"
) -> Forward:
    """What `cls.forward`, the methods that it mentions, and the functions that these give a part of
    `self` to do with what they find there.

    Args:
        cls: a plain class of module.
        argument: one of the forward, by position or name: what is found there has chains that start
            with `ARGUMENT`.
        method: look at this one instead of the forward.
    """
    walk = _Walk(cls)
    walk.run(method, () if argument is None else ((argument, ARGUMENT),))
    return Forward(
        frozenset(walk.chains),
        walk.complete,
        frozenset(walk.handed),
        frozenset(walk.passed),
        frozenset(walk.methods),
    )


class _Walk:
    """From a forward to all that it calls and that its source shows."""

    def __init__(self, cls: type[nn.Module]) -> None:
        self._cls = cls
        self._todo: list[tuple[Callable[..., Any], Bindings]] = []
        self._done: set[tuple[Callable[..., Any], Bindings]] = set()
        self._mentioned: set[str] = set()
        self.chains: set[AttributeChain] = set()
        self.handed: set[AttributeChain] = set()
        self.passed: set[tuple[AttributeChain, int | str, AttributeChain]] = set()
        self.methods: set[AttributeChain] = set()
        self.complete = True

    def run(self, method: str, given: Given) -> None:
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
            self.methods |= source.methods
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
            bindings = bound(function, _SELF)
            self._todo.append((function, bindings))
            self.complete = self.complete and bool(bindings)

    def _follow(self, call: Call) -> None:
        """Look into what is called with what it is given, or note that it cannot be seen."""
        given = tuple((key, chain) for key, chain in call.given if len(chain) <= _DEEPEST)
        functions = _called(self._cls, call)
        for function, shift in functions:
            keyed = [(key + shift if isinstance(key, int) else key, chain) for key, chain in given]
            self._todo.append((function, bound(function, (*_SELF * shift, *keyed))))
        if functions or _reads_no_weight(call.function):
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
    if inspect.isfunction(function) and _package(function) != "torch":
        return [(inspect.unwrap(function), 0)]
    return []


def _reads_no_weight(function: Any) -> bool:
    """Whether a function that is given a part of `self` is Python's or torch's."""
    return inspect.isbuiltin(function) or _package(function) in ("builtins", "torch")


def _package(function: Any) -> str:
    """Where it comes from. torch's own functions (`checkpoint`, `functional_call`) call a module that
    they are given."""
    return str(getattr(function, "__module__", "")).partition(".")[0]


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
