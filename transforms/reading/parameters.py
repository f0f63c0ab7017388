"""Which nodes of a graph use each parameter of a model, and what they make of it."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from surgery.kinds.kind import kind_of
from surgery.modules.operated import plain_class
from surgery.moments.torch_functions import INDEXING, JOINING, KEEPING, SELECTING
from surgery.planning.runs import Act
from surgery.spec.plan import Use

from ..capture.capture import capture_of
from .activation import Flow
from .findings import Findings, Shape
from .operations import INSPECTING, Operation, function_of, leaves, operation, submodule

_CARRYING = KEEPING | SELECTING | INDEXING
"""Functions whose result is a view, a part or a copy of a parameter, and so not a use of it yet."""

_STACKED = frozenset({"linear", "addmm", "matmul", "grouped_mm"})
"""Operations that are a product of experts if the parameter is a stack of matrices."""


@dataclass(frozen=True)
class _Carried:
    """What a node carries whose value is a parameter, or made of parameters by moving entries."""

    parameters: tuple[int, ...]
    """Their ids."""
    chosen: bool = False
    """Whether some matrices of a stack were chosen."""


@dataclass(frozen=True)
class _NodeUse:
    """One use of a parameter by one node."""

    node: fx.Node
    op: str
    affine: bool
    input_shape: Shape | None


@dataclass(frozen=True)
class _Told:
    """What `Findings` tells of one parameter."""

    uses: tuple[Use, ...]
    shapes: tuple[Shape | None, ...]
    running: tuple[tuple[str, ...], ...]
    acts: tuple[Act, ...]


def findings_of(model: nn.Module, graph: fx.GraphModule) -> Findings:
    """The uses of the parameters of a model, as one graph of it shows them.

    Args:
        model: without DropConnect.
        graph: of this model, sharing its parameters; or the model itself.
    """
    return _Follower(model, graph).findings()


class _Follower:
    """Walks a graph once, in order, following parameters from where they are read to where they act."""

    def __init__(self, model: nn.Module, graph: fx.GraphModule) -> None:
        self._model, self._graph = model, graph
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        """By name, in the order of the model."""
        self._dims = {id(parameter): parameter.ndim for parameter in self._parameters.values()}
        self._first_name = {id(module): name for name, module in model.named_modules()}
        self._carried: dict[fx.Node, _Carried] = {}
        self._uses: dict[int, list[_NodeUse]] = {parameter: [] for parameter in self._dims}
        """By the parameter's id."""

    def findings(self) -> Findings:
        for node in self._graph.graph.nodes:
            self._visit(node)
        flow = Flow(self._graph.graph, self._graph, self._carried)
        told = {parameter: self._told(uses, flow) for parameter, uses in self._uses.items()}
        named = {name: told[id(parameter)] for name, parameter in self._parameters.items()}
        names: dict[int, list[str]] = {}
        for name, parameter in self._parameters.items():
            names.setdefault(id(parameter), []).append(name)
        return Findings(
            {name: one.uses for name, one in named.items()},
            {name: one.shapes for name, one in named.items()},
            tuple(tuple(group) for group in names.values() if len(group) > 1),
            capture_of(self._graph),
            {name: one.running for name, one in named.items()},
            {name: one.acts for name, one in named.items()},
        )

    def _told(self, node_uses: list[_NodeUse], flow: Flow) -> _Told:
        times: dict[Use, int] = {}
        shapes: dict[Use, Shape | None] = {}
        running, acts = [], []
        for node_use in node_uses:
            use = self._use(node_use, flow)
            times[use] = times.get(use, 0) + 1
            shapes.setdefault(use, node_use.input_shape)
            running.append(self._running(node_use.node))
            acts.append(self._act(node_use, use))
        return _Told(
            tuple(replace(use, times=count) for use, count in times.items()),
            tuple(shapes.values()),
            tuple(dict.fromkeys(running)),
            tuple(dict.fromkeys(acts)),
        )

    def _use(self, node_use: _NodeUse, flow: Flow) -> Use:
        by = self._running(node_use.node)[-1]
        if node_use.op in _STACKED and isinstance(self._module(by), nn.MultiheadAttention):
            return Use(op="attention", by=by)
        activation = flow.activation(node_use.node) if node_use.affine else None
        return Use(op=node_use.op, by=by, activation=activation)

    def _act(self, node_use: _NodeUse, use: Use) -> Act:
        module = self._module(use.by)
        product = None if module is None else kind_of(module).product(plain_class(module))
        shape = node_use.input_shape if product is None else node_use.node.meta.get("module_input")
        return Act(use.op, use.by, shape)

    def _visit(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(self._graph)
            if id(value) in self._uses:
                self._carried[node] = _Carried((id(value),))
            return
        function = function_of(node, self._graph)
        if function in INSPECTING:
            return
        if node.op == "call_module":
            self._visit_module(node)
        given = [source for source in node.all_input_nodes if source in self._carried]
        if given and not self._carries(node, function, given):
            for source in given:
                self._note(node, function, source)

    def _visit_module(self, node: fx.Node) -> None:
        """All parameters of a leaf module are used by what it is called for."""
        op = operation(node, self._graph, lambda argument: False)
        for parameter in self._graph.get_submodule(str(node.target)).parameters():
            self._append(node, id(parameter), op, op.name, node.args[0] if node.args else None)

    def _carries(self, node: fx.Node, function: str, given: list[fx.Node]) -> bool:
        """Whether a node only moves entries; then its value is followed instead."""
        others = [source for source in node.all_input_nodes if source not in self._carried]
        if function in JOINING:
            carries = not others
        else:
            carries = function in _CARRYING
            if carries and node.args[0] not in self._carried:
                return True  # `x.type_as(weight)` does not depend on the values
        carried = [self._carried[source] for source in given]
        parameters = tuple(dict.fromkeys(p for one in carried for p in one.parameters))
        stacked = all(self._dims[parameter] > 2 for parameter in parameters)
        if function in INDEXING and others and not stacked:
            return False
        if carries:
            chosen = stacked and function in SELECTING | INDEXING
            self._carried[node] = _Carried(parameters, chosen or any(one.chosen for one in carried))
        return carries

    def _note(self, node: fx.Node, function: str, source: fx.Node) -> None:
        carried = self._carried[source]
        op = operation(node, self._graph, lambda argument: source in leaves(argument))
        name = "embedding" if function in INDEXING else op.name
        stack = carried.chosen or _ndim(source, self._graph) > 2
        for parameter in carried.parameters:
            grouped = name in _STACKED and stack and self._dims[parameter] > 2
            its_name = "grouped_mm" if grouped else name
            self._append(node, parameter, op, its_name, op.argument(node, op.input))

    def _append(self, node: fx.Node, parameter: int, op: Operation, name: str, given: Any) -> None:
        if parameter in self._uses:
            shape = _shape(given) if isinstance(given, fx.Node) else None
            self._uses[parameter].append(_NodeUse(node, name, op.affine, shape))

    def _running(self, node: fx.Node) -> tuple[str, ...]:
        """The modules whose forward is running at a node, the outermost first. In a graph that is the
        model itself that is the model, and with it the module that the node calls."""
        paths = [""]
        if self._graph is not self._model:  # torch.export calls a second call `fc@1`
            stack = node.meta.get("nn_module_stack", {}).values()
            paths += [path.split("@")[0] for path, _ in stack]
        if node.op == "call_module":
            paths.append(str(node.target))
        return tuple(self._first_name.get(id(self._module(path)), path) for path in paths)

    def _module(self, path: str) -> nn.Module | None:
        return submodule(self._model, path)


def _shape(node: fx.Node) -> Shape | None:
    value = node.meta.get("val")
    shape = value.shape if isinstance(value, torch.Tensor) else node.meta.get("shape")
    return None if shape is None else tuple(shape)


def _ndim(node: fx.Node, graph: fx.GraphModule) -> int:
    """The number of dimensions of a node's value; 0 if the graph does not know."""
    if node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(graph)
        return value.ndim if isinstance(value, torch.Tensor) else 0
    return len(_shape(node) or ())
