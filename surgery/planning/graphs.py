"""How the core reaches graph surgery, which lives in `surgery.transforms` and which it may not import.

A parameter that is read by a `get_attr` node of a `torch.fx.GraphModule` is operated on in the graph.
The plugin of `torch.fx` registers a `GraphSurgeon` here when a plan is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from ..base.journal import Step
from ..base.plugins import load_plugins
from ..kinds.kind import Kind
from ..kinds.product import Product
from ..modules.node import DropConnectNode
from ..modules.state import SiteState
from ..spec.config import DropConnectConfig
from ..spec.errors import SurgeryError

Nodes = dict[tuple[int, str], DropConnectNode]
"""DropConnect modules by (id of the owner, name of the weight)."""


class Survey(Protocol):
    """What the graphs in a model read and call; changes nothing until `insert`."""

    def owns(self, module: nn.Module) -> bool:
        """Whether only nodes of a graph read the module's parameters: its forward never runs."""

    def is_read(self, module: nn.Module, name: str) -> bool:
        """Whether a node reads the parameter under this name."""

    def readers(self, module: nn.Module) -> list[nn.Module]:
        """The other modules whose graphs read a parameter of this one."""

    def kind_of(self, module: nn.Module) -> Kind:
        """The kind of a module that a graph owns: which of its weights are dropped by default, and what
        their dimensions mean. Its class does not tell it."""

    def kind(self, module: nn.Module, name: str) -> str:
        """How the graph reads a parameter: name of a kind."""

    def product(self, module: nn.Module, name: str) -> Product | None:
        """The product that one node makes of a weight, if that is all that is done with it."""

    def problem(self, module: nn.Module, name: str, config: DropConnectConfig) -> str | None:
        """Why the graphs do not allow this, naming the node, and what to do about it; or None."""

    def image(self) -> list[Step]:
        """Steps that put the whole model back, if `insert` does not end."""

    def insert(
        self, states: Sequence[tuple[nn.Module, Mapping[str, SiteState]]], nodes: Nodes
    ) -> None:
        """Put the nodes of these sites in. Cannot fail after `problem` said None for every site.

        Args:
            states: of the parameters, by module. Their parameters are renamed already.
            nodes: modules to use again, as `GraphSurgeon.nodes` returned them.
        """


class GraphSurgeon(Protocol):
    """Graph surgery on every `GraphModule` in a model."""

    def survey(self, model: nn.Module) -> Survey:
        """Look at all graphs."""

    def stuck(self, model: nn.Module) -> list[str]:
        """Why the nodes cannot be taken out: they were edited since."""

    def nodes(self, model: nn.Module) -> Nodes:
        """What the nodes call."""

    def image(self, model: nn.Module) -> list[Step]:
        """Steps that put the whole model back, if `remove` does not end."""

    def remove(self, model: nn.Module) -> None:
        """Take every node out, when the parameters that only graphs read have their plain names.
        Cannot fail if `stuck` found nothing."""


_surgeons: list[GraphSurgeon] = []


def register_graph_surgeon(surgeon: GraphSurgeon) -> None:
    """Called by the plugin."""
    _surgeons[:] = [surgeon]


def graph_surgeon(modules: Iterable[nn.Module]) -> GraphSurgeon | None:
    """The surgeon for the graphs among the modules of a model; None if there is none.

    Raises:
        SurgeryError: there are graphs, and the plugin is not installed.
    """
    graphs = (torch.fx.GraphModule, DropConnectNode)
    if not any(isinstance(module, graphs) for module in modules):
        return None
    if not _surgeons:
        load_plugins()
    if not _surgeons:
        raise SurgeryError("the model has traced graphs, and surgery.transforms is not installed")
    return _surgeons[0]
