"""`mc_predict` runs several samples in one batch where the model keeps them apart, else one by one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import (
    apply_dropconnect,
    mc_predict,
)

from .test_mc_predict import P, Returns, Stack, classifier


def test_together_and_one_by_one_agree() -> None:
    """The same distribution: means and covariances of the outputs, within standard errors."""
    model, x, count = classifier(bias=True), torch.randn(3, 6), 2000
    one, many = (mc_predict(model, x, count, batch_size=size) for size in (1, 3 * 500))
    error = ((one.variance + many.variance) / count).sqrt()
    assert ((one.mean - many.mean) / error).abs().max() < 5
    assert (one.variance / many.variance).log().abs().max() < 0.25
    torch.testing.assert_close(one.entropy, many.entropy, rtol=0.05, atol=0)


def test_convolutions_with_channel_masks_run_together() -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(30, 2))
    apply_dropconnect(model, [nn.Conv1d, nn.Linear], p=P, unit="output", bias=True)
    stack = Stack(model)
    mc_predict(stack, torch.randn(1, 4, 7).expand(3, 4, 7), samples=8)
    assert len(stack.seen) == 1
    outputs = stack.samples(3)
    torch.testing.assert_close(outputs, outputs[:, :1].expand_as(outputs))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Flat(nn.Module):
    """A site whose input has tokens, not the batch, first."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(0, 1)).view(len(x), -1)


@pytest.mark.parametrize(("make", "targets"), [(Recurrent, ["rnn", "head"]), (Flat, "fc")])
def test_falls_back_to_one_by_one(make: Any, targets: Any) -> None:
    model = Stack(apply_dropconnect(make(), targets, p=P))
    found = mc_predict(model, torch.randn(3, 5, 6), samples=6)
    assert [len(out) for out in model.seen] == [3] * 6
    assert found.variance.min() > 0


class TimeFirst(nn.Module):
    """Its site sees time first; as much time as several batches have rows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        u = torch.tanh(self.fc(x.transpose(0, 1))).transpose(0, 1)
        return self.head(u).mean(1)


def test_a_dimension_that_has_the_size_of_the_batch_by_chance() -> None:
    model, x = apply_dropconnect(TimeFirst(), "fc", p=0.5), torch.randn(2, 16, 6)
    alone = mc_predict(model, x, 400, seed=0, batch_size=1)
    together = mc_predict(model, x, 400, seed=0, batch_size=16)
    ratio = together.variance / alone.variance
    assert (ratio - 1).abs().max() < 5 * math.sqrt(2 * 2 / 400)


def test_falls_back_to_one_by_one_where_sizes_are_fixed() -> None:
    inner = apply_dropconnect(nn.Sequential(nn.Linear(6, 2)), "0", p=P)
    seen = []

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return self.inner(x) + torch.ones(3, 1)

    found = mc_predict(Outer(), torch.randn(3, 6), 8)
    assert found.mean.shape == (3, 2)
    assert seen == [3, 9, *[3] * 8]


class TimeFirstLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.rnn, self.head = nn.Linear(6, 6), nn.LSTM(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.fc(x))[0])


def _then(function: Any) -> Any:
    """A linear layer, a norm over its features, and something that mixes the first dimension."""
    return lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), Returns(function))


MIXING = {
    "time-first LSTM": TimeFirstLSTM,
    "cumsum": _then(lambda u: u.cumsum(0)),
    "cumsum from the end": _then(lambda u: u.flip(0).cumsum(0).flip(0)),
    "mean of the batch": _then(lambda u: u - u.mean(0)),
    "maximum of the batch": _then(lambda u: u / u.amax(0)),
    "softmax over the batch": _then(lambda u: u.softmax(0)),
    "first row": _then(lambda u: u - u[:1]),
    "last row": _then(lambda u: u - u[-1:]),
    "size of the batch": _then(lambda u: u / len(u)),
    "neighbours": _then(lambda u: u + 0.3 * u.roll(1, 0)),
    "interleaved": _then(lambda u: u.view(2, -1, *u.shape[1:]).transpose(0, 1).reshape(u.shape)),
    "some are masked": _then(lambda u: u.cumsum(0).index_fill(-1, torch.tensor([0, 3]), -1e30)),
    "infinite": _then(lambda u: u.cumsum(0).index_fill(-1, torch.tensor([1]), -math.inf)),
}


def assert_the_same_one_by_one(model: nn.Module, x: Tensor, samples: int = 9) -> None:
    """Without a difference, to the bit."""
    one, many = (
        mc_predict(model, x, samples, seed=3, batch_size=size, class_dim=None) for size in (1, 256)
    )
    for name in ("mean", "variance"):
        pair = getattr(many, name), getattr(one, name)
        torch.testing.assert_close(*pair, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", MIXING)
def test_a_model_that_mixes_samples_runs_them_one_by_one(name: str) -> None:
    for sampling in ("batch", "example", "gaussian"):
        for dtype in (torch.float32, torch.bfloat16):
            model = apply_dropconnect(MIXING[name]().to(dtype), nn.Linear, p=P, sampling=sampling)
            assert_the_same_one_by_one(model, torch.randn(4, 3, 6).to(dtype))


def test_a_convolution_and_a_graph_that_mix_samples_run_them_one_by_one() -> None:
    conv = nn.Sequential(nn.Conv1d(4, 6, 3), Returns(lambda u: u.cumsum(0)))
    apply_dropconnect(conv, nn.Conv1d, p=P, unit="output")
    assert_the_same_one_by_one(conv, torch.randn(5, 4, 7))

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.w).cumsum(0)

    graph = apply_dropconnect(torch.fx.symbolic_trace(Functional()), "w", p=P)
    assert_the_same_one_by_one(graph, torch.randn(5, 6))


@pytest.mark.parametrize("example_dim", [1, -2, "all", 0, -3])
def test_examples_along_another_dimension(example_dim: Any) -> None:
    """Where examples lie along the second dimension, repetitions of the first would share masks."""
    model = Stack(nn.Sequential(nn.Linear(6, 5)))
    apply_dropconnect(model, nn.Linear, p=P, sampling="example", example_dim=example_dim)
    x = torch.randn(2, 1, 6).expand(2, 3, 6)
    mc_predict(model, x, 9, class_dim=None)
    samples = model.samples(2)
    assert len(model.seen) == (9 if example_dim in (1, -2) else 1)
    assert len(samples[:, 0, 0].unique(dim=0)) == 9  # masks of their own
    shared = bool((samples[:, :, :1] == samples).all())
    assert shared == (example_dim in (0, -3))


def test_a_bias_that_drops_without_its_weight() -> None:
    layer = apply_dropconnect(nn.Sequential(nn.Linear(6, 5)), "0.bias", p=P, bias=True)
    assert_the_same_one_by_one(layer, torch.randn(5, 6))
    assert mc_predict(layer, torch.randn(5, 6), 99, class_dim=None).variance.min() > 0


def test_an_input_whose_samples_can_run_together_does() -> None:
    """Huge, infinite and missing entries do not hinder; nor do sequences, autocast, bfloat16."""
    outputs = {
        "sequence": lambda u: u.softmax(-1),
        "masked": lambda u: u.index_fill(-1, torch.tensor([0, 3]), -1e30),
        "infinite": lambda u: u.index_fill(-1, torch.tensor([1]), -math.inf),
        "missing": lambda u: u.index_fill(-1, torch.tensor([1]), math.nan),
        "dead": lambda u: (u - 100).relu(),
    }
    for name, function in outputs.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            model = Stack(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), Returns(function)))
            apply_dropconnect(model.to(dtype), nn.Linear, p=P)
            mc_predict(model, torch.randn(4, 3, 6).to(dtype), 9, class_dim=None)
            assert len(model.seen) == 1, (name, dtype)
    model = Stack(classifier())
    with torch.autocast("cpu", torch.bfloat16):
        mc_predict(model, torch.randn(4, 3, 6), 9)
    assert len(model.seen) == 1
