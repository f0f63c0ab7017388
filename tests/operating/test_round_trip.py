"""Law 2: strip after apply is the identity, whatever the model, the targets and the options."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from surgery import (
    DropConnectModule,
    NotOperatedError,
    SurgeryError,
    apply_dropconnect,
    dropconnect_sites,
    strip_dropconnect,
)

from ..helpers import Snapshot
from ..zoo.kinds import CASES, Case, every_case


@every_case
@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_strip_is_the_inverse_of_apply(case: Case, toward: str) -> None:
    module = case.build()
    before = Snapshot(module)
    returned = apply_dropconnect(module, case.target_of(module), p=0.3, toward=toward)
    assert returned is module
    assert Snapshot(module) != before
    assert strip_dropconnect(module) is module
    assert Snapshot(module) == before


@every_case
def test_strip_after_training_keeps_what_was_trained(case: Case) -> None:
    module = case.build()
    parameters = list(module.parameters())
    names = list(module.state_dict())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    apply_dropconnect(module, case.target_of(module), p=0.3, toward="pretrained")
    outputs = module(*case.inputs())
    while not isinstance(outputs, Tensor):
        outputs = outputs[0]
    outputs.sum().backward()
    optimizer.step()
    trained = [parameter.detach().clone() for parameter in parameters]
    strip_dropconnect(module)
    assert [id(parameter) for parameter in module.parameters()] == list(map(id, parameters))
    assert all(torch.equal(a, b) for a, b in zip(parameters, trained, strict=True))
    assert list(module.state_dict()) == names
    module(*case.inputs())


def test_strip_makes_plain_what_was_around_a_site_that_is_gone() -> None:
    """A forward in which moments travel is changed around its sites, and stays so without them."""
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ReLU())
    apply_dropconnect(model, nn.Linear, inference="moments")
    model[0][0] = nn.Linear(4, 4)
    assert not dropconnect_sites(model).sites
    assert type(model) is not nn.Sequential
    before = dict(model.state_dict())
    strip_dropconnect(model)
    assert [type(one) for one in model.modules()] == [nn.Sequential] * 2 + [nn.Linear, nn.ReLU]
    assert model.state_dict().keys() == before.keys()
    with pytest.raises(NotOperatedError):
        strip_dropconnect(model)


def test_snapshot_notices_every_change() -> None:
    """The check itself: each of these must make two snapshots differ."""
    changes = {
        "value": lambda m: m[0].weight.data.add_(1),
        "object": lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.data)),
        "flag": lambda m: m[0].weight.requires_grad_(False),
        "mode": lambda m: m[1].eval(),
        "hook": lambda m: m[0].register_forward_hook(lambda *args: None),
        "class": lambda m: setattr(m[0], "__class__", type("Linear", (nn.Linear,), {})),
        "attribute": lambda m: setattr(m[0], "extra", 1),
        "buffer": lambda m: m[0].register_buffer("extra", torch.ones(1)),
        "order": lambda m: m[0]._parameters.update(weight=m[0]._parameters.pop("weight")),
        "tying": lambda m: setattr(m[1], "weight", m[0].weight),
        "grad": lambda m: setattr(m[0].weight, "grad", torch.ones(3, 3)),
    }
    for name, change in changes.items():
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        before = Snapshot(model)
        assert Snapshot(model) == before
        change(model)
        assert Snapshot(model) != before, name


def rename(name: str) -> str:
    return name.replace("-", "_")


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    """A model of random parts, nested, with ties, hooks, frozen parameters, and modes."""
    names = draw(st.lists(st.sampled_from(sorted(CASES)), min_size=1, max_size=4, unique=True))
    parts = OrderedDict((rename(name), CASES[name].build()) for name in names)
    parts["first"], parts["second"] = nn.Linear(5, 5), nn.Linear(5, 5)
    parts["norm"] = nn.LayerNorm(5)
    model: nn.Module = nn.Sequential(parts)
    if draw(st.booleans()):
        model.second.weight = model.first.weight
    if draw(st.booleans()):
        model.again = model.first
    if draw(st.booleans()):
        model = nn.Sequential(OrderedDict(inner=model, head=nn.Linear(2, 2, bias=False)))
    for module in model.modules():
        module.training = draw(st.booleans())
    if draw(st.booleans()):
        for parameter in list(model.parameters())[::2]:
            parameter.requires_grad_(False)
    if draw(st.booleans()):
        module = draw(st.sampled_from(list(model.modules())))
        module.register_forward_pre_hook(lambda module, args: None)
        module.register_state_dict_post_hook(lambda *args: None)
        module.note = object()  # type: ignore[assignment]
    return model


TARGETS: list[Any] = [
    "*",
    "all-linear",
    nn.Linear,
    "*.first",
    "re:.*(second|conv2d)",
    ["*.first", nn.MultiheadAttention],
    {"*.first": 0.2, nn.Linear: 0.7},
    {nn.Linear: 0.0, "*": 1.0},
]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    model=models(),
    targets=st.sampled_from(TARGETS),
    exclude=st.sampled_from([None, "*.second", nn.LayerNorm]),
    options=st.fixed_dictionaries(
        {
            "p": st.floats(0, 1),
            "unit": st.sampled_from(["element", "input", "output", "tensor"]),
            "toward": st.sampled_from(["zero", "pretrained"]),
            "inference": st.sampled_from(["mean", "sample"]),
            "bias": st.booleans(),
            "ranks": st.sampled_from(["independent", "same"]),
        }
    ),
    copied=st.booleans(),
)
def test_apply_then_strip_is_the_identity(model, targets, exclude, options, copied) -> None:
    before = Snapshot(model)
    try:
        apply_dropconnect(model, targets, exclude=exclude, **options)
    except SurgeryError:
        event("refused")
        assert Snapshot(model) == before
        return
    event("applied")
    assert any(isinstance(module, DropConnectModule) for module in model.modules())
    assert len(dropconnect_sites(model)) > 0
    assert [id(p) for p in model.parameters()] == [entry[1] for entry in unique(before)]
    if copied:
        strip_dropconnect(copy.deepcopy(model))
    strip_dropconnect(model)
    assert Snapshot(model) == before


def unique(snapshot: Snapshot) -> list[tuple]:
    """The parameters of a snapshot, a shared one once."""
    return list({entry[1]: entry for entry in snapshot.parameters}.values())


def test_strip_on_a_plain_model_says_so() -> None:
    model = nn.Linear(2, 2)
    before = Snapshot(model)
    with pytest.raises(NotOperatedError, match="Linear has no DropConnect in place"):
        strip_dropconnect(model)
    assert Snapshot(model) == before


def test_sites_of_a_plain_model_are_none() -> None:
    assert len(dropconnect_sites(nn.Linear(2, 2))) == 0


def test_extending_with_new_sites() -> None:
    """A second apply adds sites; one strip takes all out."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4), nn.MultiheadAttention(4, 2)).double()
    before = Snapshot(model)
    apply_dropconnect(model, "0", p=0.1)
    apply_dropconnect(model, "0.bias", p=0.2)
    apply_dropconnect(model, "1.weight_ih_l0", p=0.3, toward="pretrained")
    apply_dropconnect(model, nn.LSTM, p=0.4)
    apply_dropconnect(model, "2.out_proj", p=0.5)
    apply_dropconnect(model, "2.in_proj_weight", p=0.6)
    found = {site.name: site.p for site in dropconnect_sites(model)}
    assert found == {
        "0.weight": 0.1,
        "0.bias": 0.2,
        "1.weight_ih_l0": 0.3,
        "1.weight_hh_l0": 0.4,
        "2.in_proj_weight": 0.6,
        "2.out_proj.weight": 0.5,
    }
    x = torch.randn(3, 4, dtype=torch.float64)
    output, _ = model[1](model[0](x))
    model[2](output, output, output)[0].sum().backward()
    model.zero_grad()
    assert len(dropconnect_sites(strip_dropconnect(model))) == 0
    assert Snapshot(model) == before


def test_apply_strip_many_times() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))
    before = Snapshot(model)
    for _ in range(3):
        strip_dropconnect(apply_dropconnect(model, "*", p=0.5))
    assert Snapshot(model) == before


def test_optimizers_made_before_and_after_hold_the_same_parameters() -> None:
    model = nn.Linear(4, 4)
    early = torch.optim.Adam(model.parameters())
    apply_dropconnect(model, nn.Linear, p=0.5)
    late = torch.optim.Adam(model.parameters())
    strip_dropconnect(model)
    for optimizer in (early, late):
        (group,) = optimizer.param_groups
        assert [id(p) for p in group["params"]] == [id(model.weight), id(model.bias)]
