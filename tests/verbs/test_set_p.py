"""p moves in place, for all sites or some."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from surgery import (
    DropConnectConfig,
    NoMatchError,
    NotOperatedError,
    apply_dropconnect,
    dropconnect_sites,
    set_p,
)

from ..expected import keep, masked
from ..internals import states_of


def model() -> nn.Module:
    parts = {"first": nn.Linear(4, 4), "second": nn.Linear(4, 4), "plain": nn.Conv1d(2, 2, 1)}
    return apply_dropconnect(nn.ModuleDict(parts), nn.Linear, p=0.5)


def rates(module: nn.Module) -> dict[str, float]:
    return {site.module: site.p for site in dropconnect_sites(module)}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (None, {"first": 0.1, "second": 0.1}),
        ("first", {"first": 0.1, "second": 0.5}),
        (["second"], {"first": 0.5, "second": 0.1}),
        ("*.weight", {"first": 0.1, "second": 0.1}),
        (nn.Linear, {"first": 0.1, "second": 0.1}),
        ("*", {"first": 0.1, "second": 0.1}),
    ],
    ids=str,
)
def test_targets(targets, expected) -> None:
    module = model()
    set_p(module, 0.1, targets)
    assert rates(module) == expected


def test_plan_as_targets() -> None:
    module = model()
    set_p(module, 0.1, dropconnect_sites(module)[1:])
    assert rates(module) == {"first": 0.5, "second": 0.1}


def test_new_p_acts_at_the_next_call(keys) -> None:
    layer = apply_dropconnect(nn.Linear(4, 4), nn.Linear, p=0.5)
    x = torch.randn(2, 4)
    for p in (0.5, 0.9, 0.1, 1.0):
        set_p(layer, p)
        keys.clear()
        output = layer(x)
        used = masked(layer.weight, keep(keys[0], p, 4, 4), p)
        assert torch.equal(output, nn.functional.linear(x, used, layer.bias))


def test_p_zero_and_back(keys) -> None:
    layer = apply_dropconnect(nn.Linear(4, 4), nn.Linear, p=0.0)
    x = torch.randn(2, 4)
    layer(x)
    assert keys == []
    set_p(layer, 0.5)
    layer(x)
    assert len(keys) == 1
    set_p(layer, 0)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_backward_under_way_keeps_its_p(keys) -> None:
    """A schedule that moves p between forward and backward does not change the gradient."""
    layer = apply_dropconnect(nn.Linear(4, 4), nn.Linear, p=0.5)
    x = torch.randn(2, 4, requires_grad=True)
    output = layer(x)
    set_p(layer, 0.9)
    output.sum().backward()
    mask = keep(keys[0], 0.5, 4, 4)
    expected = masked(torch.ones(2, 4).t() @ x.detach(), mask, 0.5)
    assert torch.equal(layer.weight.grad, expected)
    assert torch.equal(x.grad, torch.ones(2, 4) @ masked(layer.weight, mask, 0.5))


@pytest.mark.parametrize("unit", ["element", "output"])
def test_bias_moves_with_its_weight(unit: str) -> None:
    layer = apply_dropconnect(nn.Linear(4, 4), nn.Linear, p=0.5, bias=True, unit=unit)
    for p, targets in ((0.2, None), (0.3, nn.Linear), (0.4, "weight")):
        set_p(layer, p, targets)
        assert [site.p for site in dropconnect_sites(layer)] == [p, p]
    set_p(layer, 0.5, "bias")
    assert [site.p for site in dropconnect_sites(layer)] == [0.4, 0.5]


def test_bias_with_options_of_its_own_stays() -> None:
    layer = apply_dropconnect(nn.Linear(4, 4), {"weight": 0.5, "bias": 0.1})
    set_p(layer, 0.7, "weight")
    assert [site.p for site in dropconnect_sites(layer)] == [0.7, 0.1]


def test_tied_users_move_together() -> None:
    module = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    module["b"].weight = module["a"].weight
    apply_dropconnect(module, "a", p=0.5)
    set_p(module, 0.1, "a")
    for part in module.values():
        assert [state.config.p for state in states_of(part)] == [0.1]


def test_other_options_stay() -> None:
    config = DropConnectConfig(p=0.5, unit="output", toward="pretrained", inference="sample")
    layer = apply_dropconnect(nn.Linear(3, 3), nn.Linear, config=config)
    set_p(layer, 0.25)
    assert dropconnect_sites(layer)[0].config == config.replace(p=0.25)


@pytest.mark.parametrize("p", [-1, 2, float("nan")])
def test_wrong_value_changes_nothing(p) -> None:
    module = model()
    with pytest.raises(ValueError, match="p is the probability of dropping"):
        set_p(module, p)
    assert rates(module) == {"first": 0.5, "second": 0.5}


def test_plain_model() -> None:
    with pytest.raises(NotOperatedError, match="Linear has no DropConnect in place"):
        set_p(nn.Linear(2, 2), 0.1)


def test_targets_without_dropconnect() -> None:
    with pytest.raises(NotOperatedError, match="'plain' names weights, but none has DropConnect"):
        set_p(model(), 0.1, "plain")


def test_targets_that_match_nothing() -> None:
    with pytest.raises(NoMatchError, match="matches no module"):
        set_p(model(), 0.1, "third")
