"""The diagram of a graph that is drawn node by node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from surgery.modules.keys import plain_keys
from surgery.modules.node import DropConnectNode
from surgery.spec.plan import join

from ..reading.operations import function_of
from .diagram import Box, Diagram
from .outline import Part, Weight


def node_diagram(graph_module: fx.GraphModule, root: Part) -> Diagram:
    """One box for each node."""
    parts, plain = root.by_path(), plain_keys(graph_module)
    diagram = Diagram()
    for node in graph_module.graph.nodes:
        diagram.boxes[node.name] = _node_box(node, graph_module, parts, plain)
        for source in node.all_input_nodes:
            diagram.arrows[source.name, node.name] = None
    return diagram


def _node_box(
    node: fx.Node,
    graph_module: fx.GraphModule,
    parts: Mapping[str, Part],
    plain: Mapping[str, str | None],
) -> Box:
    target = str(node.target)
    if node.op in ("placeholder", "output"):
        return Box(node.name, node.name, role="input" if node.op == "placeholder" else "output")
    if node.op == "get_attr":
        weight = _weight(parts, target) or _weight(parts, plain.get(target) or "")
        read = (
            () if weight is None else (replace(weight, site=None) if target in plain else weight,)
        )
        return Box(node.name, target, "" if read else "constant", weights=read)
    if node.op != "call_module":
        name = function_of(node, graph_module)
        return Box(node.name, node.name, "" if name == node.name else name, role="op")
    module = graph_module.get_submodule(target)
    if isinstance(module, DropConnectNode):
        owner = target.rpartition(".")[0]
        dropped = [_weight(parts, join(owner, name)) for name in module.states]
        return Box(node.name, node.name, "DropConnect", weights=tuple(filter(None, dropped)))
    part = parts.get(target)
    if part is None:
        return Box(node.name, target, type(module).__name__)
    return Box(node.name, target, part.kind, weights=part.all_weights())


def _weight(parts: Mapping[str, Part], full: str) -> Weight | None:
    owner, _, name = full.rpartition(".")
    part = parts.get(owner)
    return next((weight for weight in part.weights if weight.name == name), None) if part else None
