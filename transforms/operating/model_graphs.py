"""What the graphs in a model read and call: which parameters, by which nodes, as what."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx, nn

from surgery.kinds.kind import OTHER, Kind, kind_of
from surgery.kinds.product import COLUMN_PRODUCT, LINEAR_PRODUCT, Product
from surgery.modules.node import Call

from ..reading.operations import function_of, in_place, submodule
from ..reading.roles import Role, kind_of_roles, role_of
from ..reading.uses import ParameterNode, UsingNode, plain_name, uses


@dataclass(frozen=True)
class Replaced:
    """A matrix product that a DropConnect node can replace."""

    read: ParameterNode
    node: fx.Node
    call: Call
    product: Product | None
    """How it computes a pre-activation; None if it has no such form."""


class ModelGraphs:
    """What the graphs in a model read and call, at the time when this object is made."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.graphs = graphs_in(model)
        self.reads: dict[int, list[ParameterNode]] = {}
        """By the parameter's id."""
        self._ids: dict[tuple[int, str], int] = {}
        """Of parameters, by their owner's id and their plain name."""
        self._running = set[int]()
        self._mark(model)
        for graph_module in self.graphs:
            for node in graph_module.graph.nodes:
                self._note(graph_module, node)
        self.roles = self._roles()
        self._replaced: dict[tuple[int, str], Replaced] = {}
        self._find_replaced()

    def _mark(self, module: nn.Module) -> None:
        """Note that the forward of a module and of its children runs. That of a `GraphModule` runs its
        nodes, which are looked at one by one."""
        if id(module) in self._running or isinstance(module, fx.GraphModule):
            return
        self._running.add(id(module))
        for child in module.children():
            self._mark(child)

    def _note(self, graph_module: fx.GraphModule, node: fx.Node) -> None:
        if node.op == "call_module":
            self._mark(graph_module.get_submodule(str(node.target)))
        if node.op != "get_attr":
            return
        path, _, name = str(node.target).rpartition(".")
        owner = submodule(graph_module, path)
        parameter = None if owner is None else owner._parameters.get(name)
        if owner is not None and parameter is not None:
            read = ParameterNode(graph_module, node, owner, plain_name(owner, name))
            self.reads.setdefault(id(parameter), []).append(read)
            self._ids[read.key] = id(parameter)

    def _roles(self) -> dict[nn.Module, dict[str, Role]]:
        """What the graphs make of the parameters of each module, by name."""
        roles: dict[nn.Module, dict[str, Role]] = {}
        for reads in self.reads.values():
            role = role_of(use for read in reads for use in uses(read))
            for read in reads:
                roles.setdefault(read.owner, {})[read.name] = role
        return roles

    def kind_of(self, module: nn.Module) -> Kind:
        """The kind of a module that a graph owns. It is known here alone: the same module, given
        without its graph, is of the kind of its class."""
        kind, roles = kind_of(module), self.roles.get(module)
        return kind_of_roles(roles) if kind is OTHER and roles is not None else kind

    def owns(self, module: nn.Module) -> bool:
        """Whether only nodes of a graph read the module's parameters: its forward never runs."""
        return id(module) not in self._running

    def is_read(self, module: nn.Module, name: str) -> bool:
        """Whether a node reads the parameter under this name."""
        return (id(module), name) in self._ids

    def of(self, module: nn.Module, name: str) -> list[ParameterNode]:
        """All nodes that read a parameter, under any of its names."""
        return self.reads.get(self._ids.get((id(module), name), 0), [])

    def readers(self, module: nn.Module) -> list[nn.Module]:
        """The other modules whose graphs read a parameter of this one."""
        every = (read for reads in self.reads.values() for read in reads)
        graphs = dict.fromkeys(read.graph_module for read in every if read.owner is module)
        return [graph_module for graph_module in graphs if graph_module is not module]

    def kind(self, module: nn.Module, name: str) -> str:
        """How the graph reads a parameter: name of a kind."""
        return self.role(module, name).kind

    def role(self, module: nn.Module, name: str) -> Role:
        """What the graph makes of a parameter; `Role()` of one that no node reads."""
        return self.roles.get(module, {}).get(name, Role())

    def uses(self, module: nn.Module, name: str) -> list[UsingNode]:
        """Every node that computes with a parameter."""
        return [use for read in self.of(module, name) for use in uses(read)]

    def replaced(self, module: nn.Module, name: str) -> Replaced | None:
        """The one matrix product that reads a weight, if a DropConnect node can replace it."""
        return self._replaced.get((id(module), name))

    def _find_replaced(self) -> None:
        for reads in self.reads.values():
            read = reads[0]
            if len(reads) > 1 or not self.owns(read.owner) or len(read.node.users) > 1:
                continue
            for use in uses(read):
                call = _call(use) if use.value is read.node else None
                if call is not None:
                    replaced = Replaced(read, use.node, call, _product(use, call))
                    self._replaced[read.key] = replaced

    def product(self, module: nn.Module, name: str) -> Product | None:
        """The product that one node makes of a weight, if that is all that is done with it."""
        replaced = self.replaced(module, name)
        return None if replaced is None else replaced.product


def graphs_in(model: nn.Module) -> list[fx.GraphModule]:
    """Every graph in a model."""
    return [module for module in model.modules() if isinstance(module, fx.GraphModule)]


def _call(use: UsingNode) -> Call | None:
    """The call as a DropConnect node replaces it, if it is a matrix product that reads its weight."""
    node, op, root = use.node, use.operation, use.read.graph_module
    if node.op not in ("call_function", "call_method") or in_place(node, root):
        return None
    allowed = {*op.arguments, "alpha", "beta"}
    if op.name not in ("linear", "addmm", "matmul") or not allowed.issuperset(node.kwargs):
        return None
    weight, given = op.slot(node, op.weight), op.slot(node, op.input)
    if weight is None or given is None or op.argument(node, op.weight) is not use.value:
        return None
    bias = op.argument(node, op.bias)
    vector = isinstance(bias, fx.Node) and bias.op == "get_attr" and _dims(bias, root) == 1
    slot = op.slot(node, op.bias) if vector else None
    return Call(node.op, node.target, op.name, weight, given, slot)


def _dims(node: fx.Node, root: nn.Module) -> int:
    path, _, name = str(node.target).rpartition(".")
    value = getattr(root.get_submodule(path), name, None)
    return value.ndim if isinstance(value, Tensor) else 0


def _product(use: UsingNode, call: Call) -> Product | None:
    node, op = use.node, use.operation
    added = op.argument(node, op.bias) is not None
    if _dims(use.value, use.read.graph_module) != 2 or (added and call.bias is None):
        return None
    if op.name == "linear":
        return LINEAR_PRODUCT
    plain = not {"alpha", "beta"} & set(node.kwargs)
    function = function_of(node, use.read.graph_module)
    known = op.order == "in_out" and function in ("addmm", "matmul", "mm", "rmatmul")
    return COLUMN_PRODUCT if known and plain else None
