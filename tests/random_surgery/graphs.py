"""Graphs made at random, and what is done to them.

Annotations are not put off here: `torch.fx` cannot pickle a graph with names for types.
"""

import copy
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..transforms.graphs import traced
from . import parts

OPS = {
    "linear": lambda x, w: F.linear(x, w),
    "linear-keywords": lambda x, w: F.linear(input=x, weight=w),
    "matmul": lambda x, w: x @ w,
    "method": lambda x, w: x.matmul(w),
    "transposed": lambda x, w: x @ w.t(),
    "einsum": lambda x, w: torch.einsum("nti,oi->nto", x, w),
    "scale": lambda x, w: x * w[0],
    "bias": lambda x, w: F.linear(x, w, w[1]),
    "twice": lambda x, w: F.linear(x, w) + F.linear(torch.tanh(x), w),
    "table": lambda x, w: F.embedding((x.detach().abs() * 97).long()[..., 0] % 6, w),
}

LEAVES = {
    "linear": lambda: nn.Linear(6, 6),
    "mlp": lambda: nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 6)),
    "conv": lambda: parts.ByTime(nn.Conv1d(6, 6, 3, padding=1, groups=2)),
    "encoder": lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True),
    "norm": lambda: nn.LayerNorm(6),
    "listed": parts.Listed,
}


class Net(nn.Module):
    """Operations one after another, on weights that may be shared or tied, and leaf modules."""

    def __init__(self, steps: list[tuple[str, str]], leaves: dict[str, nn.Module]) -> None:
        super().__init__()
        self.steps = steps
        for name, leaf in leaves.items():
            setattr(self, name, leaf)
        for _, name in steps:
            if name not in leaves and not hasattr(self, name):
                setattr(self, name, nn.Parameter(torch.randn(6, 6) / 3))

    def forward(self, x: Tensor) -> Tensor:
        for op, name in self.steps:
            used = getattr(self, name)
            x = torch.tanh(x + (used(x) if op == "call" else OPS[op](x, used)))
        return x


class Around(nn.Module):
    """A graph inside an ordinary module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(6, 6), inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.first(x))


def model(rng: Random) -> nn.Module:
    """A graph, perhaps inside of another or of a module."""
    torch.default_generator.manual_seed(rng.randrange(2**32))
    leaves: dict[str, nn.Module] = {}
    steps = []
    for number in range(rng.randint(1, 4)):
        if rng.random() < 0.3:
            leaves[f"leaf{number}"] = LEAVES[rng.choice(list(LEAVES))]()
            steps.append(("call", f"leaf{number}"))
        else:
            steps.append((rng.choice(list(OPS)), f"w{rng.randrange(3)}"))
    net = Net(steps, leaves).double()
    own = [name for name, _ in net.named_parameters(recurse=False)]
    if own and rng.random() < 0.3:
        net.twin = getattr(net, rng.choice(own))  # tied
        net.steps.append((rng.choice(["linear", "matmul"]), "twin"))
    dialect = "export" if rng.random() < 0.04 else "symbolic"
    graph: nn.Module = traced(net, dialect, torch.randn(2, 3, 6, dtype=torch.float64))
    graph = copy.deepcopy(graph)  # which loses what torch.export has put on this object alone
    if rng.random() < 0.15:
        graph = Around(graph).double()
        if rng.random() < 0.5 and dialect == "symbolic":
            graph = fx.symbolic_trace(graph)
    for parameter in graph.parameters():
        if rng.random() < 0.1:
            parameter.requires_grad_(False)
    return graph
