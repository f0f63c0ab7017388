"""The diagram of a graph that is drawn node by node."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from surgery.modules.keys import plain_keys
from surgery.modules.node import DropConnectNode
from surgery.spec.plan import join

from ..reading.operations import function_of
from .diagram import Box, Diagram
from .outline import Part


def node_diagram(graph_module: fx.GraphModule, root: Part) -> Diagram:
    """One box for each node. `root` is the outline of the graph module."""
    builder, diagram = _Builder(graph_module, root), Diagram()
    for node in graph_module.graph.nodes:
        diagram.boxes[node.name] = builder.box(node)
        for source in node.all_input_nodes:
            diagram.arrows[source.name, node.name] = None
    return diagram


class _Builder:
    """Makes the box of a node."""

    def __init__(self, graph_module: fx.GraphModule, root: Part) -> None:
        self.graph_module = graph_module
        self.parts = root.by_path()
        self.weights = {
            join(path, weight.name): weight
            for path, part in self.parts.items()
            for weight in part.weights
        }
        self.plain = plain_keys(graph_module)

    def box(self, node: fx.Node) -> Box:
        target = str(node.target)
        if node.op in ("placeholder", "output"):
            return Box(node.name, node.name, role="input" if node.op == "placeholder" else "output")
        if node.op == "get_attr":
            return self._read(node.name, target)
        if node.op == "call_module":
            return self._called(node.name, target)
        name = function_of(node, self.graph_module)
        return Box(node.name, node.name, "" if name == node.name else name, role="op")

    def _read(self, key: str, target: str) -> Box:
        """A parameter; a raw one is not marked, since the node that drops it is."""
        raw = target in self.plain
        weight = self.weights.get((self.plain[target] or "") if raw else target)
        if weight is None:
            return Box(key, target, "constant")
        return Box(key, target, weights=(replace(weight, site=None) if raw else weight,))

    def _called(self, key: str, target: str) -> Box:
        module, part = self.graph_module.get_submodule(target), self.parts.get(target)
        if isinstance(module, DropConnectNode):
            owner = target.rpartition(".")[0]
            names = [join(owner, name) for name in module.states]
            dropped = tuple(self.weights[name] for name in names if name in self.weights)
            return Box(key, key, "DropConnect", weights=dropped)
        if part is None:
            return Box(key, target, type(module).__name__)
        return Box(key, target, part.kind, weights=part.all_weights())
