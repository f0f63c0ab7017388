"""The boxes and arrows of a picture, and those of a graph drawn node by node."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import fx, nn

from surgery.modules.node import DropConnectNode
from surgery.modules.places import places
from surgery.spec.plan import join

from ..reading.operations import function_of
from .outline import Part, Weight


@dataclass(frozen=True)
class Box:
    """What is drawn as one box."""

    key: str
    title: str
    kind: str = ""
    """Class of the module, or the operation; may be empty."""
    role: str = "module"
    """`module`, `op`, `symbol` (a sum), `input` or `output`."""
    weights: tuple[Weight, ...] = ()
    path: str = ""
    """Dotted name of the module that it belongs to; the key starts with it."""
    frames: tuple[str, ...] = ()
    """Paths of the repeated layers that it is in, outermost first."""


@dataclass
class Diagram:
    """Boxes in the order in which they run, arrows between them, and frames of repeated layers."""

    boxes: dict[str, Box] = field(default_factory=dict)
    arrows: dict[tuple[str, str], None] = field(default_factory=dict)
    """An ordered set."""
    frames: dict[str, Part] = field(default_factory=dict)
    """Repeated layers, by path."""


def node_diagram(graph_module: fx.GraphModule, root: Part) -> Diagram:
    """One box for each node."""
    parts = {part.path: part for part in root.walk()}
    raw = plain_names(graph_module)
    diagram = Diagram()
    for node in graph_module.graph.nodes:
        diagram.boxes[node.name] = _node_box(node, graph_module, parts, raw)
        for source in node.all_input_nodes:
            diagram.arrows[source.name, node.name] = None
    return diagram


def _node_box(
    node: fx.Node, graph_module: fx.GraphModule, parts: dict[str, Part], raw: dict[str, str]
) -> Box:
    target = str(node.target)
    if node.op in ("placeholder", "output"):
        return Box(node.name, node.name, role="input" if node.op == "placeholder" else "output")
    if node.op == "get_attr":
        weight = _weight(parts, target) or _weight(parts, raw.get(target, ""))
        read = () if weight is None else (replace(weight, site=None) if target in raw else weight,)
        return Box(node.name, target, "" if read else "constant", weights=read)
    if node.op != "call_module":
        name = function_of(node, graph_module)
        return Box(node.name, node.name, "" if name == node.name else name, role="op")
    module = graph_module.get_submodule(target)
    if isinstance(module, DropConnectNode):
        owner = target.rpartition(".")[0]
        found = [_weight(parts, join(owner, name)) for name in module.states]
        return Box(node.name, node.name, "DropConnect", weights=tuple(filter(None, found)))
    part = parts.get(target)
    return Box(node.name, target, _class_name(module, part), weights=all_weights(part))


def plain_names(model: nn.Module) -> dict[str, str]:
    """Plain dotted names by raw ones."""
    return {join(at.name, at.state.raw): join(at.name, at.state.name) for at in places(model)}


def _weight(parts: dict[str, Part], full: str) -> Weight | None:
    owner, _, name = full.rpartition(".")
    part = parts.get(owner)
    return next((weight for weight in part.weights if weight.name == name), None) if part else None


def all_weights(part: Part | None) -> tuple[Weight, ...]:
    """The weights of a module and of all below it, by relative name."""
    if part is None:
        return ()
    below = [
        replace(weight, name=join(child.label, weight.name))
        for child in part.children
        for weight in all_weights(child)
    ]
    return (*part.weights, *below)


def _class_name(module: nn.Module, part: Part | None) -> str:
    return part.kind if part is not None else type(module).__name__
