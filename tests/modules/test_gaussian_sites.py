"""`sampling="gaussian"`: each pre-activation is drawn with the mean and variance it has over masks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import apply_dropconnect, set_p

P = 0.4


def enumerated(
    layer: nn.Module, x: Tensor, unit: str, bias: bool, anchors: tuple[Any, Any]
) -> tuple[Tensor, Tensor]:
    """Mean and variance of the pre-activation over every mask of a tiny Linear."""
    weight, offset = layer.weight, layer.bias
    rows = len(weight)
    entries = rows if unit == "output" else weight.numel()
    count = entries + (rows if bias and unit == "element" else 0)
    towards = [torch.zeros_like(t) if a is None else a for t, a in zip((weight, offset), anchors)]
    mean = square = torch.zeros(())
    for bits in itertools.product((0.0, 1.0), repeat=count):
        chance = (1 - P) ** sum(bits) * P ** (count - sum(bits))
        mask = torch.tensor(bits, dtype=weight.dtype)
        of_weight = mask[:entries].view(rows, -1)
        of_bias = mask[entries:] if unit == "element" else mask[:rows]
        used = towards[0] + of_weight * (weight - towards[0]) / (1 - P)
        added = towards[1] + of_bias * (offset - towards[1]) / (1 - P) if bias else offset
        u = x @ used.t() + added
        mean, square = mean + chance * u, square + chance * u**2
    return mean, square - mean**2


def tiny(**options: Any) -> tuple[nn.Module, tuple[Any, Any]]:
    layer = nn.Linear(3, 2).double()
    anchors = layer.weight.detach().clone(), layer.bias.detach().clone()
    apply_dropconnect(layer, nn.Linear, p=P, sampling="gaussian", **options)
    with torch.no_grad():
        for raw in layer.parameters():
            raw += torch.randn_like(raw)
    return layer, anchors if options.get("toward") == "pretrained" else (None, None)


@pytest.mark.parametrize("unit", ["element", "output"])
@pytest.mark.parametrize("toward", ["zero", "pretrained"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_moments_are_those_of_all_masks(
    unit: str, toward: str, bias: bool, check_mean: Any
) -> None:
    layer, anchors = tiny(unit=unit, toward=toward, bias=bias)
    x = torch.randn(3, dtype=torch.float64)
    with torch.no_grad():
        mean, variance = enumerated(layer, x, unit, bias, anchors)
        big = x.expand(4000, 3)
        check_mean(lambda: layer(x), mean, 3000)
        check_mean(lambda: (layer(x) - mean) ** 2, variance, 3000)
        u = layer(big)
    correlation = torch.corrcoef(u.t())[0, 1]  # every pre-activation has noise of its own
    assert abs(correlation) < 5 / 4000**0.5


@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_gradient_flows_through_mean_and_variance(toward: str) -> None:
    layer, _ = tiny(bias=True, toward=toward)
    parameters = dict(layer.named_parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        torch.manual_seed(3)
        return torch.func.functional_call(layer, dict(zip(parameters, values)), (x,))

    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *parameters.values()))


def test_no_nan_where_the_variance_is_zero() -> None:
    layer = apply_dropconnect(nn.Linear(3, 2), nn.Linear, sampling="gaussian", toward="pretrained")
    x = torch.zeros(2, 3, requires_grad=True)
    u = layer(x)  # no input, and no step away from the anchor
    u.sum().backward()
    assert torch.equal(u, layer.bias.expand_as(u))
    grads = x.grad, *(weight.grad for weight in layer.parameters())
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("p", [0, 1])
def test_nothing_and_everything(p: int) -> None:
    layer = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    plain = layer(x)
    apply_dropconnect(layer, nn.Linear, p=p, sampling="gaussian")
    assert torch.equal(layer(x), plain if p == 0 else layer.bias.expand_as(plain))


@pytest.mark.parametrize("make", [lambda: nn.Conv1d(4, 6, 3), lambda: nn.Conv1d(4, 6, 3, groups=2)])
@pytest.mark.parametrize("unit", ["element", "output"])
def test_convolution_has_the_moments_of_masks(make: Any, unit: str, check_mean: Any) -> None:
    """Against masks per batch, whose moments are the definition."""
    layer, x = make().double(), torch.randn(1, 4, 5, dtype=torch.float64)
    twin = make().double()
    twin.load_state_dict(layer.state_dict())
    apply_dropconnect(layer, nn.Conv1d, p=P, unit=unit, bias=True)
    apply_dropconnect(twin, nn.Conv1d, p=P, unit=unit, bias=True, sampling="gaussian")
    mean = layer.eval()(x).detach()
    layer.train()
    draws = [torch.stack([one(x).detach() for _ in range(1000)]) for one in (layer, twin)]
    squares = [(drawn - mean) ** 2 for drawn in draws]
    error = ((squares[0].var(0) + squares[1].var(0)) / 1000).sqrt()
    assert ((squares[0].mean(0) - squares[1].mean(0)) / error).abs().max() < 5
    check_mean(lambda: twin(x), mean, 500)


def test_reproducible_and_fresh_each_time() -> None:
    layer = apply_dropconnect(nn.Linear(3, 2), nn.Linear, sampling="gaussian")
    x = torch.randn(4, 3)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)


def test_autocast() -> None:
    layer = apply_dropconnect(nn.Linear(64, 8), nn.Linear, p=P, sampling="gaussian", bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        u = layer(torch.randn(4, 64))
    assert u.dtype == torch.bfloat16
    assert u.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_compiled_and_p_changes_freely() -> None:
    torch._dynamo.reset()
    layer = apply_dropconnect(nn.Linear(5, 4), nn.Linear, p=P, sampling="gaussian", bias=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 5)
    for p in (P, 0.2, 0.7):
        set_p(layer, p)
        results = []
        with torch.compiler.set_stance("fail_on_recompile" if p != P else "default"):
            for run in (layer, compiled):
                torch.manual_seed(5)
                u = run(x)
                results.append((u, *torch.autograd.grad(u.square().sum(), [*layer.parameters()])))
        torch.testing.assert_close(*results)
