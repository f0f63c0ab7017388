"""Values and gradients on the device are those of the CPU, with the same keys."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import apply_dropconnect, hold_masks, mc_predict, set_p, strip_dropconnect
from surgery.ops import Law, Layout, drop_weight, key_from_seed

from ..internals import note_launches

Restart = Callable[[], None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def moved(model: nn.Module) -> nn.Module:
    """With weights that have left their pretrained values."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25).add_(0.01)
    return model


def step(model: nn.Module, x: Tensor, device: str) -> dict[str, Tensor]:
    """Output and gradients of a copy on a device; brought to the CPU."""
    model = copy.deepcopy(model).to(device)
    x = x.detach().to(device)
    if x.is_floating_point():
        x.requires_grad_()
    out = model(x)
    out = out[0] if isinstance(out, tuple) else out
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape).to(device)
    out.backward(grad)
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    found |= {"out": out.detach(), "x": x.grad}
    return {name: value.cpu() for name, value in found.items() if value is not None}


def assert_same_on(device: str, restart: Restart, model: nn.Module, x: Tensor, **near: Any) -> None:
    restart()
    expected = step(model, x, "cpu")
    restart()
    found = step(model, x, device)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], **near, msg=lambda m, n=name: f"{n}: {m}"
        )


NEAR: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
"""Sums of a few dozen float32 products in another order."""


UNITS = ["element", "input", "output", "tensor"]
SAMPLED = [(sampling, unit) for sampling in ("batch", "example") for unit in UNITS]
SAMPLED += [("gaussian", "element"), ("gaussian", "output")]


@pytest.mark.parametrize("toward", ["zero", "pretrained"])
@pytest.mark.parametrize(("sampling", "unit"), SAMPLED)
def test_every_sampling_unit_and_toward(
    device: str, same_draws: Restart, sampling: str, unit: str, toward: str
) -> None:
    model = nn.Sequential(nn.Linear(19, 24), nn.ReLU(), nn.Linear(24, 5))
    apply_dropconnect(model, nn.Linear, p=0.3, sampling=sampling, unit=unit, toward=toward)
    assert_same_on(device, same_draws, moved(model), torch.randn(7, 19), **NEAR)


@pytest.mark.parametrize("sampling", ["batch", "example", "gaussian"])
def test_kernels_run_and_not_the_formulas(device: str, sampling: str, monkeypatch) -> None:
    launches: list[bool] = []
    note_launches(monkeypatch, lambda name, ran: launches.append(ran))
    layer = nn.Linear(48, 40).to(device)
    apply_dropconnect(layer, nn.Linear, p=0.3, sampling=sampling)
    layer(torch.randn(8, 48, device=device, requires_grad=True)).sum().backward()
    assert len(launches) >= 2  # forward and backward
    assert all(launches)


@pytest.mark.parametrize("sampling", ["batch", "example", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(device: str, same_draws: Restart, sampling: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(32, 48)).to(dtype)
    apply_dropconnect(model, nn.Linear, p=0.3, sampling=sampling, toward="pretrained")
    near = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
    assert_same_on(device, same_draws, moved(model), torch.randn(9, 32).to(dtype), **near)


@pytest.mark.parametrize("rows", [1, 5, 33])
def test_an_example_of_several_rows(device: str, same_draws: Restart, rows: int) -> None:
    model = nn.Sequential(nn.Linear(20, 36))
    apply_dropconnect(model, nn.Linear, p=0.4, sampling="example", toward="pretrained")
    assert_same_on(device, same_draws, moved(model), torch.randn(3, rows, 20), **NEAR)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.ConvTranspose2d(4, 6, 3),
        nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
    ],
    ids=["Conv1d", "Conv2d", "ConvTranspose2d", "channels-last"],
)
def test_convolutions(device: str, same_draws: Restart, layer: nn.Module) -> None:
    """In float64, which cuDNN does not round to TF32."""
    model = nn.Sequential(copy.deepcopy(layer).double())
    apply_dropconnect(model, type(layer), p=0.3, toward="pretrained")
    size = (3, 4, 11) if isinstance(layer, nn.Conv1d) else (3, 4, 11, 9)
    assert_same_on(device, same_draws, moved(model), torch.randn(size).double())


def test_an_embedding(device: str, same_draws: Restart) -> None:
    model = nn.Sequential(nn.Embedding(13, 8), nn.Linear(8, 3))
    apply_dropconnect(model, ["0", "1"], p=0.3)
    assert_same_on(device, same_draws, moved(model), torch.randint(13, (5, 4)), **NEAR)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_recurrent_layers(
    device: str, same_draws: Restart, kind: type[nn.Module], toward: str
) -> None:
    """On a GPU by cuDNN, whose warning of weights in pieces would be an error here."""
    model = kind(12, 16, num_layers=2, bidirectional=True).double()
    apply_dropconnect(model, kind, p=0.4, toward=toward)
    assert_same_on(device, same_draws, moved(model), torch.randn(5, 3, 12).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_do_not_warn(cuda: str, kind: type[nn.Module], dtype: torch.dtype) -> None:
    model = kind(16, 32, num_layers=3, device=cuda, dtype=dtype)
    apply_dropconnect(model, kind, p=0.5)
    x = torch.randn(5, 3, 16, device=cuda, dtype=dtype)
    for _ in range(2):
        model(x)[0].float().square().sum().backward()
    if (
        dtype == torch.bfloat16
    ):  # of which `flatten_parameters` knows nothing: the plain model warns
        return
    model.eval()
    model(x)
    strip_dropconnect(model)
    model.train()(x)[0].sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_masks_have_the_bits_of_the_cpu(device: str, p: float, dtype: torch.dtype) -> None:
    weight, key = torch.randn(61, 57).to(dtype), key_from_seed(3)
    law = {place: Law.of(p, torch.device(place), dtype) for place in ("cpu", device)}
    for layout in (Layout.elements(weight.numel()), Layout.shared((61, 57), (0,))):
        for anchor in (None, weight.flip(0).contiguous()):
            expected = drop_weight(weight, key, law["cpu"], layout, anchor)
            there = None if anchor is None else anchor.to(device)
            for of_key in (key, key.to(device)):
                found = drop_weight(weight.to(device), of_key, law[device], layout, there)
                assert torch.equal(found.cpu(), expected)


def test_gradients_have_the_mask_of_the_forward(device: str) -> None:
    layer = apply_dropconnect(nn.Linear(48, 32, bias=False).to(device), nn.Linear, p=0.5)
    x = torch.randn(8, 48, device=device, requires_grad=True)
    grad = torch.randn(8, 32, device=device)
    with hold_masks(layer):
        used = layer(torch.eye(48, device=device)).t().detach()
        layer(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ used, **NEAR)
    expected = torch.where(used == 0, 0, 2 * grad.t() @ x.detach())
    torch.testing.assert_close(layer.weight.grad, expected, **NEAR)
    assert torch.equal(layer.weight.grad == 0, used == 0)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.Identity()], ids=str)
def test_moments(device: str, activation: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(40, 30), activation, nn.Linear(30, 4))
    apply_dropconnect(model, ["0"], p=0.3, inference="moments")
    model = moved(model).eval()  # type: ignore[assignment]
    x = torch.randn(17, 40)
    with torch.no_grad():
        expected = model(x)
        found = copy.deepcopy(model).to(device)(x.to(device))
    torch.testing.assert_close(found.cpu(), expected, **NEAR)


def test_mc_predict(device: str, same_draws: Restart) -> None:
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))
    apply_dropconnect(model, nn.Linear, p=0.3)
    model.eval()
    x = torch.randn(6, 12)
    same_draws()
    expected = mc_predict(model, x, samples=8)
    same_draws()
    found = mc_predict(copy.deepcopy(model).to(device), x.to(device), samples=8)
    assert found.mean.device.type == device
    torch.testing.assert_close(found.mean.cpu(), expected.mean, **NEAR)


def test_a_model_that_moves_and_changes_its_dtype(device: str, same_draws: Restart) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4))
    apply_dropconnect(model, nn.Linear, p=0.3, toward="pretrained")
    moved(model)
    x = torch.randn(5, 16)
    same_draws()
    expected = model(x).detach()
    for place, dtype in (
        (device, torch.float32),
        (device, torch.bfloat16),
        ("cpu", torch.float32),
        (device, torch.float64),
        (device, torch.float32),
    ):
        model.to(place, dtype)
        same_draws()
        out = model(x.to(place, dtype))
        out.sum().backward()
        assert out.device.type == place
        torch.testing.assert_close(out.detach().cpu().float(), expected, rtol=0.05, atol=0.05)
    set_p(model, 0.0)
    assert torch.equal(model(x.to(device)), strip_dropconnect(model)(x.to(device)))
