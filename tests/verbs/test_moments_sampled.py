"""`predict_moments` against Monte Carlo, on models whose units covary."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import LowRank, apply_dropconnect, mc_predict, predict_moments

from ..zoo.tiny import tiny

P = 0.2


def trained(sampling: str = "batch") -> tuple[nn.Module, Tensor]:
    """A perceptron whose units covary, as training makes them do."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )
    x = torch.randn(1024, 16)
    labels = (x @ torch.randn(16, 4)).argmax(-1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        chosen = torch.randint(1024, (64,))
        nn.functional.cross_entropy(model(x[chosen]), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    apply_dropconnect(model, nn.Linear, p=P, sampling=sampling)
    return model.eval(), torch.randn(16, 16)


def test_a_trained_perceptron_against_monte_carlo() -> None:
    (model, x), count = trained(), 1500
    sampled = mc_predict(model, x, count, seed=1, batch_size=1)
    with torch.no_grad():
        plain = model(x)
    own = (sampled.variance / count).mean().sqrt()

    def error(mean: Tensor) -> float:
        return float((mean - sampled.mean).square().mean().sqrt())

    by_form = {form: predict_moments(model, x, form) for form in ("diagonal", 32, "full")}
    assert error(plain) > 4 * own
    for found in by_form.values():
        assert error(found.mean) < error(plain) / 3
    full = by_form["full"]
    assert abs(full.variance.sum() / sampled.variance.sum() - 1) < 0.05
    assert by_form["diagonal"].variance.sum() < 0.95 * sampled.variance.sum()
    assert (full.probabilities - sampled.probabilities).abs().mean() < 0.01
    assert (full.entropy - sampled.entropy).abs().mean() < 0.03
    assert (full.mutual_information - sampled.mutual_information).abs().mean() < 0.03
    low = by_form[32].covariance
    assert isinstance(low, LowRank)
    diagonal = low.dense().diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(diagonal, by_form[32].variance, rtol=1e-4, atol=1e-6)


def against_samples(
    model: nn.Module, inputs: Any, count: int, form: Any, **options: Any
) -> tuple[float, float]:
    """How many times nearer than plain weights the mean is, and the variance beside that of samples."""
    sampled = mc_predict(model, inputs, count, seed=1, batch_size=1, class_dim=None, **options)
    found = predict_moments(model, inputs, form, class_dim=None, **options)
    assert not found.settled
    with torch.no_grad():
        plain = predict_plain(model, inputs)
    own = float((sampled.variance / count).mean())

    def square(mean: Tensor) -> float:
        return max(float((mean - sampled.mean).square().mean()) - own, own / 9)

    ratio = float(found.variance.sum() / sampled.variance.sum())
    return math.sqrt(square(plain) / square(found.mean)), ratio


def predict_plain(model: nn.Module, inputs: Any) -> Tensor:
    found: Tensor = model.eval()(inputs)
    return found


class Residual(nn.Module):
    """Attention and a gate beside a path around them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm(self.up(x)[..., :8])
        u = u + self.attention(u, u, u)[0]
        u = u + self.down(nn.functional.silu(self.gate(u)) * self.up(u))
        return self.head(u.mean(1))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 3),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "shape", "low", "high"),
    [(Residual, (6, 5, 8), 0.75, 1.25), (convolutions, (6, 4, 8, 8), 0.85, 1.15)],
    ids=["attention", "convolutions"],
)
def test_full_of_shared_masks_against_monte_carlo(
    make: Callable[[], nn.Module], shape: tuple[int, ...], low: float, high: float
) -> None:
    """Tokens and positions share masks; paths meet again: what only backward passes know."""
    torch.manual_seed(0)
    model = make().eval()
    targets = ["gate", "up", "down", "head"] if make is Residual else [nn.Conv2d, nn.Linear]
    apply_dropconnect(model, targets, p=0.1)
    x, ratios = torch.randn(*shape), {}
    for form in ("full", "outputs"):
        _, ratios[form] = against_samples(model, x, 800, form)
    assert all(low < ratio < high for ratio in ratios.values()), ratios


@pytest.mark.parametrize(
    ("name", "attention"),
    [("llama", "sdpa"), pytest.param("t5", "eager", marks=pytest.mark.slow), ("vit", "sdpa")],
)
def test_transformers_against_monte_carlo(name: str, attention: str) -> None:
    """Tiny models as they are made: gates, norms written out, caches, relative positions, both ways to
    attend. All variance arrives."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = tiny(name).eval()
    model.set_attn_implementation(attention)
    apply_dropconnect(model, "all-linear", p=P)
    inputs = {"input_ids": torch.randint(0, 99, (2, 6))}
    if name == "t5":
        inputs["decoder_input_ids"] = torch.randint(0, 99, (2, 4))
    if name == "vit":
        inputs = {"pixel_values": torch.randn(4, 3, 16, 16)}
    count = 150
    sampled = mc_predict(model, inputs, count, seed=1, batch_size=1)
    found = predict_moments(model, inputs)
    assert not found.settled
    own = (sampled.variance / count).mean()
    with torch.no_grad():
        plain = model(**inputs).logits
    error, of_plain = (
        ((mean - sampled.mean).square().mean() - own).clamp_min(0) for mean in (found.mean, plain)
    )
    assert error < of_plain / 4
    assert 0.8 < found.variance.sum() / sampled.variance.sum() < 1.25
    assert predict_moments(model, inputs, 4).variance.isfinite().all()
