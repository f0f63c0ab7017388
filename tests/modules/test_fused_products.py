"""Convolutions and transformers' Conv1D by the extension: the same bits as by the general way, where
the forward of the class runs with a masked weight."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers.pytorch_utils import Conv1D

from surgery import apply_dropconnect, mc_predict

from ..internals import taken_by_extension, without_extension
from ..steps import same_bits, whole_step

pytestmark = pytest.mark.compiler

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), padding=(0, 1), bias=False), (2, 4, 9, 8)),
    "conv2d of groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), (2, 4, 9, 8)),
    "conv2d by depth": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), (2, 8, 9, 8)),
    "conv2d of one place": (lambda: nn.Conv2d(8, 16, 1), (2, 8, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 3), (2, 2, 5, 5, 5)),
    "columns": (lambda: Conv1D(5, 6), (2, 3, 6)),
    "columns of a matrix": (lambda: Conv1D(5, 6), (3, 6)),
}
FLOATS = [torch.float32, torch.bfloat16, torch.float64]


@pytest.fixture(autouse=True)
def taken(extension: bool, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    assert extension
    return taken_by_extension(monkeypatch)


def operated(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    model = apply_dropconnect(nn.Sequential(CASES[name][0]().to(dtype)), "*", p=0.4, **options)
    with torch.no_grad():
        for parameter in model.parameters():  # away from the anchor
            parameter.add_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("toward", ["zero", "pretrained"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_bits(name: str, dtype: torch.dtype, toward: Any, taken: list[bool]) -> None:
    model = operated(name, dtype, toward=toward)
    for of_x, of_weight in ((True, True), (True, False), (False, True)):
        x = torch.randn(CASES[name][1], dtype=dtype).requires_grad_(of_x)
        next(model.parameters()).requires_grad_(of_weight)
        taken.clear()
        found = whole_step(model, x)
        assert taken == [True]
        with pytest.MonkeyPatch.context() as patch:
            without_extension(patch)
            assert all(map(same_bits, found, whole_step(model, x)))


@pytest.mark.parametrize("name", ["conv2d of groups", "columns"])
def test_second_derivatives(name: str, taken: list[bool]) -> None:
    model = operated(name, torch.float64)
    x = torch.randn(CASES[name][1], dtype=torch.float64, requires_grad=True)

    def seeded(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        torch.manual_seed(1)
        names = [name for name, _ in model.named_parameters()]
        return torch.func.functional_call(model, dict(zip(names, (weight, bias))), (x,)).tanh()

    leaves = [one.detach().requires_grad_() for one in model.parameters()]
    assert torch.autograd.gradcheck(seeded, (x, *leaves))

    def penalised() -> list[Tensor]:
        torch.manual_seed(3)
        (first,) = torch.autograd.grad(model(x).tanh().sum(), x, create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), [x, *model.parameters()]))

    taken.clear()
    found = penalised()
    assert taken == [True]
    with pytest.MonkeyPatch.context() as patch:
        without_extension(patch)
        assert all(map(torch.allclose, found, penalised()))


@pytest.mark.parametrize("name", ["conv2d of groups", "conv1d", "columns"])
def test_many_gradients_at_once(name: str) -> None:
    model = operated(name)
    x = torch.randn(CASES[name][1], requires_grad=True)
    output = model(x)
    wanted, grads = [x, *model.parameters()], torch.randn(3, *output.shape)
    every = torch.autograd.grad(output, wanted, grads, is_grads_batched=True, retain_graph=True)
    for index, grad in enumerate(grads):
        alone = torch.autograd.grad(output, wanted, grad, retain_graph=True)
        assert all(torch.allclose(a[index], b, atol=1e-5) for a, b in zip(every, alone))


def test_a_weight_that_was_changed_meanwhile() -> None:
    for name in ("conv2d", "columns"):
        model = operated(name)
        output = model(torch.randn(CASES[name][1], requires_grad=True))
        with torch.no_grad():
            next(model.parameters()).add_(1)
        with pytest.raises(RuntimeError, match="has been modified"):
            output.sum().backward()


def test_gradients_of_unusual_form() -> None:
    model = operated("conv2d of groups")
    x = torch.randn(2, 4, 9, 8, requires_grad=True)
    shape = model(x).shape
    unusual = (
        torch.ones(1, 1, 1, 1).expand(shape),
        torch.randn(shape).to(memory_format=torch.channels_last),
        torch.complex(torch.ones(shape), torch.ones(shape)).conj().imag,
    )

    def all_of(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(4)
        wanted = [x, *model.parameters()]
        return [one for g in unusual for one in torch.autograd.grad(model(x), wanted, g)]

    found = all_of(model)
    with pytest.MonkeyPatch.context() as patch:
        without_extension(patch)
        assert all(map(torch.equal, found, all_of(model)))


@pytest.mark.parametrize("name", ["conv2d", "columns"])
def test_checkpoints_may_begin_in_python_and_end_here(name: str, taken: list[bool]) -> None:
    """The extension may come into use between a forward and its recomputation."""
    model = operated(name)
    x = torch.randn(CASES[name][1], requires_grad=True)
    shapes: list[list[Any]] = []

    def kept() -> None:
        shapes.append([])
        with saved_tensors_hooks(lambda t: shapes[-1].append(t.shape) or t, lambda t: t):
            model(x)

    kept()
    expected = whole_step(model, x)
    torch.manual_seed(2)
    with pytest.MonkeyPatch.context() as patch:
        without_extension(patch)
        kept()
        torch.manual_seed(2)
        with set_checkpoint_early_stop(False):
            output = checkpoint(model, x, use_reentrant=False)
    assert shapes[0] == shapes[1]
    model.zero_grad()
    taken.clear()
    with set_checkpoint_early_stop(False):
        output.backward(torch.randn(output.shape))
    assert taken == [True]
    found = [one.grad for one in model.parameters()]
    assert all(map(same_bits, found, expected[2:]))


def test_saved_on_cpu_and_freed() -> None:
    model = operated("conv2d")
    x = torch.randn(2, 4, 9, 8, requires_grad=True)
    expected = whole_step(model, x)
    torch.manual_seed(2)
    with save_on_cpu():
        output = model(x)
    model.zero_grad()
    output.backward(torch.randn(output.shape))
    assert same_bits(next(model.parameters()).grad, expected[2])
    with pytest.raises(RuntimeError, match="second time"):
        output.sum().backward()


def test_channels_last(taken: list[bool]) -> None:
    model = operated("conv2d of groups")
    x = torch.randn(2, 4, 9, 8).to(memory_format=torch.channels_last).requires_grad_()
    found = whole_step(model, x)
    assert taken == [True]
    with pytest.MonkeyPatch.context() as patch:
        without_extension(patch)
        assert all(map(same_bits, found, whole_step(model, x)))


class Own(nn.Conv2d):
    """Has the forward of its base, and another product."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return 2 * super()._conv_forward(input, weight, bias)


def patched(layer: nn.Conv2d) -> nn.Conv2d:
    """As those do who want images without seams."""

    def around(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)

    layer._conv_forward = around  # type: ignore[assignment]
    return layer


def with_an_integer(layer: nn.Conv2d) -> nn.Conv2d:
    layer.stride = 2  # type: ignore[assignment]
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        Own(4, 6, 3),
        nn.Conv2d(4, 6, 3, padding="same"),
        with_an_integer(nn.Conv2d(4, 6, 3)),
        patched(nn.Conv2d(4, 6, 3)),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        nn.ConvTranspose2d(4, 6, 3),
        nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
    ],
    ids=lambda layer: f"{type(layer).__name__}-{layer.stride}-{layer.padding}-{layer.padding_mode}",
)
def test_other_products_go_the_general_way(layer: nn.Conv2d, taken: list[bool]) -> None:
    x = torch.randn(2, 4, 9, 8)
    model = apply_dropconnect(copy.deepcopy(layer), nn.Module, p=0.4)
    output = model(x)
    assert True not in taken
    output.sum().backward()
    with torch.no_grad():
        assert torch.equal(model.eval()(x), layer(x))


def test_inputs_that_go_the_general_way(taken: list[bool]) -> None:
    model = operated("conv2d of groups")
    x = torch.randn(2, 4, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    assert model(x[0]).shape == (6, 5, 4)
    with torch.no_grad():
        model(x)
    assert True not in taken
    with pytest.raises(RuntimeError, match="to have 4 channels, but got 3"):
        model(x[:, :3])
    columns = operated("columns")
    taken.clear()
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        columns(torch.randn(2, 6, 3).transpose(1, 2))  # as the plain one
    assert columns(torch.randn(6)).shape == (5,)
    assert True not in taken


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_it_too(copied: Callable[[nn.Module], nn.Module], taken: list[bool]) -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))
    model = copied(apply_dropconnect(layers, "*", p=0.4))
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    assert taken == [True, True]


def test_several_samples_at_once_have_masks_of_their_own() -> None:
    model = apply_dropconnect(nn.Sequential(nn.Conv2d(3, 4, 3)), "*", p=0.4)
    found = mc_predict(model, torch.randn(2, 3, 4, 4), samples=4, class_dim=None)
    assert (found.variance > 0).all()


def test_its_mean_is_that_of_the_plain_weight(taken: list[bool]) -> None:
    """Over masks, by the standard error of that mean."""
    layer = nn.Conv2d(3, 4, 3)
    model = apply_dropconnect(copy.deepcopy(layer), nn.Conv2d, p=0.3)
    x = torch.randn(2, 3, 5, 5)
    drawn = torch.stack([model(x).detach() for _ in range(4000)])
    assert all(taken)
    error = (drawn.mean(0) - F.conv2d(x, layer.weight, layer.bias)) / (drawn.std(0) / 4000**0.5)
    assert error.detach().abs().max() < 4.5  # of 72 entries
