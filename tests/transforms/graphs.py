"""What the tests of graph surgery share: models in both dialects, and all that a graph is.

Annotations are not put off here: `torch.fx` cannot pickle a graph with names for types.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import surgery.transforms.operating.graph_surgeon  # noqa: F401  (what the entry point of torch.fx imports)

from ..helpers import Snapshot

DIALECTS = ("symbolic", "export")
both_dialects = pytest.mark.parametrize("dialect", DIALECTS)

P = 0.4

about_torch = pytest.mark.filterwarnings("ignore:The tensor attributes", "ignore:.*LeafSpec")
"""What torch.export and its modules warn of by themselves."""


class Functional(nn.Module):
    """Weights as attributes, read by functions."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 4))
        self.b = nn.Parameter(torch.randn(5))
        self.v = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(F.linear(x, self.w, self.b)), self.v)


class Mixed(nn.Module):
    """Leaf modules of several kinds, and weights as attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 4)
        self.fc1 = nn.Linear(4, 6)
        self.w = nn.Parameter(torch.randn(6, 5))
        self.lstm = nn.LSTM(5, 3, num_layers=2, batch_first=True, bidirectional=True)
        self.conv = nn.Conv1d(6, 4, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm(4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.relu(self.fc1(self.table(tokens)))
        y, _ = self.lstm(torch.tanh(x @ self.w))
        return self.norm(self.conv(y.transpose(1, 2)).transpose(1, 2))


class Tied(nn.Module):
    """One parameter under two names, read by an embedding and by a head; a weight with two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 4))
        self.head = nn.Parameter(torch.empty(0))
        self.head = self.table
        self.both = nn.Parameter(torch.randn(4, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.embedding(tokens, self.table)
        x = F.linear(x, self.both) + x @ self.both.t()
        return F.linear(x, self.head)


def tokens() -> Tensor:
    return torch.arange(10).view(2, 5) % 7


MODELS: dict[str, tuple[type[nn.Module], Any]] = {
    "functional": (Functional, lambda: torch.randn(2, 4)),
    "mixed": (Mixed, tokens),
    "tied": (Tied, tokens),
}


def traced(model: nn.Module, dialect: str, *inputs: Any) -> fx.GraphModule:
    """The graph module of a model in one dialect."""
    if dialect == "symbolic":
        return fx.symbolic_trace(model)
    with torch.no_grad():
        module = torch.export.export(model.eval(), inputs, strict=False).module()
    assert isinstance(module, fx.GraphModule)
    return module


def train(model: nn.Module, mode: bool = True) -> None:
    """Also for modules of exported programs, which refuse `train` and `eval`."""
    for module in model.modules():
        module.training = mode


def rows(graph: fx.Graph) -> list[Any]:
    """All that `print_tabular` shows, and the rest of what a graph is, exactly."""
    return [
        (id(n), n.op, n.name, n.target, str(n.args), str(n.kwargs), dict(n.meta), n.type)
        for n in graph.nodes
    ]


def table(graph: fx.Graph) -> list[tuple[str, ...]]:
    """What `print_tabular` shows: the columns opcode, name, target, args and kwargs."""
    return [(n.op, n.name, str(n.target), str(n.args), str(n.kwargs)) for n in graph.nodes]


def unnamed(graph: fx.Graph) -> list[Any]:
    """A graph without the names of its nodes, which unpickling makes anew."""
    place = {node: i for i, node in enumerate(n for n in graph.nodes)}
    return [
        (n.op, str(n.target), str(fx.map_arg((n.args, n.kwargs), place.__getitem__)))
        for n in graph.nodes
    ]


def whole(model: nn.Module) -> list[Any]:
    """Every graph in a model, and its code."""
    graphs = [module for module in model.modules() if isinstance(module, fx.GraphModule)]
    return [(rows(module.graph), module.code) for module in graphs]


class GraphSnapshot(Snapshot):
    """A snapshot of a model with graphs, whose code is compared by its text."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        for _, _, _, _, attributes in self.modules:
            for rebuilt in ("_code", "_lineno_map", "_prologue_start"):
                attributes.pop(rebuilt, None)
        self.graphs = whole(model)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GraphSnapshot) and (
            super().__eq__(other) and self.graphs == other.graphs
        )


def node(graph_module: fx.GraphModule, name: str) -> fx.Node:
    return next(n for n in graph_module.graph.nodes if n.name == name)


def names(graph_module: fx.GraphModule) -> list[str]:
    return [n.name for n in graph_module.graph.nodes]


def by_hand(build: Any, **parameters: Tensor) -> fx.GraphModule:
    """A graph written node by node: `build(graph, placeholder)` returns the output."""
    root, graph = nn.Module(), fx.Graph()
    for name, value in parameters.items():
        setattr(root, name, nn.Parameter(value) if value.is_floating_point() else value)
    x = graph.placeholder("x")
    graph.output(build(graph, x))
    return fx.GraphModule(root, graph)
