"""Dropout, stochastic depth and mixout are DropConnect with another `unit` and `toward`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import apply_dropconnect

from ..expected import keep, keep_examples

P = 0.3


def twins(make: Any, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A layer, and the same layer with DropConnect."""
    plain, layer = make().double(), make().double()
    layer.load_state_dict(plain.state_dict())
    return plain, apply_dropconnect(layer, type(layer), p=P, **options)


class GivenMask:
    """In place of the random numbers of a peer: the mask that DropConnect drew."""

    def __init__(self, monkeypatch: Any, mask: Tensor) -> None:
        self.mask = mask
        monkeypatch.setattr(Tensor, "bernoulli_", lambda tensor, p: self.fill(tensor, p))
        monkeypatch.setattr(torch, "rand", self.uniform)

    def fill(self, tensor: Tensor, p: float) -> Tensor:
        assert p == 1 - P
        return tensor.copy_(self.mask.reshape(tensor.shape))

    def uniform(self, size: Any, **options: Any) -> Tensor:
        """Numbers that `floor(keep_prob + number)` turns into the mask."""
        return (self.mask * 0.99).reshape(size)


def inverted_dropout(x: Tensor, mask: Tensor) -> Tensor:
    """What `nn.Dropout` computes with a mask (aten/native/Dropout.cpp)."""
    return x * (mask / (1 - P))


def stochastic_depth(input: Tensor, p: float, mode: str, training: bool = True) -> Tensor:
    """torchvision.ops.stochastic_depth, version 0.24, less its checks."""
    survival_rate = 1.0 - p
    size = [input.shape[0]] + [1] * (input.ndim - 1) if mode == "row" else [1] * input.ndim
    noise = torch.empty(size, dtype=input.dtype, device=input.device)
    noise = noise.bernoulli_(survival_rate)
    if survival_rate > 0.0:
        noise.div_(survival_rate)
    return input * noise


def drop_connect(inputs: Tensor, p: float, training: bool) -> Tensor:
    """lukemelas/EfficientNet-PyTorch, efficientnet_pytorch/utils.py."""
    if not training:
        return inputs
    batch_size = inputs.shape[0]
    keep_prob = 1 - p
    random_tensor: Any = keep_prob
    random_tensor += torch.rand([batch_size, 1, 1, 1], dtype=inputs.dtype, device=inputs.device)
    binary_tensor = torch.floor(random_tensor)
    return inputs / keep_prob * binary_tensor


def test_input_unit_is_dropout_of_the_input(keys: list[Tensor]) -> None:
    plain, layer = twins(lambda: nn.Linear(6, 4), unit="input", sampling="example")
    x = torch.randn(5, 6, dtype=torch.float64)
    found = layer(x)
    mask = keep(keys[0], P, 5, 6)
    torch.testing.assert_close(found, plain(inverted_dropout(x, mask)), rtol=1e-8, atol=1e-8)


def test_the_formula_of_dropout_is_that_of_torch() -> None:
    """`inverted_dropout` with the mask that `nn.Dropout` drew is what it returned."""
    x = torch.randn(50, 6, dtype=torch.float64)
    dropped = nn.Dropout(P)(x)
    assert torch.equal(dropped, inverted_dropout(x, (dropped != 0).double()))


def test_input_unit_has_the_distribution_of_dropout(check_mean: Any) -> None:
    """Mean, variance and covariance of the pre-activations."""
    plain, layer = twins(lambda: nn.Linear(6, 3), unit="input", sampling="example")
    x = torch.randn(6, dtype=torch.float64).expand(2000, 6)
    mean = plain(x[:1]).detach()

    def products(u: Tensor) -> Tensor:
        gap = u - mean
        return torch.cat([gap, (gap[:, :, None] * gap[:, None]).flatten(1)], 1).detach()

    ours, theirs = products(layer(x)), products(plain(nn.Dropout(P)(x)))
    error = (ours.var(0) / 2000 + theirs.var(0) / 2000).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)) / error).abs().max() < 5


def test_input_unit_of_a_convolution_is_dropout_of_channels(keys: list[Tensor]) -> None:
    """`nn.Dropout2d` on the input."""
    plain, layer = twins(lambda: nn.Conv2d(4, 3, 2), unit="input", sampling="example")
    x = torch.randn(5, 4, 4, 4, dtype=torch.float64)
    found = layer(x)
    mask = keep(keys[0], P, 5, 4, 1, 1)
    torch.testing.assert_close(found, plain(inverted_dropout(x, mask)), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_output_unit_is_dropout_of_pre_activations(bias: bool, keys: list[Tensor]) -> None:
    plain, layer = twins(lambda: nn.Linear(6, 4), unit="output", sampling="example", bias=bias)
    x = torch.randn(5, 6, dtype=torch.float64)
    found = layer(x)
    mask = keep(keys[0], P, 5, 4)
    u = F.linear(x, plain.weight)
    inside, outside = (plain.bias, 0) if bias else (0, plain.bias)
    wanted = inverted_dropout(u + inside, mask) + outside
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("peer", [stochastic_depth, drop_connect])
def test_tensor_unit_is_stochastic_depth(peer: Any, keys: list[Tensor], monkeypatch: Any) -> None:
    """Of a branch that ends in the layer, bias and all: the same numbers from the same mask."""
    make = lambda: nn.Conv2d(4, 3, 2)  # noqa: E731
    plain, layer = twins(make, unit="tensor", sampling="example", bias=True)
    x = torch.randn(16, 4, 4, 4, dtype=torch.float64)
    found = layer(x)
    mask = keep(keys[0], P, 16)
    assert 0 < mask.sum() < 16
    GivenMask(monkeypatch, mask)
    options = {"mode": "row"} if peer is stochastic_depth else {}
    wanted = peer(plain(x), p=P, training=True, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


def test_the_copy_of_stochastic_depth_is_torchvisions() -> None:
    ops = pytest.importorskip("torchvision.ops", exc_type=ImportError)
    x = torch.randn(8, 3, 4)
    results = []
    for peer in (stochastic_depth, ops.stochastic_depth):
        torch.manual_seed(0)
        results.append(peer(x, p=P, mode="row", training=True))
    assert torch.equal(*results)


def mixout(input: Tensor, target: Tensor, mask: Tensor, p: float) -> Tensor:
    """bloodwass/mixout, mixout.py: `noise` is 1 where kept."""
    return ((1 - mask) * target + mask * input - p * target) / (1 - p)


@pytest.mark.parametrize("sampling", ["batch", "example"])
def test_toward_pretrained_is_mixout(sampling: str, keys: list[Tensor]) -> None:
    layer = nn.Linear(6, 4).double()
    target = layer.weight.detach().clone()
    apply_dropconnect(layer, nn.Linear, p=P, toward="pretrained", sampling=sampling)
    with torch.no_grad():
        layer.weight += torch.randn_like(target)
    x = torch.randn(5, 6, dtype=torch.float64)
    found = layer(x)
    weight = layer.weight.detach().clone().requires_grad_()
    masks = keep_examples(keys[0], P, 1 if sampling == "batch" else 5, 4, 6).expand(5, 4, 6)
    used = mixout(weight, target, masks, P)
    wanted = torch.einsum("ei,eoi->eo", x, used) + layer.bias
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)
    # Autograd of the formula has the 1 / (1 - p) that the released backward leaves out.
    found.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-8, atol=1e-8)
    released = (masks * x[:, None]).sum(0)
    torch.testing.assert_close(layer.weight.grad, released / (1 - P), rtol=1e-8, atol=1e-8)
