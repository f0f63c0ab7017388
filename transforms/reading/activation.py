"""Which activation follows a node, in any dialect.

What follows a pre-activation is told by its values, not by the names of functions. From the node on,
functions that keep every entry (views, casts, dropout in evaluation mode, a bias) are passed through,
and elementwise functions of the node alone are collected, up to a node through which all of them flow.
The value of that node is computed on a grid of points and compared with those of known activations.
So `0.5 * x * (1 + tanh(...))` is recognised however it is written.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from surgery.base.caching import cached
from surgery.moments.torch_functions import (
    ACROSS,
    ACTIVATIONS,
    ADDS,
    ELEMENTWISE,
    KEEPING,
    SELECTING,
    SPLITTING,
)

from .operations import INSPECTING, function_of, in_place

_GATED = {"sigmoid": "glu", "silu": "swiglu", "relu": "reglu"} | dict.fromkeys(
    ("gelu", "gelu_tanh", "gelu_new"), "geglu"
)
"""A pre-activation of which one part, activated, multiplies the other (Shazeer 2020)."""

_WRITTEN_OUT = "relu gelu silu tanh sigmoid softplus mish elu relu6 hardswish hardsigmoid softsign"
_DECOMPOSED: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: getattr(F, name) for name in _WRITTEN_OUT.split()},
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
"""What a composition of elementwise functions is compared with."""

_CLOSE = 1e-6
"""Largest distance, in float64, between two spellings of one activation; constants are often written
with ten digits. Between two different activations it is above 1e-3."""


class Flow:
    """Who reads the value of each node, in order, when in-place writes are taken into account."""

    def __init__(self, graph: fx.Graph, root: nn.Module, parameters: Collection[fx.Node]) -> None:
        """
        Args:
            graph: of `root`; not changed.
            root: the module whose submodules the nodes call.
            parameters: the nodes whose values are parameters, or parts and views of one.
        """
        self._root = root
        self._parameters = parameters
        self._function = {node: function_of(node, root) for node in graph.nodes}
        self._readers: dict[fx.Node, list[fx.Node]] = {node: [] for node in graph.nodes}
        self._position = {node: index for index, node in enumerate(graph.nodes)}
        self._sources: dict[fx.Node, dict[fx.Node, fx.Node]] = {}
        self._connect(graph)

    def _connect(self, graph: fx.Graph) -> None:
        """After `y = relu_(x)`, a reader of `x` reads `y`."""
        now: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            self._sources[node] = {given: now.get(given, given) for given in node.all_input_nodes}
            if self._function[node] in INSPECTING:
                continue
            for source in dict.fromkeys(self._sources[node].values()):
                self._readers[source].append(node)
            if node.args and isinstance(node.args[0], fx.Node) and in_place(node, self._root):
                now[node.args[0]] = now[self._sources[node][node.args[0]]] = node

    def activation(self, node: fx.Node) -> str | None:
        """Canonical name of the activation that follows a node, or None."""
        followed = self._follow(node)
        return None if followed is None else followed[0]

    def _follow(self, start: fx.Node) -> tuple[str, fx.Node] | None:
        """The activation's name and the node that has its result."""
        region = self._region(start)
        for end in self._cuts(start, region):
            made_of = [n for n in region[: region.index(end) + 1] if not self._keeps(n)]
            name = self._name(start, region, end, made_of) if made_of else None
            if name is not None:
                return name, end
        return self._where_it_branches(start)

    def _region(self, start: fx.Node) -> list[fx.Node]:
        """The nodes whose values are elementwise functions of that of `start` alone, in graph order."""
        inside, todo = {start}, list(self._readers[start])
        while todo:
            node = min(todo, key=self._position.__getitem__)
            todo = [other for other in todo if other is not node]
            if self._keeps(node) or self._elementwise(node, inside):
                inside.add(node)
                todo += self._readers[node]
        return sorted(inside - {start}, key=self._position.__getitem__)

    def _keeps(self, node: fx.Node) -> bool:
        """Whether every entry of the first argument passes unchanged, but for a bias."""
        if self._function[node] in ADDS:
            return any(given in self._parameters for given in node.all_input_nodes)
        return self._function[node] in KEEPING

    def _elementwise(self, node: fx.Node, inside: Collection[fx.Node]) -> bool:
        sources = self._sources[node].values()
        return self._function[node] in ELEMENTWISE and all(s in inside for s in sources)

    def _cuts(self, start: fx.Node, region: list[fx.Node]) -> Iterator[fx.Node]:
        """The nodes of the region through which everything flows that is made of `start`."""
        seen, open_ends = set[fx.Node](), set(self._readers[start])
        for node in region:
            seen.add(node)
            if open_ends <= seen:
                yield node
            open_ends |= set(self._readers[node])

    def _name(
        self, start: fx.Node, region: list[fx.Node], end: fx.Node, made_of: list[fx.Node]
    ) -> str | None:
        if len(made_of) == 1 and self._function[made_of[0]] in ACTIVATIONS:
            return self._named(made_of[0])
        points = _grid()
        value = self._evaluate(start, region, end, points)
        for name, function in _DECOMPOSED.items():
            if value.shape == points.shape and (value - function(points)).abs().max() < _CLOSE:
                return name
        return None

    def _named(self, node: fx.Node) -> str:
        """The name of one activation function; GELU has two."""
        name = self._function[node]
        given: Any = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else None)
        if node.op == "call_module":
            given = getattr(self._root.get_submodule(str(node.target)), "approximate", None)
        return "gelu_tanh" if name == "gelu" and given == "tanh" else name

    def _evaluate(
        self, start: fx.Node, region: list[fx.Node], end: fx.Node, points: Tensor
    ) -> Tensor:
        """The value of `end` if that of `start` is `points`."""
        values: dict[fx.Node, Any] = {start: points}
        for node in region[: region.index(end) + 1]:
            known = {
                given: values[source].clone()
                for given, source in self._sources[node].items()
                if source in values
            }
            values[node] = (
                next(iter(known.values())) if self._keeps(node) else self._call(node, known)
            )
        value: Tensor = values[end].to(points.dtype)
        return value

    def _call(self, node: fx.Node, known: dict[fx.Node, Tensor]) -> Any:
        args: Any = fx.map_arg(node.args, known.__getitem__)
        kwargs: Any = fx.map_arg(node.kwargs, known.__getitem__)
        if node.op == "call_method":
            return operator.methodcaller(str(node.target), *args[1:], **kwargs)(args[0])
        if node.op == "call_module":
            return self._root.get_submodule(str(node.target))(*args, **kwargs)
        function: Any = node.target
        return function(*args, **kwargs)

    def _where_it_branches(self, start: fx.Node) -> tuple[str, fx.Node] | None:
        """What follows where no one node collects everything: the activation that all readers apply, or
        the gated unit in which one part, activated, multiplies the other."""
        parts = list(self._parts(start))
        branches = [self._branch(part) for part in parts]
        followed = [branch for branch in branches if branch is not None]
        if not followed or len({name for name, _ in followed}) > 1:
            return None
        if len(followed) == len(branches):
            return followed[0]
        if len(parts) == 2 and all(self._function[part] in SELECTING for part in parts):
            return self._gate(followed[0], parts[branches.index(None)])
        return None

    def _parts(self, start: fx.Node) -> Iterator[fx.Node]:
        """The readers of a node; for one that splits it, the parts."""
        for reader in self._readers[start]:
            split = self._function[reader] in SPLITTING
            yield from self._readers[reader] if split else (reader,)

    def _branch(self, node: fx.Node) -> tuple[str, fx.Node] | None:
        function = self._function[node]
        if self._keeps(node) or function in SELECTING:
            return self._follow(node)
        if function in ACTIVATIONS:
            return self._named(node), node
        return (function, node) if function in ACROSS else None

    def _gate(self, gate: tuple[str, fx.Node], other: fx.Node) -> tuple[str, fx.Node] | None:
        """The gated unit in which an activated part multiplies the other part."""
        name, activated = gate
        through = {other, *filter(self._keeps, self._region(other))}
        for reader in self._readers[activated]:
            sources = self._sources[reader].values()
            if self._function[reader] == "mul" and any(s in through for s in sources):
                return (_GATED[name], reader) if name in _GATED else None
        return None


@cached
def _grid() -> Tensor:
    """Points that tell activations apart: both tails, both sides of every kink."""
    return torch.linspace(-7.9, 7.9, 101, dtype=torch.float64)
