"""In a fresh process: gradients of compiled models while graphs may compute again in backward what they
like, against finite differences of the compiled loss."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch
from torch import nn

from surgery import apply_dropconnect

OPTIONS: list[dict[str, Any]] = [{}, {"sampling": "example"}, {"sampling": "gaussian"}]
"""Of three layers of one model: each compiles for seconds."""


def directional() -> tuple[float, float]:
    """The derivative of a loss along a direction: by backward, and by differences."""
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    model = nn.Sequential(*layers).double()
    for name, options in zip("024", OPTIONS):
        apply_dropconnect(model, name, p=0.5, **options)
    compiled: Callable[..., Any] = torch.compile(model, backend="aot_eager_decomp_partition")
    x = torch.randn(4, 6, dtype=torch.float64)
    parameters = list(model.parameters())
    along = [torch.randn_like(parameter) for parameter in parameters]

    def loss(step: float) -> torch.Tensor:
        with torch.no_grad():
            for parameter, direction in zip(parameters, along):
                parameter.add_(direction, alpha=step)
        torch.manual_seed(7)
        return compiled(x).square().sum()

    value = loss(0.0)
    grads = torch.autograd.grad(value, parameters)
    slope = sum((grad * direction).sum() for grad, direction in zip(grads, along))
    ahead, back = loss(1e-6), loss(-2e-6)
    return float(slope), float((ahead - back) / 2e-6)


def main(budget: float) -> None:
    functorch.activation_memory_budget = budget
    slope, expected = directional()
    assert abs(slope - expected) < 1e-5 * abs(expected), (slope, expected)
    layer = apply_dropconnect(nn.Linear(4, 4), nn.Linear, p=0.5)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="activation_memory_budget is below 1"):
        torch.compile(layer, backend="eager", fullgraph=True)(torch.randn(2, 4))


if __name__ == "__main__":
    main(float(sys.argv[1]))
