"""What tests do with a model: a step, its gradients, comparisons."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from surgery import plain_state_dict

from .zoo.subjects import Subject


def raw(site: str) -> str:
    """Key of a site's stored parameter."""
    return f"{site}_raw"


def anchor(site: str) -> str:
    """Key of a site's pretrained weight."""
    return f"{site}_anchor"


def step(model: Callable[[Tensor], Tensor], x: Tensor, seed: int | None = 7) -> Tensor:
    """One forward and backward pass; the output. Gradients add up in the parameters."""
    if seed is not None:
        torch.manual_seed(seed)
    out = model(x)
    out.float().square().sum().backward()
    return out.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by plain name; every parameter must have one."""
    found = plain_state_dict(model, {name: p.grad for name, p in model.named_parameters()})
    missing = [name for name, grad in found.items() if grad is None]
    assert not missing, f"no gradient for {missing}"
    return {name: grad.clone() for name, grad in found.items()}


def step_gradients(model: nn.Module, x: Tensor, seed: int | None = 7) -> dict[str, Tensor]:
    """Gradients by plain name, and the output, of one pass from clean gradients."""
    model.zero_grad()
    out = step(model, x, seed)
    return {**gradients(model), "output": out}


def whole_step(
    model: nn.Module, x: Tensor, call: Callable[[nn.Module, Tensor], Tensor] = lambda m, x: m(x)
) -> list[Tensor | None]:
    """The output, all gradients, and random numbers, which tell where it leaves the generator."""
    torch.manual_seed(2)
    output = call(model, x)
    model.zero_grad()
    x.grad = None
    output.backward(torch.randn(output.shape).to(output.dtype))
    return [output.detach(), x.grad, *(one.grad for one in model.parameters()), torch.rand(2)]


def same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    """And the same dtype and strides; or None both."""
    if one is None or other is None:
        return one is other
    return torch.equal(one, other) and one.stride() == other.stride() and one.dtype == other.dtype


def assert_same(
    found: dict[str, Tensor], expected: dict[str, Tensor], rounding: float = 0.0
) -> None:
    """Equal keys and bitwise equal values, or values that differ by rounding only."""

    def same(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, rtol=rounding, atol=rounding) if rounding else torch.equal(a, b)

    assert list(found) == list(expected)
    differing = [name for name in found if not same(found[name], expected[name])]
    assert not differing, f"differ: {differing}"


def rounding_without_grad(subject: Subject) -> float:
    """0 if the plain model's forward is the same to the bit under `no_grad`. On some processors that of
    nn.LSTM is not: torch takes another kernel."""
    model, x = subject.plain(), subject.inputs()
    with torch.no_grad():
        inferred = model(x)
    return 0.0 if torch.equal(inferred, model(x)) else 1e-6


def skip_unless_autocast(subject: Subject) -> None:
    """On some processors torch has no bfloat16 LSTM, with or without DropConnect."""
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            subject.plain()(subject.inputs())
    except RuntimeError as error:
        pytest.skip(f"the plain model fails under autocast here: {error}")


def assert_drops(model: nn.Module, x: Tensor) -> None:
    """Two forward calls from different seeds differ: masks act."""
    with torch.no_grad():
        torch.manual_seed(3)
        first = model(x)
        torch.manual_seed(4)
        assert not torch.equal(first, model(x))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return copy.deepcopy(dict(model.state_dict()))
