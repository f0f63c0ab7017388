"""Find which operations use each parameter of a model, and which activation follows."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from surgery.kinds.kind import kind_of
from surgery.modules.masking import is_sharded
from surgery.modules.operated import plain_class
from surgery.moments.torch_functions import INDEXING, JOINING, KEEPING, SELECTING
from surgery.planning.runs import Act, Seen
from surgery.spec.plan import Use

from ..capture.capture import (
    Capture,
    CaptureError,
    capture,
    capture_of,
    first_of,
    inputs_for,
    symbolic,
)
from ..capture.inputs import dummy_inputs
from ..capture.record import record_run
from ..capture.untouched import plain
from .activation import Flow
from .operations import INSPECTING, Operation, function_of, leaves, operation

Shape = tuple[int, ...]

_CARRYING = KEEPING | SELECTING | INDEXING
"""Functions whose result is a view, a part or a copy of a parameter, and so not a use of it yet."""

_STACKED = frozenset({"linear", "addmm", "matmul", "grouped_mm"})
"""Operations that are a product of experts if the parameter is a stack of matrices."""


class Findings(Mapping[str, tuple[Use, ...]]):
    """The uses of every parameter, by its dotted name in the plain model. `print(findings)` shows a
    table. Tied parameters have the same uses under each of their names."""

    def __init__(
        self,
        uses: dict[str, tuple[Use, ...]],
        input_shapes: dict[str, tuple[Shape | None, ...]],
        tied: tuple[tuple[str, ...], ...],
        capture: Capture | None,
        running: dict[str, tuple[tuple[str, ...], ...]],
        acts: dict[str, tuple[Act, ...]],
    ) -> None:
        self._uses = uses
        self.input_shapes = input_shapes
        """For each use of a parameter, the shape of what the weight acts on, at its first call; None
        where the graph does not know shapes (`symbolic_trace`)."""
        self.tied = tied
        """Groups of names of the same parameter."""
        self.capture = capture
        """How the graph was captured; None for a graph of other origin."""
        self.acts = acts
        self.running = running
        """For each parameter and place where it is used, the names of the modules whose forward is
        running there, the outermost first; the root is `""`."""

    @property
    def unused(self) -> tuple[str, ...]:
        """The parameters that no torch function was seen to use in this run. What an extension does
        outside torch's functions cannot be seen."""
        return tuple(name for name, uses in self._uses.items() if not uses)

    def __getitem__(self, name: str) -> tuple[Use, ...]:
        return self._uses[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._uses)

    def __len__(self) -> int:
        return len(self._uses)

    def __str__(self) -> str:
        width = max((len(name) for name in self), default=0)
        lines = [f"{name.ljust(width)}  {_listed(uses)}" for name, uses in self.items()]
        return "\n".join([*([] if self.capture is None else [str(self.capture)]), *lines])


def _listed(uses: tuple[Use, ...]) -> str:
    words = [
        f"{use} by {use.by or '(root)'}" + (f" -> {use.activation}" if use.activation else "")
        for use in uses
    ]
    return ", ".join(words) or "unused"


def find(
    model: nn.Module, example_inputs: Any = None, *, graph: fx.GraphModule | None = None
) -> Findings:
    """Which operations use each parameter, how often, run by which module, and what follows.

    The model is run once by `record` if there are inputs (given, or dummies for a transformers model):
    that sees every model, in milliseconds, as it really runs. Without inputs, or if the model does not
    run with dummies, the graph is that of `capture`. The model is left as it was.

    Args:
        model: any module, operated on or not, also a `GraphModule`.
        example_inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        graph: look at this graph of the model (from `capture` or `record`) instead.

    Raises:
        CaptureError: the model does not run with `example_inputs`, or there are none and it can not be
            traced without; the message has the reason of each way.
        TypeError: `example_inputs` is none of these.
    """

    def findings() -> Findings:
        seen = _graph(model, example_inputs) if graph is None else graph
        return _Finder(model, seen).findings()

    return plain(model, findings)


def look(model: nn.Module, example_inputs: Any = None) -> Seen | None:
    """What `find` finds, as the core asks for it; None if there is nothing to run the model with.

    Raises:
        CaptureError: the model does not run with `example_inputs`.
    """
    if example_inputs is None:
        try:
            if _is_sharded(model) or dummy_inputs(model) is None:
                return None
            return _looked(model, None, ())
        except Exception:  # dummies are a guess, and a model may do anything with them
            return None
    inputs = inputs_for(model, example_inputs)
    assert inputs is not None
    given = (*inputs.args, *inputs.kwargs.values())
    shapes = tuple(tuple(one.shape) for one in given if isinstance(one, torch.Tensor))
    return _looked(model, example_inputs, shapes)


def _looked(model: nn.Module, example_inputs: Any, given: tuple[Shape, ...]) -> Seen:
    found = find(model, example_inputs)
    return Seen(found, found.acts, given, found.running)


def _is_sharded(model: nn.Module) -> bool:
    """Whether a run of the model would be a conversation with other processes."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def _graph(model: nn.Module, example_inputs: Any) -> fx.GraphModule:
    inputs = inputs_for(model, example_inputs)
    if inputs is not None:
        run = inputs.for_one_pass(model)
        try:
            return first_of({"record": lambda: record_run(model, run)}, model, inputs)
        except CaptureError:
            if example_inputs is not None:
                raise
    if isinstance(model, fx.GraphModule) and _calls_graphs(model):
        return first_of({"symbolic_trace": lambda: symbolic(model)}, model, inputs)
    return capture(model, example_inputs)


def _calls_graphs(graph: fx.GraphModule) -> bool:
    """Whether a graph calls others, which must be written out for data to flow through all of them."""
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    return any(isinstance(graph.get_submodule(target), fx.GraphModule) for target in targets)


@dataclass(frozen=True)
class _Read:
    """A node whose value is a parameter, or made of parameters by moving entries."""

    parameters: tuple[int, ...]
    """Their ids."""
    chosen: bool = False
    """Whether some matrices of a stack were chosen."""


@dataclass(frozen=True)
class _Call:
    """One use of a parameter by one node."""

    parameter: int
    node: fx.Node
    op: str
    affine: bool
    input_shape: Shape | None


class _Finder:
    """Walks a graph once, in order, following parameters from where they are read to where they act."""

    def __init__(self, model: nn.Module, graph: fx.GraphModule) -> None:
        self._model, self._graph = model, graph
        self._names: dict[int, list[str]] = {}
        self._dims: dict[int, int] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(parameter), []).append(name)
            self._dims[id(parameter)] = parameter.ndim
        self._first_name: dict[int, str] = {
            id(module): name for name, module in model.named_modules()
        }
        self._reads: dict[fx.Node, _Read] = {}
        self._calls: list[_Call] = []

    def findings(self) -> Findings:
        for node in self._graph.graph.nodes:
            self._visit(node)
        flow = Flow(self._graph.graph, self._graph, self._reads)
        uses: dict[int, dict[Use, int]] = {parameter: {} for parameter in self._names}
        shapes: dict[int, dict[Use, Shape | None]] = {parameter: {} for parameter in self._names}
        running: dict[int, dict[tuple[str, ...], None]] = {
            key: {} for key in self._names
        }  # in order
        acts: dict[int, dict[Act, None]] = {key: {} for key in self._names}
        for call in self._calls:
            running[call.parameter][self._running(call.node)] = None
            use = self._use(call, flow)
            acts[call.parameter][self._act(call, use, flow)] = None
            counts = uses[call.parameter]
            counts[use] = counts.get(use, 0) + 1
            shapes[call.parameter].setdefault(use, call.input_shape)
        return Findings(
            {
                name: tuple(replace(use, times=times) for use, times in uses[parameter].items())
                for parameter, name in self._each_name()
            },
            {name: tuple(shapes[parameter].values()) for parameter, name in self._each_name()},
            tuple(tuple(names) for names in self._names.values() if len(names) > 1),
            capture_of(self._graph),
            {name: tuple(running[parameter]) for parameter, name in self._each_name()},
            {name: tuple(acts[parameter]) for parameter, name in self._each_name()},
        )

    def _each_name(self) -> Iterator[tuple[int, str]]:
        """Ids and names, in model order."""
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            yield id(parameter), name

    def _use(self, call: _Call, flow: Flow) -> Use:
        by = self._by(call.node)
        if call.op in _STACKED and self._is_attention(by):
            return Use(op="attention", by=by)
        activation = flow.activation(call.node) if call.affine else None
        return Use(op=call.op, by=by, activation=activation)

    def _act(self, call: _Call, use: Use, flow: Flow) -> Act:
        module = self._module(use.by)
        product = None if module is None else kind_of(module).product(plain_class(module))
        shape = call.input_shape if product is None else call.node.meta.get("module_input")
        return Act(use.op, use.by, shape, flow.joint(call.node) if call.affine else None)

    def _visit(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(self._graph)
            if id(value) in self._names:
                self._reads[node] = _Read((id(value),))
            return
        function = function_of(node, self._graph)
        if function in INSPECTING:
            return
        if node.op == "call_module":
            self._visit_module(node)
        given = [source for source in node.all_input_nodes if source in self._reads]
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
        others = [source for source in node.all_input_nodes if source not in self._reads]
        if function in JOINING:
            carries = not others
        else:
            carries = function in _CARRYING
            if carries and node.args[0] not in self._reads:
                return True  # `x.type_as(weight)` does not depend on the values
        reads = [self._reads[source] for source in given]
        parameters = tuple(dict.fromkeys(p for read in reads for p in read.parameters))
        stacked = all(self._dims[parameter] > 2 for parameter in parameters)
        if function in INDEXING and others and not stacked:
            return False
        if carries:
            chosen = stacked and function in SELECTING | INDEXING
            self._reads[node] = _Read(parameters, chosen or any(read.chosen for read in reads))
        return carries

    def _note(self, node: fx.Node, function: str, source: fx.Node) -> None:
        read = self._reads[source]
        op = operation(node, self._graph, lambda argument: source in leaves(argument))
        name = "embedding" if function in INDEXING else op.name
        stack = read.chosen or (_ndim(source, self._graph) or 0) > 2
        for parameter in read.parameters:
            grouped = name in _STACKED and stack and self._dims[parameter] > 2
            its_name = "grouped_mm" if grouped else name
            self._append(node, parameter, op, its_name, op.argument(node, op.input))

    def _append(self, node: fx.Node, parameter: int, op: Operation, name: str, given: Any) -> None:
        if parameter in self._names:
            shape = _shape(given) if isinstance(given, fx.Node) else None
            self._calls.append(_Call(parameter, node, name, op.affine, shape))

    def _by(self, node: fx.Node) -> str:
        """The module whose own forward runs a node. In a graph that is the model itself that is the
        model, unless the node calls a module."""
        return self._running(node)[-1]

    def _running(self, node: fx.Node) -> tuple[str, ...]:
        """The modules whose forward is running at a node, the outermost first."""
        paths = [""]
        if self._graph is not self._model:  # torch.export calls a second call `fc@1`
            stack = node.meta.get("nn_module_stack", {}).values()
            paths += [path.split("@")[0] for path, _ in stack]
        if node.op == "call_module":
            paths.append(str(node.target))
        names = [self._first_name.get(id(self._module(path)), path) for path in paths]
        return tuple(names)

    def _module(self, path: str) -> nn.Module | None:
        try:
            return self._model.get_submodule(path)
        except AttributeError:
            return None

    def _is_attention(self, path: str) -> bool:
        return isinstance(self._module(path), nn.MultiheadAttention)


def _shape(node: fx.Node) -> Shape | None:
    value = node.meta.get("val")
    shape = value.shape if isinstance(value, torch.Tensor) else node.meta.get("shape")
    return None if shape is None else tuple(shape)


def _ndim(node: fx.Node, graph: fx.GraphModule) -> int | None:
    """The number of dimensions of a node's value; None if the graph does not know."""
    if node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(graph)
        return value.ndim if isinstance(value, torch.Tensor) else None
    shape = _shape(node)
    return None if shape is None else len(shape)
