"""Layers for which torch has no style of tensor parallelism, in whole numbers as in `integers.py`: one
whose weight is stored in x out, as transformers' Conv1D, and experts whose weights are one tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from surgery.kinds.kind import reads_of, register_kind
from surgery.kinds.product import COLUMN_PRODUCT, product_of
from surgery.kinds.torch_kinds import LINEAR, columns


class Columns(nn.Module):
    """7 x 5: neither halves."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(7, 5))
        self.bias = nn.Parameter(torch.empty(5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Experts(nn.Module):
    """Three of them, each from 7 to 5."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(3, 5, 7))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.gate_up_proj.mT)


product = product_of(Columns, product=COLUMN_PRODUCT)
reads = reads_of(Columns, names=("weight", "bias"))
register_kind(
    LINEAR.but(name="columns", classes=(Columns,), axes=columns, product=product, reads=reads)
)

CASES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "columns": (Columns, {}),
    "columns, bias": (Columns, {"bias": True}),
    "columns, inputs": (Columns, {"unit": "input"}),
    "columns, outputs": (Columns, {"unit": "output", "bias": True}),
    "columns, per example": (Columns, {"sampling": "example"}),
    "columns, bias, per example": (Columns, {"sampling": "example", "bias": True}),
    "columns, inputs, per example": (Columns, {"sampling": "example", "unit": "input"}),
    "columns, outputs, per example": (Columns, {"sampling": "example", "unit": "output"}),
    "columns, per row": (Columns, {"sampling": "example", "example_dim": "all"}),
    "experts": (Experts, {}),
    "experts, pretrained": (Experts, {"toward": "pretrained"}),
}
CUTS = (None, 0, 1, 2)
"""By which dimension of the weight; None leaves it whole in every process."""


def built(case: str) -> nn.Module:
    """The same weights at every call."""
    generator = torch.Generator().manual_seed(0)
    module = CASES[case][0]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randint(-4, 5, parameter.shape, generator=generator))
    return module


def targets(case: str) -> str:
    return "weight" if CASES[case][0] is Columns else "gate_up_proj"


def inputs() -> Tensor:
    """Three examples of four rows."""
    return (torch.arange(84).view(3, 4, 7) % 9 - 4).float()


def passed(module: nn.Module, x: Any) -> dict[str, Tensor]:
    """The output and the gradients of one training step, whole, by plain name."""
    torch.manual_seed(3)
    out = module(x)
    out = out.full_tensor() if hasattr(out, "full_tensor") else out
    (out * torch.arange(5)).sum().backward()
    found = {"output": out.detach()}
    for name, parameter in module.named_parameters():
        grad: Any = parameter.grad
        whole = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        found[name.replace("_raw", "")] = whole.clone()
    return found
