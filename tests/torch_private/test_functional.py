"""Canaries of what stands behind functional calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import stateless

from surgery.torch_private import functional

from .canary import canary


@pytest.mark.filterwarnings("ignore::FutureWarning")
@canary(functional, "torch.nn.utils.stateless._functional_call")
def test_every_functional_call_comes_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the module and the tensors first, also for who imported the public function before."""
    from torch.func import functional_call

    monkeypatch.setattr(stateless, "_functional_call", stateless._functional_call)
    seen = []

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def taught(module: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append((module, set(tensors)))
            tensors = {name: tensor * 2 for name, tensor in tensors.items()}
            return call(module, tensors, *args, **kwargs)

        return taught

    functional.wrap_functional_call(wrap)
    layer, x = nn.Linear(2, 2, bias=False), torch.eye(2)
    found = functional_call(layer, {"weight": torch.ones(2, 2)}, (x,))
    assert found.tolist() == [[2, 2], [2, 2]]
    found = stateless.functional_call(layer, {"weight": torch.ones(2, 2)}, (x,))
    assert found.tolist() == [[2, 2], [2, 2]]
    assert seen == [(layer, {"weight"})] * 2


@canary(functional, "super(torch.autograd.Function, _).apply")
def test_a_function_is_applied_without_questions() -> None:
    """It is what the public way ends with."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.factor = 2
            return x * ctx.factor

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return ctx.factor * grads[0]

    x = torch.ones(3, requires_grad=True)
    for apply in (Twice.apply, functional.apply_of(Twice)):
        found = apply(x)
        (grad,) = torch.autograd.grad(found.sum(), x)
        assert found.tolist() == grad.tolist() == [2, 2, 2]
        assert type(found.grad_fn).__name__ == "TwiceBackward"
