"""Products whose weights share mask entries: by the extension, by Python, and the general way give the
same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from surgery import apply_dropconnect

from ..internals import taken_by_extension, without_extension
from ..steps import same_bits, whole_step

pytestmark = pytest.mark.compiler

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (7, 6)),
    "linear of sequences": (lambda: nn.Linear(6, 5, bias=False), (2, 3, 6)),
    "conv2d of groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 9, 8)),
    "columns": (lambda: Conv1D(5, 6), (2, 3, 6)),
}
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
UNITS = ["output", "input", "tensor"]


@pytest.fixture(autouse=True)
def taken(extension: bool, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    assert extension
    first = apply_dropconnect(nn.Linear(2, 2), nn.Linear, p=0.5, unit="output")
    for _ in range(2):  # by Python, which compiles the kernel, and gives it to the extension
        first(torch.randn(2, 2))
    return taken_by_extension(monkeypatch)


def operated(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    model = apply_dropconnect(CASES[name][0]().to(dtype), nn.Module, p=0.4, **options)
    with torch.no_grad():
        for parameter in model.parameters():  # away from the anchor
            parameter.add_(torch.randn_like(parameter))
    return model


def by_name(model: nn.Module, x: Tensor) -> Tensor:
    """A call that no fused forward takes."""
    output: Tensor = model(**{"x" if isinstance(model, Conv1D) else "input": x})
    return output


@pytest.mark.parametrize("toward", ["zero", "pretrained"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", CASES)
def test_bits(name: str, unit: Any, dtype: torch.dtype, toward: Any, taken: list[bool]) -> None:
    model = operated(name, dtype, unit=unit, toward=toward)
    for of_x, of_weight in ((True, True), (True, False), (False, True)):
        x = torch.randn(CASES[name][1], dtype=dtype).requires_grad_(of_x)
        next(model.parameters()).requires_grad_(of_weight)
        taken.clear()
        found = whole_step(model, x)
        assert taken == [dtype != torch.float16]
        assert all(map(same_bits, found, whole_step(model, x, by_name)))
        with pytest.MonkeyPatch.context() as patch:
            without_extension(patch)
            assert all(map(same_bits, found, whole_step(model, x)))


@pytest.mark.parametrize("name", ["linear of sequences", "columns"])
def test_second_derivatives(name: str, taken: list[bool]) -> None:
    model = operated(name, torch.float64, unit="input")
    x = torch.randn(CASES[name][1], dtype=torch.float64, requires_grad=True)

    def penalised(call: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        (first,) = torch.autograd.grad(call(model, x).tanh().sum(), x, create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), [x, *model.parameters()]))

    found = penalised(lambda model, x: model(x))
    assert taken == [True]
    assert all(map(torch.allclose, found, penalised(by_name)))


def test_a_weight_alone(taken: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding, whose words drop as a whole."""
    masks = taken_by_extension(monkeypatch, "mask")
    model = apply_dropconnect(nn.Embedding(7, 4), nn.Embedding, p=0.5, unit="input")
    words = torch.tensor([[1, 2, 3], [4, 5, 6]])

    def once() -> list[Tensor]:
        torch.manual_seed(5)
        model.zero_grad()
        output = model(words)
        output.square().sum().backward()
        (weight,) = model.parameters()
        assert weight.grad is not None
        return [output.detach(), weight.grad, torch.rand(2)]

    found = once()
    assert masks == [True]
    with pytest.MonkeyPatch.context() as patch:
        without_extension(patch)
        assert all(map(torch.equal, found, once()))
    assert {len(row.unique()) for row in (found[0] == 0)[0]} == {1}


def test_a_resized_weight_is_refused_alike(taken: list[bool]) -> None:
    model = operated("linear", unit="output")
    raw = next(iter(model.parameters()))
    raw.data = torch.randn(9, 6)
    model.bias.data = torch.randn(9)
    for call in (lambda m, x: m(x), by_name):
        with pytest.raises(RuntimeError, match="invalid for input of size 54"):
            call(model, torch.randn(7, 6))
