"""A model in whole numbers: sums are exact, so every order of summation, and every way to cut a weight
across processes, gives the same bits. With p=0.5 what is kept is doubled, which is exact too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SITES = ("words.weight", "up.weight", "down.weight", "head.weight")


class Net(nn.Module):
    """Two layers that tensor parallelism cuts, by outputs and by inputs, between two that it may cut or
    leave whole. 13 features do not halve."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 13)
        self.down = nn.Linear(13, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.down(torch.relu(self.up(self.words(ids)))))
        return out


def net() -> Net:
    """The same weights at every call."""
    generator = torch.Generator().manual_seed(0)
    model = Net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-4, 5, parameter.shape, generator=generator))
    return model


def train_a_little(model: nn.Module) -> None:
    """Move the weights away from their anchors."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)


def ids() -> Tensor:
    """Four sequences of five words."""
    return torch.arange(20).view(4, 5) % 11


def whole(value: Any) -> Tensor:
    """A tensor that processes share, gathered."""
    found: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return found.detach().clone()


def step(model: nn.Module) -> dict[str, Tensor]:
    """The output and the gradients of one training step, by plain name."""
    model.zero_grad()
    torch.manual_seed(3)
    out = model(ids())
    out = out.full_tensor() if hasattr(out, "full_tensor") else out
    (out * torch.arange(5)).sum().backward()
    grads = {
        name.replace("_raw", ""): whole(p.grad)
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    return {"output": out.detach(), **grads}
