"""Small networks with one trait each, which captures of graphs must cope with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Branches(nn.Module):
    """Which branch runs depends on the data: neither traced nor exported."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.up(x)) if x.sum() > 0 else torch.tanh(self.down(x))


class WantsLabels(nn.Module):
    """A forward that cannot do without labels."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        if labels.sum() > 0:
            return F.cross_entropy(self.fc(x), labels)
        return self.fc(x)


class Restless(nn.Module):
    """Changes everything that a forward can change."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(4))
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.mean(0)
        self.kept = self.fc(x)
        self.made = torch.rand(4)
        y = self.drop(self.norm(self.kept)) + torch.rand(4)
        return F.dropout(y, training=self.training)


class Functional(nn.Module):
    """Bare parameters, read as they are, through views, and more than once."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
        self.b, self.packed = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(8, 4))
        self.stack, self.table = nn.Parameter(torch.randn(3, 4, 4)), nn.Parameter(torch.randn(7, 4))
        self.idle = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(F.linear(x, self.w))
        x = torch.relu((x @ self.v).view(-1, 4) + self.b)
        x = F.linear(x, self.w).tanh()
        first, second = self.packed.chunk(2)
        x = F.linear(x, first) * torch.sigmoid(F.linear(x, second))
        x = F.linear(x, self.stack[1]).relu()
        x = F.linear(x, torch.cat([first, second]).to(x.dtype))
        return F.glu(x) + self.table[torch.tensor([1, 2])]
