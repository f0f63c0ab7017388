"""The diagram of a model drawn module by module: who feeds whom, with equal layers drawn once."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from surgery.modules.keys import plain_keys
from surgery.modules.node import DropConnectNode, Settle
from surgery.moments.torch_functions import ACROSS, ACTIVATIONS, PASSING
from surgery.spec.plan import join

from ..reading.operations import INSPECTING, function_of, submodule
from .diagram import Box, Diagram
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
    joins two values (a residual sum, attention). What only reshapes or makes masks is left out."""
    folds = _Folds(root)
    return _folded(_Builder(graph_module, model, folds).build(), folds)


class _Folds:
    """Which part of the outline stands for a module. The first of equal layers stands for all."""

    def __init__(self, root: Part) -> None:
        self.parts = root.by_path()
        self.first = {path: part.path for part in root.walk() for path in part.paths()}

    def part(self, path: str) -> Part | None:
        """What is drawn for a module; None if the outline leaves it out."""
        return self.parts.get(self.drawn(path)[0])

    def drawn(self, path: str) -> tuple[str, dict[str, str]]:
        """The path that is drawn for `path`; and for each run of layers around it, by the path of
        the run, the path of the layer that it was in."""
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
class _Origin:
    """What a value comes from."""

    sources: tuple[str, ...] = ()
    """Keys of boxes."""
    reads: tuple[str, ...] = ()
    """Plain names of the parameters that it was made of, if it was made of nothing else."""


class _Builder:
    """Walks a graph once, in order; notes which boxes and parameters every value is made of."""

    def __init__(self, graph_module: fx.GraphModule, model: nn.Module, folds: _Folds) -> None:
        self.graph_module, self.model, self.folds = graph_module, model, folds
        self.plain = plain_keys(graph_module)
        self.parameters = dict(graph_module.named_parameters(remove_duplicate=False))
        self.diagram = Diagram()
        self.origins: dict[fx.Node, _Origin] = {}
        self.inputs: dict[str, Box] = {}
        self.integers: set[str] = set()
        """Inputs that only an embedding reads as data; elsewhere they are masks and positions."""
        self.numbers: dict[tuple[str, str], int] = {}

    def build(self) -> Diagram:
        for node in self.graph_module.graph.nodes:
            self.origins[node] = self._origin(node)
        return self.diagram

    def _origin(self, node: fx.Node) -> _Origin:
        if node.op == "placeholder":
            return self._input(node)
        if node.op == "get_attr":
            target = str(node.target)
            name = self.plain.get(target) or target
            return _Origin(reads=(name,) if target in self.parameters else ())
        origins = [self.origins[source] for source in node.all_input_nodes]
        origin = _Origin(
            tuple(dict.fromkeys(key for one in origins for key in one.sources)),
            tuple(dict.fromkeys(name for one in origins for name in one.reads)),
        )
        if node.op == "output":
            return self._box(Box("output", "output", role="output"), self._data(origin))
        return self._computed(node, origin)

    def _data(self, origin: _Origin) -> tuple[str, ...]:
        return tuple(key for key in origin.sources if key not in self.integers)

    def _computed(self, node: fx.Node, origin: _Origin) -> _Origin:
        path, name = module_path(node), function_of(node, self.graph_module)
        if name in INSPECTING or not node.users:
            return _Origin()
        if name in PASSING:  # export says of what is done to the same tensor that it is done here
            return origin
        data = self._data(origin)
        module = submodule(self.model, path) or submodule(self.graph_module, path)
        if isinstance(module, (*_HIDDEN, Settle)):
            return origin
        opaque = node.op == "call_module" and not isinstance(module, DropConnectNode)
        if module is not None and (opaque or (path and not _parted(module))):
            return self._leaf(path, module, origin, opaque)
        if isinstance(module, DropConnectNode) and module.call is not None:
            name = module.call.function
        if origin.reads and origin.sources:
            return self._reading(name, origin)
        if len(data) > 1 or (data and name in _NAMED):
            return self._operation(path, name, data)
        return _Origin(data or origin.sources, () if origin.sources else origin.reads)

    def _reading(self, name: str, origin: _Origin) -> _Origin:
        """An operation on parameters, outside of the module that owns them or in one with parts."""
        first = origin.reads[0]
        path = first.rpartition(".")[0]
        part = self.folds.part(path)
        if path and part is not None and not part.children:
            kind = name if part.kind == "Module" else part.kind  # traced graphs forget classes
            box = Box(path, path, kind, weights=part.weights, path=path)
        else:
            weights = (
                tuple(w for w in part.weights if join(path, w.name) in origin.reads) if part else ()
            )
            box = Box(first, first, name, weights=weights, path=path)
        return self._box(box, origin.sources)

    def _leaf(self, path: str, module: nn.Module, origin: _Origin, opaque: bool) -> _Origin:
        has_parameters = any(True for _ in module.parameters())
        sources = origin.sources if has_parameters else self._data(origin)
        if not has_parameters and not sources:
            return origin
        part = self.folds.part(path)
        weights = () if part is None else part.all_weights() if opaque else part.weights
        kind = part.kind if part else ""
        return self._box(Box(path, path or "(root)", kind, weights=weights, path=path), sources)

    def _input(self, node: fx.Node) -> _Origin:
        key = f"input {node.name}"
        self.inputs[key] = Box(key, node.name, role="input")
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            self.integers.add(key)
        return _Origin((key,))

    def _operation(self, path: str, name: str, sources: tuple[str, ...]) -> _Origin:
        number = self.numbers[path, name] = self.numbers.get((path, name), 0) + 1
        role = "symbol" if name in _SYMBOLS else "op"
        title = _SYMBOLS.get(name, _NAMES.get(name, name))
        return self._box(Box(f"{path} {name} {number}", title, role=role, path=path), sources)

    def _box(self, box: Box, sources: tuple[str, ...]) -> _Origin:
        for source in sources:
            if source in self.inputs:
                self.diagram.boxes.setdefault(source, self.inputs[source])
            if source != box.key:  # the operations of one module
                self.diagram.arrows[source, box.key] = None
        self.diagram.boxes.setdefault(box.key, box)
        return _Origin((box.key,))


def module_path(node: fx.Node) -> str:
    """Dotted name of the innermost module in whose forward the node runs."""
    if node.op == "call_module":
        return str(node.target)
    stack = list((node.meta.get("nn_module_stack") or {"": ("", None)}).values())
    return re.sub(r"@\d+$", "", str(stack[-1][0]))


def _parted(module: nn.Module) -> bool:
    """Whether it has parts, or is one of a graph's own that do not count."""
    return isinstance(module, DropConnectNode) or any(True for _ in module.children())
