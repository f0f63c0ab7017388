"""The plugin of `torch.fx`: how the core's verbs reach the graphs in a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

from torch import fx, nn

from surgery.base.journal import Step
from surgery.kinds.kind import follows_weight
from surgery.kinds.product import Demand
from surgery.modules import SiteState
from surgery.moments.torch_functions import ALIASING
from surgery.planning.graphs import Nodes
from surgery.spec.config import DropConnectConfig

from ..reading.operations import function_of, in_place
from ..reading.uses import UsingNode
from . import remove as removal
from .graph_image import image_with_graphs
from .insert import combined_bias, insert, node_module
from .model_graphs import ModelGraphs


class GraphSurvey(ModelGraphs):
    """The answer to `planning.graphs.Survey`: graphs of a model that can refuse, and take nodes."""

    def problem(self, module: nn.Module, name: str, config: DropConnectConfig) -> str | None:
        """Why the graphs do not allow this, naming the node, and what to do about it; or None."""
        uses = self.uses(module, name)
        if self.owns(module) and not uses:
            return f"no node of the graph uses it{self._elsewhere(module, name)}; exclude it"
        if not self.of(module, name):
            return None
        return (
            _taken(module, name)
            or next(filter(None, (_unusable(use) for use in uses)), None)
            or self._apart_from_weight(module, name, config)
            or self._no_product(module, name, config, uses)
        )

    def _elsewhere(self, module: nn.Module, name: str) -> str:
        reads = self.reads.get(id(module._parameters.get(name)), [])
        return f" under this name (but as {str(reads[0].node.target)!r})" if reads else ""

    def _weight_of(self, module: nn.Module, name: str) -> str | None:
        """The weight that a bias goes with."""
        roles = self.roles.get(module, {})
        return next((weight for weight, role in roles.items() if role.bias == name), None)

    def _is_combined(self, module: nn.Module, bias: str, weight: str) -> bool:
        read = combined_bias(self, module, weight)
        return read is not None and read.name == bias

    def _apart_from_weight(
        self, module: nn.Module, name: str, config: DropConnectConfig
    ) -> str | None:
        """One mask for weight and bias needs one node for both."""
        weight = self._weight_of(module, name)
        if weight is None or not config.bias or not follows_weight(config.unit):
            return None
        if self._is_combined(module, name, weight):
            return None
        return (
            f"unit={config.unit!r} with bias=True needs one node for weight and bias, and "
            f"{_named(self.uses(module, name))} cannot be replaced by one; use bias=False or "
            "unit='element'"
        )

    def _no_product(
        self, module: nn.Module, name: str, config: DropConnectConfig, uses: list[UsingNode]
    ) -> str | None:
        demand = Demand.of(config)
        if demand.mode is None:
            return None
        replaced = self.replaced(module, name)
        if replaced is not None and replaced.product is not None:
            return demand.refused(replaced.product)
        weight = self._weight_of(module, name)
        bias = weight is not None and self._is_combined(module, name, weight)
        otherwise = "needs one matrix product that alone reads the weight, and here it is used by "
        return demand.refused(None, otherwise + _named(uses), bias=bias)

    def image(self) -> list[Step]:
        """Steps that put the whole model back."""
        return image_with_graphs(self.model.modules())

    def insert(
        self, states: Sequence[tuple[nn.Module, Mapping[str, SiteState]]], nodes: Nodes
    ) -> None:
        """Put the nodes of these sites in."""
        insert(self, states, nodes)


def _taken(module: nn.Module, name: str) -> str | None:
    taken = node_module(name)
    if hasattr(module, taken):
        return f"the module already has an attribute {taken!r}; rename that first"
    return None


def _unusable(use: UsingNode) -> str | None:
    """Why a node cannot take a masked weight."""
    node, writer = use.node, _writer(use)
    if writer is not None:
        return (
            f"node {writer.name!r} writes into it, and a masked weight is new in every forward; "
            "exclude it"
        )
    if use.operation.name != "embedding":
        return None
    weight_first = bool(node.args) and node.args[0] is use.value
    given = {**dict(zip(_ATEN_EMBEDDING if weight_first else _EMBEDDING, node.args)), **node.kwargs}
    if given.get("max_norm") is not None:
        return (
            f"node {node.name!r} has max_norm, which rewrites the weight; trace it without max_norm"
        )
    if given.get("sparse"):
        return (
            f"node {node.name!r} has a sparse gradient, which cannot pass a mask; use sparse=False"
        )
    return None


def _writer(use: UsingNode) -> fx.Node | None:
    """The node that writes into a parameter, or into a view of it, if there is one."""
    root = use.read.graph_module
    todo = [(use.node, use.value)]
    while todo:
        node, value = todo.pop()
        if not node.args or node.args[0] is not value:
            continue
        if in_place(node, root):
            return node
        if function_of(node, root) in ALIASING:
            todo += [(user, node) for user in node.users]
    return None


_EMBEDDING = tuple(inspect.signature(nn.functional.embedding).parameters)
_ATEN_EMBEDDING = ("weight", "input", "padding_idx", "scale_grad_by_freq", "sparse")


def _named(uses: list[UsingNode]) -> str:
    nodes = dict.fromkeys((use.node.name, use.operation.name) for use in uses)
    listed = [f"node {name!r} ({operation})" for name, operation in nodes]
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")


class Surgeon:
    """Graph surgery on every `GraphModule` in a model; see `surgery.planning.graphs.GraphSurgeon`."""

    survey = GraphSurvey
    stuck = staticmethod(removal.stuck)
    nodes = staticmethod(removal.nodes)

    def image(self, model: nn.Module) -> list[Step]:
        return image_with_graphs(model.modules())

    def remove(self, model: nn.Module) -> None:
        removal.remove(model)
