"""The boxes of a picture that shows modules: who feeds whom, with equal layers drawn once."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from surgery.modules.node import DropConnectNode, Settle
from surgery.moments.torch_functions import ACROSS, ACTIVATIONS, PASSING
from surgery.spec.plan import join

from ..reading.operations import INSPECTING, function_of
from .boxes import Box, Diagram, all_weights, plain_names
from .outline import Part

_NAMED = ACTIVATIONS | ACROSS
"""Functions of one value that are worth a box."""
_SYMBOLS = {"add": "+", "mul": "×", "sub": "−"}
_NAMES = {"scaled_dot_product_attention": "attention", "cat": "concat"}
_HIDDEN = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)


def module_diagram(graph_module: fx.GraphModule, model: nn.Module, root: Part) -> Diagram:
    """One box for each module that holds weights or computes, each activation, and each operation that
    joins two flows (a residual sum, attention). What only reshapes or makes masks is left out."""
    folds = _Folds(root)
    return _folded(_Builder(graph_module, model, folds).build(), folds)


class _Folds:
    """Which part stands for a module."""

    def __init__(self, root: Part) -> None:
        self.parts = {part.path: part for part in root.walk()}
        self.first = {path: part.path for part in root.walk() for path in part.paths()}

    def part(self, path: str) -> Part | None:
        """What is drawn for a module; None if the outline leaves it out."""
        return self.parts.get(self.drawn(path)[0])

    def drawn(self, path: str) -> tuple[str, dict[str, str]]:
        """The path that is drawn for `path`, and which layer of each run it was in."""
        at, runs = "", {}
        for name in path.split(".") if path else ():
            before = join(at, name)
            at = self.first.get(before, before)
            if at in self.parts and self.parts[at].count > 1:
                runs[at] = before
        return at, runs


def _folded(diagram: Diagram, folds: _Folds) -> Diagram:
    """The diagram with equal layers drawn once; arrows from one of them to the next are left out."""
    result = Diagram()
    keys, layers = {}, {}
    for box in diagram.boxes.values():
        drawn, runs = folds.drawn(box.path)
        key = drawn + box.key[len(box.path) :]
        keys[box.key], layers[box.key] = key, runs
        inside = max(runs, key=len, default="")
        title = key[len(inside) + 1 :] if box.role == "module" and inside else ""
        new = replace(box, key=key, path=drawn, title=title or box.title, frames=tuple(runs))
        result.boxes.setdefault(key, new)
        result.frames.update({run: folds.parts[run] for run in runs})
    for one, other in diagram.arrows:
        if all(layers[other].get(run, layer) == layer for run, layer in layers[one].items()):
            result.arrows[keys[one], keys[other]] = None
    return result


@dataclass(frozen=True)
class _Flow:
    """What a value comes from."""

    sources: tuple[str, ...] = ()
    """Keys of boxes."""
    reads: tuple[str, ...] = ()
    """Plain names of the parameters that it was made of, if it was made of nothing else."""


class _Builder:
    """Follows every value of a graph from box to box."""

    def __init__(self, graph_module: fx.GraphModule, model: nn.Module, folds: _Folds) -> None:
        self.graph_module, self.model, self.folds = graph_module, model, folds
        self.raw = plain_names(graph_module)
        self.parameters = {
            name for name, _ in graph_module.named_parameters(remove_duplicate=False)
        }
        self.diagram = Diagram()
        self.flows: dict[fx.Node, _Flow] = {}
        self.inputs: dict[str, Box] = {}
        self.integers: set[str] = set()
        """Inputs that only an embedding reads as data; elsewhere they are masks and positions."""
        self.numbers: dict[tuple[str, str], int] = {}

    def build(self) -> Diagram:
        for node in self.graph_module.graph.nodes:
            self.flows[node] = self._flow(node)
        return self.diagram

    def _flow(self, node: fx.Node) -> _Flow:
        if node.op == "placeholder":
            return self._input(node)
        if node.op == "get_attr":
            target = str(node.target)
            return _Flow(reads=(self.raw.get(target, target),) if target in self.parameters else ())
        flows = [self.flows[source] for source in node.all_input_nodes]
        flow = _Flow(
            tuple(dict.fromkeys(key for flow in flows for key in flow.sources)),
            tuple(dict.fromkeys(name for flow in flows for name in flow.reads)),
        )
        if node.op == "output":
            return self._box(Box("output", "output", role="output"), self._data(flow))
        return self._computed(node, flow)

    def _data(self, flow: _Flow) -> tuple[str, ...]:
        return tuple(key for key in flow.sources if key not in self.integers)

    def _computed(self, node: fx.Node, flow: _Flow) -> _Flow:
        path, data, name = module_path(node), self._data(flow), function_of(node, self.graph_module)
        if name in INSPECTING or not node.users:
            return _Flow()
        if (
            name in PASSING
        ):  # export books what others do with the same tensor on the one who passes it
            return flow
        module = _submodule(self.model, path) or _submodule(self.graph_module, path)
        if isinstance(module, (*_HIDDEN, Settle)):
            return flow
        opaque = node.op == "call_module" and not isinstance(module, DropConnectNode)
        if module is not None and (opaque or (path and not _parted(module))):
            return self._leaf(path, module, flow, opaque)
        if isinstance(module, DropConnectNode) and module.call is not None:
            name = module.call.function
        if flow.reads and flow.sources:
            return self._reading(name, flow)
        if len(data) > 1 or (data and name in _NAMED):
            return self._operation(path, name, data)
        return _Flow(data or flow.sources, () if flow.sources else flow.reads)

    def _reading(self, name: str, flow: _Flow) -> _Flow:
        """An operation on parameters, outside of the module that owns them or in one with parts."""
        first = flow.reads[0]
        path = first.rpartition(".")[0]
        part = self.folds.part(path)
        if path and part is not None and not part.children:
            kind = name if part.kind == "Module" else part.kind  # traced graphs forget classes
            box = Box(path, path, kind, weights=part.weights, path=path)
        else:
            weights = (
                tuple(w for w in part.weights if join(path, w.name) in flow.reads) if part else ()
            )
            box = Box(first, first, name, weights=weights, path=path)
        return self._box(box, flow.sources)

    def _leaf(self, path: str, module: nn.Module, flow: _Flow, opaque: bool) -> _Flow:
        if any(True for _ in module.parameters()):
            return self._module(path, flow.sources, opaque)
        data = self._data(flow)
        return self._module(path, data) if data else flow

    def _input(self, node: fx.Node) -> _Flow:
        key = f"input {node.name}"
        self.inputs[key] = Box(key, node.name, role="input")
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            self.integers.add(key)
        return _Flow((key,))

    def _module(self, path: str, sources: tuple[str, ...], opaque: bool = False) -> _Flow:
        part = self.folds.part(path)
        weights = all_weights(part) if opaque else part.weights if part else ()
        kind = part.kind if part else ""
        return self._box(Box(path, path or "(root)", kind, weights=weights, path=path), sources)

    def _operation(self, path: str, name: str, sources: tuple[str, ...]) -> _Flow:
        number = self.numbers[path, name] = self.numbers.get((path, name), 0) + 1
        role = "symbol" if name in _SYMBOLS else "op"
        title = _SYMBOLS.get(name, _NAMES.get(name, name))
        return self._box(Box(f"{path} {name} {number}", title, role=role, path=path), sources)

    def _box(self, box: Box, sources: tuple[str, ...]) -> _Flow:
        for source in sources:
            if source in self.inputs:
                self.diagram.boxes.setdefault(source, self.inputs[source])
            if source != box.key:  # the operations of one module
                self.diagram.arrows[source, box.key] = None
        self.diagram.boxes.setdefault(box.key, box)
        return _Flow((box.key,))


def module_path(node: fx.Node) -> str:
    """Dotted name of the innermost module in whose forward the node runs."""
    if node.op == "call_module":
        return str(node.target)
    stack = list((node.meta.get("nn_module_stack") or {"": ("", None)}).values())
    return re.sub(r"@\d+$", "", str(stack[-1][0]))


def _parted(module: nn.Module) -> bool:
    """Whether it has parts, or is one of a graph's own that do not count."""
    return isinstance(module, DropConnectNode) or any(True for _ in module.children())


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
