"""The nodes of graphs that read parameters, and those that compute with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from surgery.modules.places import states_of
from surgery.moments.torch_functions import PASSING, TRANSPOSING

from .operations import Operation, function_of, leaves, operation


@dataclass(frozen=True)
class AtNode:
    """A node whose target is an attribute of the owner of a parameter."""

    graph_module: fx.GraphModule
    node: fx.Node

    @property
    def path(self) -> str:
        """Dotted name of the owner in the graph's module."""
        return str(self.node.target).rpartition(".")[0]


@dataclass(frozen=True)
class ParameterNode(AtNode):
    """One `get_attr` node that reads a parameter."""

    owner: nn.Module
    name: str
    """Plain name of the parameter in its owner."""

    @property
    def key(self) -> tuple[int, str]:
        """Id of the owner and plain name: what a site of this parameter is known by."""
        return id(self.owner), self.name


@dataclass(frozen=True)
class UsingNode:
    """One node that computes with a parameter."""

    read: ParameterNode
    node: fx.Node
    value: fx.Node
    """The parameter as the node takes it: the `get_attr` node, or one that transposes or casts it."""
    operation: Operation
    flipped: bool
    """Whether it was transposed on the way."""

    @property
    def is_weight(self) -> bool:
        """Whether it is what the operation calls its weight."""
        return _holds(self.operation.argument(self.node, self.operation.weight), self.value)


def uses(read: ParameterNode) -> Iterator[UsingNode]:
    """The nodes that compute with the parameter of one `get_attr` node. Transpositions, casts and
    copies are followed, and so are the nodes of DropConnect that hand on a masked weight."""
    yield from _uses(read, read.node, False)


def _uses(read: ParameterNode, value: fx.Node, flipped: bool) -> Iterator[UsingNode]:
    root = read.graph_module
    for user in value.users:
        function = function_of(user, root)
        if function in TRANSPOSING:
            yield from _uses(read, user, not flipped)
        elif function in PASSING or function == "dropconnect":
            yield from _uses(read, user, flipped)
        else:
            op = operation(user, root, lambda argument: _holds(argument, value))
            yield UsingNode(read, user, value, op, flipped)


def plain_name(owner: nn.Module, name: str) -> str:
    """The name that a parameter of a module has without DropConnect."""
    raw = {state.raw: state.name for state in states_of(owner).values()}
    return raw.get(name, name)


def _holds(argument: Any, value: fx.Node) -> bool:
    return any(leaf is value for leaf in leaves(argument))
