"""Take DropConnect nodes out of graphs: the exact inverse of `insert`.

What a node was is told by the graph and by the module that the node calls, since copies and pickles
of a graph keep these. Edits of other parts of the graph stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from surgery.modules.node import DropConnectNode, Settle, forget
from surgery.modules.places import states_of
from surgery.modules.walk import named_modules
from surgery.planning.graphs import Nodes
from surgery.spec.plan import join
from surgery.torch_private.graphs import free_name, set_name, usual_name

from ..reading.operations import submodule
from ..reading.uses import AtNode
from .insert import NAME, finish, node_module
from .model_graphs import graphs_in

_FIX = (
    "undo that edit of the graph, or load plain_state_dict(model) into a graph that is traced anew"
)


_ANCHORS = ("anchor", "bias_anchor")

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class _Called(AtNode):
    """A node that calls a DropConnect module."""

    module: DropConnectNode

    @property
    def raw(self) -> object:
        """The argument that should be the node which reads the raw weight."""
        call, node = self.module.call, self.node
        if call is None:
            return node.args[0] if node.args else None
        if isinstance(call.weight, str):
            return node.kwargs.get(call.weight)
        return node.args[call.weight] if call.weight < len(node.args) else None


def stuck(model: nn.Module) -> list[str]:
    """Why the nodes cannot be taken out: somebody edited them since."""
    called = [one for graph_module in graphs_in(model) for one in _called(graph_module)]
    problems = []
    for path, _, module in _modules(model):
        mine = [one for one in called if one.module is module]
        name = join(path, module.name)
        if not mine:
            problems.append(
                f"{name}: no node calls {join(path, node_module(module.name))!r} any more: it was "
                f"erased, or got another target; {_FIX}"
            )
        problems += [
            f"{name}: node {one.node.name!r} does not take the raw weight any more, but "
            f"{one.raw}: it was re-wired; {_FIX}"
            for one in mine
            if not _is_wired(one)
        ]
    return problems


def _modules(model: nn.Module) -> list[tuple[str, nn.Module, DropConnectNode]]:
    """The modules that nodes call, each with its owner and the owner's name."""
    return [
        (name, owner, node)
        for name, owner in named_modules(model)
        for node in owner._modules.values()
        if isinstance(node, DropConnectNode)
    ]


def _is_wired(one: _Called) -> bool:
    raw = one.raw
    wanted = join(one.path, one.module.states[one.module.name].raw)
    return isinstance(raw, fx.Node) and raw.op == "get_attr" and raw.target == wanted


def nodes(model: nn.Module) -> Nodes:
    """The modules that the nodes call."""
    return {(id(owner), module.name): module for _, owner, module in _modules(model)}


def remove(model: nn.Module) -> list[PassResult]:
    """Take every node out, when the parameters that only graphs read have their plain names.

    Returns:
        one result for each graph.
    """
    results = [_remove_nodes(graph_module) for graph_module in graphs_in(model)]
    for _, owner, module in _modules(model):
        forget(owner, module)
        del owner._modules[node_module(module.name)]
    return results


def _remove_nodes(graph_module: fx.GraphModule) -> PassResult:
    names = _Names(graph_module.graph)
    for node, _ in list(_calls(graph_module, Settle)):
        _bypass(node, node.args[0], names)
        del graph_module._modules[str(node.target)]
    for one in reversed(list(_called(graph_module))):  # what hands on a mask before what makes it
        _put_back(one, names)
    for node, target in list(_raw_reads(graph_module)):
        if node.name == str(node.target).replace(".", "_"):
            names.restore(node, target.replace(".", "_"))
        node.target = target
        names.restore(node, node.name)
    for node in graph_module.graph.find_nodes(op="call_module"):
        names.restore(node, node.name)
    return finish(graph_module, names.changed)


def _put_back(one: _Called, names: _Names) -> None:
    """What the node was: the operation, or nothing between a weight and its readers."""
    node, call = one.node, one.module.call
    anchors = [node.kwargs[key] for key in _ANCHORS if key in node.kwargs]
    if call is None:
        _bypass(node, node.args[0], names)
    else:
        node.op, node.target = call.op, call.target
        node.kwargs = {key: value for key, value in node.kwargs.items() if key not in _ANCHORS}
        names.restore(node, usual_name(node.graph, call.target))
    for anchor in anchors:
        if isinstance(anchor, fx.Node) and not anchor.users:
            names.erase(anchor)


def _bypass(node: fx.Node, value: Any, names: _Names) -> None:
    """Let the users of a node use `value`, and erase it."""
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda arg: value if arg is node else arg)
        user.kwargs = fx.map_arg(user.kwargs, lambda arg: value if arg is node else arg)
    names.erase(node)


class _Names:
    """The names of a graph's nodes, given back as nodes are restored."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.taken = {node.name for node in graph.nodes}
        self.changed = False

    def restore(self, node: fx.Node, otherwise: str) -> None:
        """Give a node the name that it had; in a graph that was traced anew by unpickling, which
        knows none, the usual one."""
        name, old = node.meta.pop(NAME, otherwise), node.name
        if name == old:
            return
        if name not in self.taken:
            self._release(name)  # it was kept free for this
        set_name(node, name)
        self._release(old)
        self.taken.add(node.name)
        self.changed = True

    def erase(self, node: fx.Node) -> None:
        self.graph.erase_node(node)
        self._release(node.name)
        self.changed = True

    def _release(self, name: str) -> None:
        self.taken.discard(name)
        free_name(self.graph, name)


def _calls(graph_module: fx.GraphModule, kind: type[Module]) -> Iterator[tuple[fx.Node, Module]]:
    """The nodes that call a module of a class, and the modules."""
    for node in graph_module.graph.find_nodes(op="call_module"):
        module = submodule(graph_module, str(node.target))
        if isinstance(module, kind):
            yield node, module


def _called(graph_module: fx.GraphModule) -> Iterator[_Called]:
    for node, module in _calls(graph_module, DropConnectNode):
        yield _Called(graph_module, node, module)


def _raw_reads(graph_module: fx.GraphModule) -> Iterator[tuple[fx.Node, str]]:
    """The nodes that read a raw parameter, and its plain name."""
    for node in graph_module.graph.find_nodes(op="get_attr"):
        path, _, name = str(node.target).rpartition(".")
        owner = submodule(graph_module, path)
        for state in () if owner is None else states_of(owner).values():
            if state.raw == name:
                yield node, join(path, state.name)
