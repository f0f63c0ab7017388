"""`predict_moments`: functions of several entries, against quadrature over the noise that enters."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import apply_dropconnect, predict_moments
from surgery.ops import gauss_hermite
from surgery.ops.blocks import BLOCK

NOISE = 0.01
"""Variance of both inputs."""


class After(nn.Module):
    """Six values that two inputs move together, and a function of them."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.fc, self.function = nn.Linear(2, 6), function

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.function(self.fc(x))
        return found


def made(function: Any) -> tuple[After, Tensor]:
    torch.manual_seed(1)
    return After(function).double().eval(), torch.randn(5, 2, dtype=torch.float64)


@torch.no_grad()
def integrated(model: nn.Module, x: Tensor) -> Tensor:
    """The mean over the noise of both inputs, by quadrature."""
    nodes = torch.tensor(gauss_hermite(12), dtype=x.dtype)
    pairs = itertools.product(nodes.tolist(), repeat=2)
    parts = [
        own * its * model(x + math.sqrt(NOISE) * x.new_tensor([one, other]))
        for (one, own), (other, its) in pairs
    ]
    return torch.stack(parts).sum(0)


def sharper(u: Tensor) -> Tensor:
    return F.softmax(2 * u, -1)


def squared_lengths(u: Tensor) -> Tensor:
    return torch.matmul(u.unsqueeze(-2), u.unsqueeze(-1)).flatten(1)


JOINT: dict[str, tuple[Any, float, float]] = {
    "layer_norm": (lambda u: F.layer_norm(u, (6,)), 0.2, 0.3),
    "rms_norm": (lambda u: F.rms_norm(u, (6,)), 0.2, 0.3),
    "softmax": (sharper, 0.12, 0.3),
    "length": (squared_lengths, 1e-9, 0.3),
}
"""What is left of the error of the mean, as a share of that of the plain weights: with exact columns,
and with a sketch of 64, whose own error is about sqrt(2 / 64)."""


@pytest.mark.parametrize("name", JOINT)
def test_expectations_know_how_entries_covary(name: str) -> None:
    """Two numbers move all entries: taken as independent, these would give another expectation."""
    function, exact, sketched = JOINT[name]
    model, x = made(function)
    mean = integrated(model, x)
    with torch.no_grad():
        plain = model(x)

    def left(form: Any) -> Tensor:
        found = predict_moments(model, x, form, input_variance=NOISE, class_dim=None)
        assert not found.settled
        return (found.mean - mean).norm() / (plain - mean).norm()

    assert left("full") < exact
    assert left(64) < sketched
    assert left("diagonal") > left("full")


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.1), nn.Tanh()]
)
def test_the_largest_is_taken_before_what_rises(activation: nn.Module) -> None:
    torch.manual_seed(0)
    first, pool = nn.Conv1d(2, 3, 1), nn.MaxPool1d(2)
    x = torch.randn(4, 2, 6)
    one, other = (
        predict_moments(nn.Sequential(first, *order), x, "full", input_variance=0.3, class_dim=None)
        for order in ((activation, pool), (pool, activation))
    )
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.variance, other.variance)


def test_a_falling_function_is_not_put_after_the_largest() -> None:
    torch.manual_seed(0)
    x, pool = torch.randn(64, 1, 2), nn.MaxPool1d(2)
    model = nn.Sequential(nn.LeakyReLU(-0.5), pool)
    found = predict_moments(model, x, input_variance=0.01, class_dim=None)
    with torch.no_grad():
        drawn = torch.stack([model(x + 0.1 * torch.randn_like(x)) for _ in range(2000)])
    gap = (found.mean - drawn.mean(0)) / (drawn.std(0) / math.sqrt(2000))
    assert gap.square().mean() < 2
    assert torch.isclose(found.variance.sum(), drawn.var(0).sum(), rtol=0.05)


def test_an_activation_in_place_has_its_closed_form() -> None:
    """What it writes over is what it is a function of."""
    torch.manual_seed(0)
    layers, x = [nn.Linear(4, 3), nn.Linear(3, 2)], torch.randn(5, 4)
    one, other = (
        predict_moments(
            nn.Sequential(layers[0], nn.ReLU(inplace=how), layers[1]),
            x,
            input_variance=0.5,
            class_dim=None,
        )
        for how in (False, True)
    )
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.variance, other.variance)


def test_the_larger_of_values_that_nearly_agree() -> None:
    """A sketch knows the difference of two values with a relative error: where they move together, the
    larger one is nearly either. Against draws."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.Unflatten(1, (4, 2)), nn.MaxPool1d(2), nn.Flatten())
    with torch.no_grad():
        weight = model[0].weight.view(4, 2, 2)
        weight[:, 1] = weight[:, 0] + 0.05 * torch.randn(4, 2)
        model[0].bias.zero_()
    x, count = 0.02 * torch.randn(3, 2), 40_000
    with torch.no_grad():
        noise = torch.randn(count, 1, 2)
        drawn = model((x + noise).flatten(0, 1)).view(count, 3, 4)
    error = 4 * drawn.std(0) / math.sqrt(count)
    full = predict_moments(model, x, "full", input_variance=1.0, class_dim=None)
    assert ((full.mean - drawn.mean(0)).abs() < error).all()
    sketch = predict_moments(model, x, 16, input_variance=1.0, class_dim=None)
    gap = (full.mean - model(x)).norm()
    assert (sketch.mean - full.mean).norm() < 0.4 * gap + error.norm()
    torch.testing.assert_close(full.variance, drawn.var(0), rtol=0.05, atol=0)


@pytest.mark.parametrize("act", [nn.ReLU(), nn.LeakyReLU(0.2), nn.GELU(), nn.Tanh()])
def test_a_variance_that_varies(act: nn.Module) -> None:
    """Three inputs vary, and with them the noise that the site adds: against quadrature over both. The
    mean is far nearer than that with noise of the same size that does not vary."""
    torch.manual_seed(0)
    layer, p = nn.Linear(3, 40).double(), 0.4
    x, spread = torch.tensor([[2.0, -1.5, 1.0]], dtype=torch.float64), 0.3
    weight, bias, ratio = layer.weight.detach(), layer.bias.detach(), p / (1 - p)
    value, share = torch.tensor(gauss_hermite(12), dtype=torch.float64).unbind(1)
    inputs = x + math.sqrt(spread) * torch.cartesian_prod(value, value, value)
    weights = torch.cartesian_prod(share, share, share).prod(1)
    deviation = (ratio * inputs.square() @ weight.square().t()).sqrt()

    def over(deviation: Tensor) -> Tensor:
        u = inputs @ weight.t() + bias
        parts = [w * act(u + node * deviation) for node, w in gauss_hermite(60)]
        return weights @ torch.stack(parts).sum(0)

    wanted = over(deviation)
    fixed = over((weights @ deviation.square()).sqrt().expand_as(deviation))
    model = nn.Sequential(layer, act)
    apply_dropconnect(model, nn.Linear, p=p)
    found = predict_moments(model, x, "full", input_variance=spread, class_dim=None)
    assert (found.mean[0] - wanted).norm() < (fixed - wanted).norm() / 3


class Everything(nn.Module):
    """What is computed part by part where it is large, at a residual path."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.rms = nn.LayerNorm(24), nn.RMSNorm(24)

    def forward(self, u: Tensor) -> Tensor:
        v = self.norm(u)
        v = v + F.scaled_dot_product_attention(v, 2 * v, v)
        v = v + F.gelu(v) + F.silu(v) + F.relu(v)
        return self.rms(v) + v.softmax(-1)


def test_a_large_value_is_computed_in_parts() -> None:
    """As many small ones are, of which each is one part."""
    torch.manual_seed(0)
    model, x = Everything(), torch.randn(700, 6, 24)
    options: dict[str, Any] = {"input_variance": 0.3, "class_dim": None}
    whole = predict_moments(model, x, **options)
    apart = [predict_moments(model, part, **options) for part in x.split(350)]
    torch.testing.assert_close(whole.mean, torch.cat([one.mean for one in apart]))
    torch.testing.assert_close(whole.variance, torch.cat([one.variance for one in apart]))
    assert x.numel() > 2 * BLOCK > x.numel() // 2
