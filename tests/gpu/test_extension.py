"""The extension launches the kernels that Python has launched before, with the same bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from surgery import apply_dropconnect

from ..internals import compile_extension, taken_by_extension, without_extension

CASES = list(
    itertools.product(
        (
            (torch.float32, None),
            (torch.bfloat16, None),
            (torch.float16, None),
            (torch.float32, torch.bfloat16),
            (torch.float32, torch.float16),
        ),
        ("zero", "pretrained"),
        ((5, 48, 33, True), (8, 48, 32, False)),
    )
)


def step(model: nn.Module, x: Tensor, narrow: torch.dtype | None) -> list[Tensor]:
    torch.manual_seed(7)
    model.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast("cuda", dtype=narrow, enabled=narrow is not None):
        output = model(x)
    output.float().square().sum().backward()
    grads = [one.grad for one in (x, *model.parameters())]
    return [output.detach(), *(one for one in grads if one is not None)]


@pytest.mark.parametrize(("dtypes", "toward", "sizes"), CASES)
def test_bits(cuda: str, dtypes, toward: str, sizes, monkeypatch) -> None:
    dtype, narrow = dtypes
    rows, inputs, outputs, bias = sizes
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=bias)).to(cuda, dtype)
    apply_dropconnect(model, nn.Linear, p=0.3, toward=toward)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    x = torch.randn(2, rows, inputs, device=cuda, dtype=dtype)
    with monkeypatch.context() as patch:
        without_extension(patch)
        expected = step(model, x, narrow)
    assert compile_extension()  # and so it takes the kernels that are there by now
    taken = taken_by_extension(monkeypatch)
    found = step(model, x, narrow)
    assert taken == [True]
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("sampling", ["example", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 48), (3, 2, 48), (2, 33, 48)], ids=str)
@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_bits_of_other_samplings(cuda: str, sampling, dtype, shape, toward, monkeypatch) -> None:
    """At the second step: what Python has launched at the first is repeated."""
    model = nn.Sequential(nn.Linear(48, 32)).to(cuda, dtype)
    options = {"sampling": sampling, "toward": toward}
    apply_dropconnect(model, nn.Linear, p=0.3, example_dim=0, **options)
    x = torch.randn(shape, device=cuda, dtype=dtype)
    with monkeypatch.context() as patch:
        without_extension(patch)
        expected = step(model, x, None)
    assert compile_extension()
    step(model, x, None)
    assert compile_extension()  # and so it takes the launches of the first step
    taken = taken_by_extension(monkeypatch, sampling)
    found = step(model, x, None)
    assert taken == [True]
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("narrow", [None, torch.bfloat16])
def test_the_mask_of_a_compiled_product_is_that_of_its_gradient(cuda: str, narrow) -> None:
    layer = apply_dropconnect(nn.Linear(32, 48, bias=False).to(cuda), nn.Linear, p=0.5)
    (weight,) = layer.parameters()
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.eye(32, device=cuda)
    for _ in range(2):
        with torch.autocast("cuda", dtype=narrow, enabled=narrow is not None):
            used = compiled(x).t()
        (grad,) = torch.autograd.grad(used.sum(), weight)
        kept = used != 0
        assert torch.equal(kept, grad != 0)
        assert 0.4 < kept.float().mean() < 0.6
        assert torch.equal(used.detach(), ((weight * 2).to(used.dtype) * kept).detach())


@pytest.mark.parametrize("unit", ["input", "output", "tensor"])
def test_weights_that_share_mask_entries_are_left_to_python(
    cuda: str, unit: str, monkeypatch
) -> None:
    model = apply_dropconnect(nn.Linear(48, 33).to(cuda), nn.Linear, p=0.3, unit=unit)
    x = torch.randn(5, 48, device=cuda)
    assert compile_extension()
    taken = taken_by_extension(monkeypatch)
    found = step(model, x, None)
    assert taken == [False]
    with monkeypatch.context() as patch:
        without_extension(patch)
        assert all(map(torch.equal, found, step(model, x, None)))
