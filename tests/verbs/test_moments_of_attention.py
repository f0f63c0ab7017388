"""`predict_moments` through the weights that `nn.MultiheadAttention` reads itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from surgery import apply_dropconnect, mc_predict, plan_dropconnect, predict_moments, set_inference

from ..helpers import assert_moments_of_draws, linear

P = 0.2
WIDTH, HEADS, TOKENS = 8, 2, 4
UNITS = ("element", "input", "output", "tensor")


class Packed(nn.Module):
    """Attention, and the mean of its tokens."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        options = {"batch_first": True, **options}
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **options)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        y = x if y is None else y
        found: Tensor = self.head(self.attention(x, y, y, need_weights=False)[0].mean(1))
        return found


class Twin(nn.Module):
    """The same with a Linear for each projection."""

    def __init__(self, other: Packed) -> None:
        super().__init__()
        packed, self.head = other.attention, other.head
        separate = [packed.q_proj_weight, packed.k_proj_weight, packed.v_proj_weight]
        weights = separate if packed.in_proj_weight is None else packed.in_proj_weight.chunk(3)
        biases = packed.in_proj_bias.chunk(3)
        self.query, self.key, self.value = map(linear, weights, biases)
        self.out = linear(packed.out_proj.weight, packed.out_proj.bias)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        y = x if y is None else y
        query, key, value = (
            one.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for one in (self.query(x), self.key(y), self.value(y))
        )
        scores = query / math.sqrt(WIDTH // HEADS) @ key.transpose(-2, -1)
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        found: Tensor = self.head(self.out(mixed).mean(1))
        return found


def made(scale: float = 2.0) -> tuple[Packed, Twin, Tensor]:
    torch.manual_seed(0)
    model = Packed().double().eval()
    with torch.no_grad():
        for parameter in model.attention.parameters():
            parameter.mul_(scale) if parameter.ndim == 2 else parameter.normal_(std=0.3)
    return model, Twin(model).eval(), torch.randn(5, TOKENS, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("options", [{}, {"bias": True, "toward": "pretrained"}], ids=str)
def test_as_written_with_linear_layers(unit: str, options: dict[str, Any]) -> None:
    """Without columns the mathematics is the same. (With columns, of "tensor" one mask of the packed
    weight is three of the twin.)"""
    model, twin, x = made()
    for one in (model, twin):
        apply_dropconnect(one, "*", exclude="head", p=P, unit=unit, **options)
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.mul_(1.5)
    found, wanted = (predict_moments(one, x, class_dim=None) for one in (model, twin))
    assert not found.settled
    torch.testing.assert_close(found.mean, wanted.mean)
    torch.testing.assert_close(found.variance, wanted.variance)


def test_keys_and_values_of_other_widths() -> None:
    torch.manual_seed(0)
    model = Packed(kdim=6, vdim=6).double().eval()
    twin = Twin(model).eval()
    x = torch.randn(5, TOKENS, WIDTH, dtype=torch.float64)
    y = torch.randn(5, TOKENS + 1, 6, dtype=torch.float64)
    for one in (model, twin):
        apply_dropconnect(one, "*", exclude="head", p=P)
    found, wanted = (
        predict_moments(one, {"x": x, "y": y}, class_dim=None) for one in (model, twin)
    )
    torch.testing.assert_close(found.mean, wanted.mean)
    torch.testing.assert_close(found.variance, wanted.variance)


@pytest.mark.parametrize(
    "unit",
    ["element", "tensor", *(pytest.param(one, marks=pytest.mark.slow) for one in UNITS[1:3])],
)
def test_what_shares_a_mask_varies_together(unit: str) -> None:
    """Where masks move little, first order is all there is: tokens share masks, and for "tensor" the
    three projections do. Against Monte Carlo, whose own relative error is about sqrt(2 / 600) for one
    entry."""
    model, _, x = made(scale=1.0)
    apply_dropconnect(model, "attention", p=0.3, unit=unit, toward="pretrained")
    with torch.no_grad():
        for weight in model.attention.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    sampled = mc_predict(model, x, 600, class_dim=None, seed=0, batch_size=1)
    found = predict_moments(model, x, "full", class_dim=None)
    diagonal = predict_moments(model, x, class_dim=None)
    size = float(sampled.variance.sum())
    assert not found.settled
    assert float(found.variance.sum()) == pytest.approx(size, rel=0.1)
    assert float(diagonal.variance.sum()) < 0.8 * size


@pytest.mark.parametrize("unit", ["element", pytest.param("input", marks=pytest.mark.slow)])
def test_the_mean_of_sharp_attention(unit: str) -> None:
    model, _, x = made()
    with torch.no_grad():
        plain = model(x)
    apply_dropconnect(model, nn.MultiheadAttention, p=0.1, unit=unit)
    count = 1000
    sampled = mc_predict(model, x, count, class_dim=None, seed=0, batch_size=1)
    own = float((sampled.variance / count).mean())
    found = predict_moments(model, x, 32, class_dim=None)
    error, of_plain = (
        max(float((mean - sampled.mean).square().mean()) - own, own / 9)
        for mean in (found.mean, plain)
    )
    assert error < of_plain / 2


CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "weights": ({"batch_first": True}, {}),
    "weights of heads": ({"batch_first": True}, {"average_attn_weights": False}),
    "no weights": ({"batch_first": True}, {"need_weights": False}),
    "time first": ({}, {}),
    "causal": ({"batch_first": True}, {"attn_mask": "causal", "is_causal": True}),
    "mask of each head": ({"batch_first": True}, {"attn_mask": "heads"}),
    "padding": ({"batch_first": True}, {"key_padding_mask": "padding"}),
    "mask and padding": (
        {"batch_first": True}, {"attn_mask": "causal", "key_padding_mask": "padding"}
    ),
    "more keys": (
        {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True},
        {"attn_mask": "causal", "key_padding_mask": "padding"},
    ),
    "no bias": ({"batch_first": True, "bias": False}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_every_option_computes_what_torch_does(name: str) -> None:
    """Nearly nothing is dropped, so that the mean is that of the plain module; the grad keeps that off
    its fast path, which rounds otherwise."""
    options, call = CALLS[name]
    torch.manual_seed(0)
    model = nn.MultiheadAttention(WIDTH, HEADS, **options).double().eval()
    x = torch.randn(5, 5, WIDTH, dtype=torch.float64)
    masks = {
        "causal": torch.ones(5, 5, dtype=torch.bool).triu(1),
        "heads": torch.randn(5 * HEADS, 5, 5, dtype=torch.float64),
        "padding": torch.arange(5) > torch.tensor([4, 2, 3, 4, 1]).unsqueeze(1),
    }
    given = {key: masks.get(value, value) for key, value in call.items()}
    wanted = model(x, x, x, **given)
    apply_dropconnect(model, nn.MultiheadAttention, p=1e-9, inference="moments")
    with torch.no_grad():
        found = model(x, x, x, **given)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7)


def test_no_batch() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(WIDTH, HEADS).double().eval()
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    wanted = model(x, x, x)
    apply_dropconnect(model, nn.MultiheadAttention, p=1e-9, inference="moments")
    torch.testing.assert_close(model(x, x, x), wanted, rtol=1e-7, atol=1e-7)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        found: Tensor = self.layers(x, src_key_padding_mask=padding)[:, 0]
        return found


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("targets", ["all-linear", "*.linear1", "*.1.self_attn"])
def test_encoders_leave_their_fast_path(targets: str) -> None:
    """In `eval()` without gradients, one kernel computes a layer from its weights, of nested tensors
    where some are padded."""
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(5, TOKENS, WIDTH)
    padding = torch.arange(TOKENS) > torch.tensor([3, 2, 3, 1, 3]).unsqueeze(1)
    inputs = {"x": x, "padding": padding}
    with torch.no_grad():
        plain = model(**inputs)
    apply_dropconnect(model, targets, p=P)
    found = predict_moments(model, inputs, class_dim=None)
    assert not found.settled
    assert found.variance.all()
    assert not torch.allclose(found.mean, plain, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(model(**inputs), plain)
        with set_inference(model, "moments"):
            torch.testing.assert_close(model(**inputs), found.mean)
        assert torch.equal(model(**inputs), plain)


def test_dropout_of_shares_counts() -> None:
    torch.manual_seed(0)
    model = Packed(dropout=0.3).double().eval()
    x = torch.randn(5, TOKENS, WIDTH, dtype=torch.float64)
    assert_moments_of_draws(model.train(), x)


def test_gradients_flow_and_tensors_leave() -> None:
    model, _, x = made()
    apply_dropconnect(model, "attention", p=P, inference="moments")
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    found, shares = model.attention(x, x, x)
    assert type(found) is type(shares) is Tensor


def test_compiled() -> None:
    model, _, x = made()
    apply_dropconnect(model, "attention", p=P, inference="moments")
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), model(x))


def encoder() -> tuple[nn.Module, Tensor]:
    return Encoder(), torch.randn(3, TOKENS, WIDTH)


def words() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2), nn.ReLU()), torch.randint(
        0, 9, (3, 5)
    )


def recurrent() -> tuple[nn.Module, Tensor]:
    return nn.LSTM(4, 3, batch_first=True), torch.randn(2, 5, 4)


TARGETS: dict[Any, Any] = {encoder: "all-linear", words: [nn.Embedding, nn.Linear], recurrent: ""}


@pytest.mark.slow
@pytest.mark.parametrize("make", TARGETS)
def test_exported(make: Any) -> None:
    torch.manual_seed(0)
    model, x = make()
    apply_dropconnect(model.eval(), TARGETS[make], p=P, inference="moments")
    with torch.no_grad():
        wanted = model(x)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), wanted)
        with set_inference(model, "mean"):
            assert not torch.equal(tree_leaves(model(x))[0], tree_leaves(wanted)[0])


def test_the_plan_says_so() -> None:
    plan = plan_dropconnect(Packed(), "all-linear", p=P, inference="moments")
    assert str(plan).endswith("every site has moments")
