"""`predict_moments` against the enumeration of all masks of tiny models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import (
    LowRank,
    apply_dropconnect,
    predict_moments,
    set_inference,
    strip_dropconnect,
)

P = 0.2


def enumerated(
    model: nn.Module, x: Tensor, unit: str = "element", towards: dict[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and covariance (rows, outputs, outputs) over all masks of the weights of Linear layers. The
    examples share them: that changes nothing for one of them."""
    weights = {name: w.detach() for name, w in model.named_parameters() if w.ndim == 2}
    shapes = {
        name: {
            "element": w.shape,
            "input": (1, w.shape[1]),
            "output": (len(w), 1),
            "tensor": (1, 1),
        }[unit]
        for name, w in weights.items()
    }
    sizes = [math.prod(shape) for shape in shapes.values()]
    kept = torch.tensor(list(itertools.product((0.0, 1.0), repeat=sum(sizes))), dtype=x.dtype)
    probability = (P + (1 - 2 * P) * kept).prod(1)
    parts = zip(weights.items(), shapes.values(), kept.split(sizes, 1))
    anchors = {name: torch.zeros_like(w) for name, w in weights.items()} | (towards or {})
    masked = {
        name: anchors[name] + (w - anchors[name]) * m.view(-1, *shape) / (1 - P)
        for (name, w), shape, m in parts
    }

    def call(own: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, own, x).flatten(1)

    with torch.no_grad():
        u = torch.vmap(call)(masked)
    mean = torch.einsum("m,mbi->bi", probability, u)
    square = torch.einsum("m,mbi,mbj->bij", probability, u, u)
    return mean, square - mean[:, :, None] * mean[:, None]


def chain(act: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 2), act, nn.Linear(2, 1)).double().eval()


@pytest.mark.parametrize("unit", ["element", "input", "output", "tensor"])
def test_one_layer_is_exact(unit: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 2)).double(), torch.randn(4, 3, dtype=torch.float64)
    mean, covariance = enumerated(model, x, unit)
    apply_dropconnect(model, nn.Linear, p=P, unit=unit)
    form: Any
    for form in ("diagonal", "outputs", "full", 64):
        found = predict_moments(model, x, form, class_dim=None)
        torch.testing.assert_close(found.mean, mean)
        torch.testing.assert_close(found.variance, covariance.diagonal(dim1=1, dim2=2))
    both: tuple[Any, ...] = ("outputs", "full")
    for form in both:
        found = predict_moments(model, x, form, class_dim=None)
        torch.testing.assert_close(found.covariance, covariance)


@pytest.mark.parametrize("unit", ["element", "input", "output", "tensor"])
def test_two_linear_layers_are_exact(unit: str) -> None:
    """Without an activation nothing is Gaussian here, and yet both moments are exact."""
    model, x = chain(nn.Identity()), torch.randn(3, 4, dtype=torch.float64)
    mean, covariance = enumerated(model, x, unit)
    apply_dropconnect(model, nn.Linear, p=P, unit=unit)
    found = predict_moments(model, x, "full", class_dim=None)
    torch.testing.assert_close(found.mean, mean)
    if unit in ("element", "tensor"):
        torch.testing.assert_close(found.covariance, covariance)
    torch.testing.assert_close(found.variance, covariance.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("unit", ["element", "input", "output", "tensor"])
def test_toward_the_pretrained_weights(unit: str) -> None:
    model, x = chain(nn.Identity()), torch.randn(3, 4, dtype=torch.float64)
    pretrained = {name: p.detach().clone() for name, p in model.named_parameters() if p.ndim == 2}
    apply_dropconnect(model, nn.Linear, p=P, unit=unit, toward="pretrained")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    found = predict_moments(model, x, "full", class_dim=None)
    strip_dropconnect(model)
    mean, covariance = enumerated(model, x, unit, pretrained)
    torch.testing.assert_close(found.mean, mean)
    if unit in ("element", "output"):
        torch.testing.assert_close(found.covariance, covariance)
    size = covariance.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(found.variance, size, rtol=0.35, atol=0.0)


class MeanOfTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).mean(1)


@pytest.mark.parametrize("unit", ["element", "input", "output", "tensor"])
@pytest.mark.parametrize("dim", [0, "all"])
def test_tokens_share_a_mask_or_do_not(unit: str, dim: Any) -> None:
    """The mean over tokens: of one mask, what it makes of the mean token; of masks for each token, the
    covariance of one of them by their number."""
    torch.manual_seed(0)
    model, x = MeanOfTokens().double(), torch.randn(4, 5, 3, dtype=torch.float64)
    if dim == 0:
        _, wanted = enumerated(model.fc, x.mean(1), unit)
    else:
        each = [enumerated(model.fc, token, unit)[1] for token in x.unbind(1)]
        wanted = torch.stack(each).sum(0) / 25
    apply_dropconnect(model, nn.Linear, p=P, unit=unit, sampling="example", example_dim=dim)
    for form in ("outputs", "full"):
        found = predict_moments(model, x, form, class_dim=None)
        torch.testing.assert_close(found.covariance, wanted)


ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], float, float]] = {
    "relu": (nn.ReLU, 0.07, 0.17),
    "leaky_relu": (lambda: nn.LeakyReLU(0.1), 0.06, 0.15),
    "gelu": (nn.GELU, 0.03, 0.13),
    "gelu_tanh": (lambda: nn.GELU("tanh"), 0.03, 0.13),
    "silu": (nn.SiLU, 0.015, 0.1),
    "sigmoid": (nn.Sigmoid, 0.002, 0.02),
    "tanh": (nn.Tanh, 0.015, 0.11),
    "elu": (nn.ELU, 0.01, 0.07),
    "softplus": (nn.Softplus, 0.004, 0.02),
}
"""What is allowed with four inputs, of which a sum is far from Gaussian, as root mean squares over
inputs: the error of the mean as a share of the standard deviation, and that of the variance as a
share of it."""


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_tiny_networks_against_all_masks(name: str) -> None:
    act, of_mean, of_variance = ACTIVATIONS[name]
    model = chain(act())
    torch.manual_seed(3)
    x = torch.randn(24, 4, dtype=torch.float64)
    mean, covariance = enumerated(model, x)
    with torch.no_grad():
        plain = model(x)
    apply_dropconnect(model, nn.Linear, p=P)
    found = predict_moments(model, x, "full", class_dim=None)
    size = covariance[:, :, 0]
    error = ((found.mean - mean) / size.sqrt()).square().mean().sqrt()
    assert error < of_mean
    assert error < ((plain - mean) / size.sqrt()).square().mean().sqrt() / 3
    assert ((found.variance - size) / size).square().mean().sqrt() < of_variance


def test_an_embedding_is_exact() -> None:
    torch.manual_seed(0)
    model, index = nn.Embedding(5, 3), torch.tensor([[1, 2], [0, 4]])
    apply_dropconnect(model, nn.Embedding, p=P)
    found = predict_moments(model, index, class_dim=None)
    row = model.weight.detach()[index]
    torch.testing.assert_close(found.mean, row)
    torch.testing.assert_close(found.variance, 0.25 * row**2)


@pytest.mark.parametrize("unit", ["element", "input", "output", "tensor"])
def test_the_same_word_has_the_same_mask(unit: str) -> None:
    """Words 1 and 1 covary, of which the second is no other; exact for every form that knows it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 2), nn.Flatten()).double().eval()
    index = torch.tensor([[1, 2, 1], [0, 4, 3]])
    rows = model[0].weight.detach()[index]
    same = (index.unsqueeze(2) == index.unsqueeze(1)).double()
    alike = torch.eye(2).double()
    shares = {
        "element": torch.einsum("bst,de->bsdte", same, alike),
        "input": torch.einsum("bst,de->bsdte", same, torch.ones(2, 2).double()),
        "output": torch.einsum("bst,de->bsdte", torch.ones(2, 3, 3).double(), alike),
        "tensor": torch.ones(2, 3, 2, 3, 2).double(),
    }[unit]
    wanted = 0.25 * torch.einsum("bsd,bte,bsdte->bsdte", rows, rows, shares).view(2, 6, 6)
    apply_dropconnect(model, nn.Embedding, p=P, unit=unit)
    form: Any
    for form in ("full", "outputs"):
        found = predict_moments(model, index, form, class_dim=None)
        torch.testing.assert_close(found.covariance, wanted)
        torch.testing.assert_close(found.mean, rows.flatten(1))
    columns = predict_moments(model, index, 4096, class_dim=None).covariance
    assert isinstance(columns, LowRank)
    torch.testing.assert_close(columns.dense(), wanted, rtol=0.0, atol=0.08 * float(wanted.max()))
    with set_inference(model, "moments"):
        assert torch.equal(model(index), rows.flatten(1))
