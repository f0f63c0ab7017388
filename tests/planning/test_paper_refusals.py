"""Masks per example, noise and moments where the module or its input does not allow them."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import (
    SurgeryError,
    apply_dropconnect,
    hold_masks,
    plan_dropconnect,
    set_inference,
)

from ..helpers import Snapshot

MODES = {
    "sampling='example'": {"sampling": "example"},
    "sampling='gaussian'": {"sampling": "gaussian"},
    "inference='moments'": {"inference": "moments"},
}
every_mode = pytest.mark.parametrize(("name", "mode"), MODES.items(), ids=MODES)


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


OTHERS = {
    "LSTM": (nn.LSTM(4, 3), "weight_hh_l0"),
    "GRUCell": (nn.GRUCell(4, 3), "weight_hh"),
    "MultiheadAttention": (nn.MultiheadAttention(4, 2), "in_proj_weight"),
    "Embedding": (nn.Embedding(4, 3), "weight"),
    "ConvTranspose2d": (nn.ConvTranspose2d(4, 3, 2), "weight"),
    "OwnForward": (OwnForward(4, 3), "weight"),
}


def refused(model: nn.Module, targets: Any, words: list[str], **options: Any) -> None:
    before = Snapshot(model)
    with pytest.raises(SurgeryError) as caught:
        apply_dropconnect(model, targets, **options)
    for word in words:
        assert word in str(caught.value)
    assert Snapshot(model) == before


VARYING = ("LSTM", "GRUCell", "MultiheadAttention", "Embedding")
"""Moments travel through the functions that these give their weights to."""


@every_mode
@pytest.mark.parametrize("cls", OTHERS)
def test_no_product(name: str, mode: dict[str, Any], cls: str) -> None:
    layer, parameter = OTHERS[cls]
    if name == "inference='moments'" and cls in VARYING:
        plan = plan_dropconnect(layer, "*", inference="moments")
        assert str(plan).endswith("every site has moments")
        mode = {"inference": "moments", "samples": 3}
        refused(copy.deepcopy(layer), "*", [f"{parameter} ({cls}): samples= draws"], **mode)
        return
    rule = f"{name} needs a forward that is a product of input and weight, and that of {cls} is not"
    fix = "use sampling='batch' and inference='mean' or 'sample' for it"
    model = nn.ModuleDict({"site": copy.deepcopy(layer)})
    refused(model, "site", [f"site.{parameter} ({cls}): {rule}", fix], **mode)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out_proj = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.out_proj.weight


@every_mode
def test_a_parent_that_reads_the_weight_itself(name: str, mode: dict[str, Any]) -> None:
    moments = name == "inference='moments'"
    model = nn.ModuleDict({"site": Reader() if moments else nn.MultiheadAttention(4, 2)})
    reader = type(model["site"]).__name__
    rule = f"{name} replaces the product in its own forward, but {reader} reads the weight"
    refused(model, "site.out_proj", ["site.out_proj.weight", rule, "sampling='batch'"], **mode)


@every_mode
def test_a_tied_embedding(name: str, mode: dict[str, Any]) -> None:
    """Both users drop or the one that cannot is excluded. Moments travel through both."""
    model = nn.ModuleDict({"wte": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["wte"].weight
    if name == "inference='moments'":
        apply_dropconnect(model, "head", **mode)
        return
    refused(model, "head", ["wte.weight (Embedding): " + name], **mode)
    apply_dropconnect(model, "head", exclude="wte", **mode)


@every_mode
@pytest.mark.parametrize("bias", [False, True])
def test_a_bias_without_its_weight(name: str, mode: dict[str, Any], bias: bool) -> None:
    model = nn.ModuleDict({"site": nn.Linear(4, 3)})
    words = ["site.bias (Linear)", "drops a bias with its weight only", "bias=True"]
    refused(model, "site.bias", words, bias=bias, **mode)
    apply_dropconnect(model, "site", p=0.5)
    refused(model, "site.bias", words, bias=bias, **mode)


def test_moments_of_a_bias_without_its_weight() -> None:
    """What a plan refuses, `set_inference` does."""
    alone = apply_dropconnect(nn.Sequential(nn.Linear(4, 3)), "0.bias", bias=True)
    both = apply_dropconnect(nn.Sequential(nn.Linear(4, 3)), "0", bias=True)
    for model, targets in ((alone, None), (both, "0.bias")):
        with pytest.raises(SurgeryError, match=r"a product .* '0\.bias'"):
            set_inference(model, "moments", targets=targets)
    set_inference(both, "moments")


def test_a_filter_bank_for_every_example() -> None:
    rule = (
        "sampling='example' would need a filter bank for every example; use unit='input', 'output'"
    )
    refused(nn.Conv2d(4, 3, 2), nn.Conv2d, ["weight (Conv2d): " + rule], sampling="example")


def test_several_problems_are_listed_once_each() -> None:
    model = nn.Sequential(nn.LSTM(4, 3), nn.Conv1d(4, 3, 2))
    with pytest.raises(SurgeryError) as caught:
        apply_dropconnect(model, "*", sampling="example", bias=True)
    text = str(caught.value)
    assert text.count("1.weight") == 1
    assert "1.bias" not in text


class Inner(nn.Module):
    """Turns its input before the site."""

    def __init__(self, turn: Any) -> None:
        super().__init__()
        self.site, self.turn = nn.Linear(6, 4), turn

    def forward(self, x: Tensor) -> Tensor:
        return self.site(self.turn(x))


def inner(turn: Any, **options: Any) -> nn.Module:
    return apply_dropconnect(nn.Sequential(Inner(turn)), "*site", sampling="example", **options)


@pytest.mark.parametrize(
    ("turn", "shape"),
    [(lambda x: x.transpose(0, 1), (5, 3, 6)), (lambda x: x.flatten(0, 1), (15, 6))],
    ids=["time-first", "flat"],
)
def test_an_input_whose_leading_size_is_not_the_batch(turn: Any, shape: tuple[int, ...]) -> None:
    model = inner(turn)
    message = (
        "0.site.weight: sampling='example' takes dimension 0 of its input for the examples; it has "
        f"size {shape[0]} (shape {shape}), but the model's input has shape (3, 5, 6). Set example_dim "
        "('all': a mask for every row), or exclude this site"
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        model(torch.randn(3, 5, 6))
    assert model.eval()(torch.randn(3, 5, 6)).shape[-1] == 4


def test_where_examples_may_lie() -> None:
    x = torch.randn(3, 5, 6)
    assert inner(lambda x: x.transpose(0, 1), example_dim=1)(x).shape == (5, 3, 4)
    assert inner(lambda x: x, example_dim=1)(x).shape == (3, 5, 4)
    assert inner(lambda x: x.flatten(0, 1), example_dim="all")(x).shape == (15, 4)


@pytest.mark.parametrize(("dim", "shape"), [(0, (6,)), (1, (3, 6)), (-1, (3, 6)), (-3, (3, 6))])
def test_no_such_dimension(dim: int, shape: tuple[int, ...]) -> None:
    model = inner(lambda x: x, example_dim=dim)
    message = (
        f"0.site.weight: sampling='example' finds examples along dimension {dim} of its input, "
        f"which has shape {shape}: no such dimension comes before the features. Give it a batch, or "
        "set example_dim"
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        model(torch.randn(shape))


@pytest.mark.parametrize("dim", [0, "all"])
def test_a_convolution_without_a_batch(dim: Any) -> None:
    layer = nn.Conv1d(4, 3, 2)
    apply_dropconnect(layer, nn.Conv1d, unit="output", sampling="example", example_dim=dim)
    with pytest.raises(RuntimeError, match=r"shape \(4, 7\): no such dimension .* Give it a batch"):
        layer(torch.randn(4, 7))


def test_moments_without_a_forward_to_follow() -> None:
    """As accelerate's hooks leave a model: nothing would settle what the site returns."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    model.forward = model.forward
    message = (
        r"0\.weight.*: inference='moments' needs a forward around the site, and that of Sequential has "
        "been replaced on the instance"
    )
    with pytest.raises(SurgeryError, match=message):
        apply_dropconnect(model, "0", inference="moments")
    apply_dropconnect(model, "0")
    before = Snapshot(model)
    with pytest.raises(SurgeryError, match=message):
        set_inference(model, "moments")
    assert Snapshot(model) == before


def test_noise_cannot_be_held() -> None:
    model = apply_dropconnect(nn.Sequential(nn.Linear(4, 3)), "0", sampling="gaussian")
    message = (
        r"0\.weight: sampling='gaussian' draws noise, which has no mask to hold; use sampling="
    )
    with pytest.raises(SurgeryError, match=message), hold_masks(model):
        pass


class Attends(nn.Module):
    """Its first input has no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        return self.fc(x) + positions.sum()


def test_the_batch_may_be_that_of_any_input() -> None:
    model = apply_dropconnect(Attends(), "fc", sampling="example")
    assert model(torch.ones(1, 5), torch.randn(3, 5, 6)).shape == (3, 5, 4)
