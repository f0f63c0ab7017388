"""`with dropconnect(...)`: in place inside, and taken out at the end."""

from __future__ import annotations

import contextlib
import copy
import gc
from typing import Any

import pytest
import torch
from torch import nn

from surgery import (
    NoMatchError,
    NotOperatedError,
    SurgeryError,
    apply_dropconnect,
    dropconnect,
    dropconnect_sites,
    strip_dropconnect,
)

from ..helpers import Snapshot


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LSTM(4, 4))


def graph() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight)

    return torch.fx.symbolic_trace(Net())


CASES: dict[str, tuple[Any, Any]] = {
    "modules": (model, [nn.Linear, nn.LSTM]),
    "graph": (graph, "weight"),
}


def form(net: Any) -> Any:
    """What must be the same afterwards; surgery writes the code of a graph anew."""
    return (net.code, list(net.state_dict())) if hasattr(net, "graph") else Snapshot(net)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
def test_in_place_inside_and_the_plain_model_after(case: str, fails: bool) -> None:
    build, targets = CASES[case]
    net = build()
    before = form(net)
    block = dropconnect(net, targets, p=1.0, unit="tensor")
    assert form(net) == before
    for _ in range(2):  # one object can be entered again
        try:
            with block as inside:
                assert inside is net
                assert {site.config.unit for site in dropconnect_sites(net)} == {"tensor"}
                if case == "graph":
                    assert not net(torch.ones(2, 4)).any()
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert fails
        assert form(net) == before


def test_masks_are_those_of_apply() -> None:
    one = nn.Linear(6, 6)
    other, x = copy.deepcopy(one), torch.randn(3, 6)
    apply_dropconnect(other, nn.Linear, p=0.5)
    torch.manual_seed(0)
    expected = other(x)
    torch.manual_seed(0)
    with dropconnect(one, nn.Linear, p=0.5):
        assert torch.equal(one(x), expected)
    assert torch.equal(one(x), other.eval()(x))


def test_the_end_takes_out_all_that_is_in_place() -> None:
    net = model()
    with dropconnect(net, nn.Linear):
        apply_dropconnect(net, nn.LSTM)
        assert len(dropconnect_sites(net)) == 2
    assert not dropconnect_sites(net).sites
    with dropconnect(net, nn.Linear):
        strip_dropconnect(net)
    assert not dropconnect_sites(net).sites


def test_an_object_that_was_left_does_nothing_when_it_is_freed() -> None:
    net = model()
    block = dropconnect(net, nn.Linear)
    with block:
        pass
    apply_dropconnect(net, nn.Linear)
    del block
    assert dropconnect_sites(net).sites


def test_entered_by_hand_it_lasts_as_long_as_it_is_held() -> None:
    """As where an interrupt comes between `__enter__` and the block: that cannot be told from this."""
    net = model()
    before = Snapshot(net)
    with contextlib.ExitStack() as stack:
        assert stack.enter_context(dropconnect(net, nn.Linear)) is net
        gc.collect()
        assert len(dropconnect_sites(net)) == 1
    assert Snapshot(net) == before
    assert dropconnect(net, nn.Linear).__enter__() is net
    assert Snapshot(net) == before


def test_what_is_refused_leaves_the_model_as_it_was() -> None:
    net = model()
    before = Snapshot(net)
    with pytest.raises(NoMatchError, match="nothing"), dropconnect(net, "nothing"):
        raise AssertionError
    with pytest.raises(ValueError, match="p is the probability"), dropconnect(net, "*", p=2.0):
        raise AssertionError
    assert Snapshot(net) == before
    apply_dropconnect(net, nn.LSTM)
    with pytest.raises(SurgeryError, match="has DropConnect in place"), dropconnect(net, "0"):
        raise AssertionError
    assert [site.name for site in dropconnect_sites(net)] == ["2.weight_hh_l0"]


def test_missing_ok_is_for_models_without_any() -> None:
    net = model()
    before = Snapshot(net)
    assert strip_dropconnect(net, missing_ok=True) is net
    assert Snapshot(net) == before
    with pytest.raises(NotOperatedError):
        strip_dropconnect(net)
    apply_dropconnect(net, nn.Linear)
    net[0].__class__ = type("Sharded", (type(net[0]),), {})  # as fully_shard does
    with pytest.raises(SurgeryError, match="its class was changed"):
        strip_dropconnect(net, missing_ok=True)
    apply_dropconnect(fresh := model(), nn.Linear)
    strip_dropconnect(fresh, missing_ok=True)
    assert not dropconnect_sites(fresh).sites
