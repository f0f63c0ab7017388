"""A plan is data: it prints, counts, slices, and survives JSON; making one changes nothing."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

from surgery import (
    DropConnectConfig,
    Plan,
    Site,
    apply_dropconnect,
    dropconnect_sites,
    plan_dropconnect,
    set_p,
)
from surgery.spec.forms import FORMAT_VERSION

from ..helpers import Snapshot
from ..internals import states_of
from ..zoo.kinds import ReadsChild


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.reader = ReadsChild()
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.scalar = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.head(self.reader(self.embed(x))) * self.scalar


TARGETS = ["embed", "reader.*", "scalar"]

TABLE = """\
site                kind       shape   p     options                         notes
------------------  ---------  ------  ----  ------------------------------  ---------------------------
scalar              other      scalar  0.25  unit=tensor, toward=pretrained  no moments
embed.weight        embedding  10x4    0.25  unit=tensor, toward=pretrained  tied with head.weight
reader.proj.weight  linear     4x6     0.25  unit=tensor, toward=pretrained  drawn by reader, no moments
3 sites, 65 weights"""


def plan() -> Plan:
    return plan_dropconnect(Model(), TARGETS, p=0.25, unit="tensor", toward="pretrained")


def lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if not line.startswith("-")]


def test_table() -> None:
    assert lines(str(plan())) == lines(TABLE)


def test_table_is_aligned() -> None:
    rows = str(plan()).splitlines()[:-1]
    for heading in ("kind", "shape", "p ", "options"):
        column = rows[0].index(heading)
        assert all(row[column - 1] == " " != row[column] for row in rows)


def test_empty_plan_prints() -> None:
    assert str(Plan()).splitlines()[-1] == "0 sites, 0 weights"


def test_count_iterate_index_and_slice() -> None:
    found = plan()
    assert len(found) == 3
    assert found.numel == 65
    assert [site.name for site in found] == ["scalar", "embed.weight", "reader.proj.weight"]
    assert isinstance(found[0], Site)
    assert found[-1].name == "reader.proj.weight"
    assert isinstance(found[1:], Plan)
    assert [site.name for site in found[1:]] == ["embed.weight", "reader.proj.weight"]


def test_site_fields() -> None:
    site = plan()[1]
    assert (site.module, site.parameter, site.kind) == ("embed", "weight", "embedding")
    assert (site.shape, site.numel, site.p) == ((10, 4), 40, 0.25)
    assert site.shared_with == ("head.weight",)
    assert plan()[2].drawn_by == ("reader",)
    assert (plan()[0].module, plan()[0].name, plan()[0].numel) == ("", "scalar", 1)


def test_frozen_and_hashable() -> None:
    found = plan()
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.sites = ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        found[0].kind = "other"
    assert len({found, plan()}) == 1


def test_planning_changes_nothing() -> None:
    model = Model()
    before = Snapshot(model)
    plan_dropconnect(model, TARGETS, toward="pretrained", bias=True)
    assert Snapshot(model) == before


def test_json_round_trip() -> None:
    assert Plan.from_json(json.loads(json.dumps(plan().to_json()))) == plan()


@pytest.mark.parametrize("version", [None, 0, FORMAT_VERSION + 1])
def test_other_versions_are_refused(version) -> None:
    with pytest.raises(ValueError, match=f"plan was saved in format {version}"):
        Plan.from_json({**plan().to_json(), "version": version})


def test_plan_is_what_apply_puts_in_place() -> None:
    model = Model()
    expected = plan_dropconnect(model, TARGETS, p=0.25)
    assert dropconnect_sites(apply_dropconnect(model, TARGETS, p=0.25)) == expected


@pytest.mark.parametrize("part", [slice(None), slice(1, 2), slice(2, None)], ids=str)
def test_a_plan_is_a_target(part: slice) -> None:
    wanted = plan()[part]
    model = apply_dropconnect(Model(), wanted)
    assert dropconnect_sites(model) == wanted


def test_a_plan_from_json_is_a_target() -> None:
    model = apply_dropconnect(Model(), Plan.from_json(plan().to_json()))
    assert dropconnect_sites(model) == plan()


def test_a_plan_with_biases_is_a_target() -> None:
    wanted = plan_dropconnect(Model(), "reader.proj", unit="output", bias=True)
    assert [site.parameter for site in wanted] == ["weight", "bias"]
    model = apply_dropconnect(Model(), wanted)
    assert dropconnect_sites(model) == wanted
    assert [state.follows for state in states_of(model.reader.proj)] == [None, "weight"]


def test_a_plan_for_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'scalar' matches no module and no parameter"):
        apply_dropconnect(nn.Linear(2, 2), plan())


def test_a_partial_plan_of_a_tied_weight_ties_all_its_users() -> None:
    model = apply_dropconnect(Model(), plan()[1:2])
    assert model.head.weight is model.embed.weight
    assert model.head.weight_raw is model.embed.weight_raw


def test_sites_in_place_show_the_present_p() -> None:
    model = apply_dropconnect(Model(), TARGETS, p=0.1)
    set_p(model, 0.7)
    assert [site.p for site in dropconnect_sites(model)] == [0.7] * 3


def test_default_config_is_used() -> None:
    config = DropConnectConfig(p=0.1, unit="tensor")
    found = plan_dropconnect(Model(), TARGETS, config=config)
    assert {site.config for site in found} == {config}
    found = plan_dropconnect(Model(), TARGETS, p=0.2, config=config, bias=False)
    assert {site.config for site in found} == {config.replace(p=0.2)}
