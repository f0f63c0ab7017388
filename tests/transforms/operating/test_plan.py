"""Plans of models that were looked at: uses in the table, and what they allow to be refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery import Plan, SurgeryError, Use, apply_dropconnect, dropconnect_sites, plan_dropconnect
from surgery.base.plugins import load_plugins
from surgery.transforms import CaptureError, find

EVERY_WEIGHT = "re:.*[.](weight|experts[.].*_proj)"

KINDS = {"linear": "linear", "addmm": "conv1d", "embedding": "embedding", "conv": "conv"}
"""Kind of module by its operation; `other` for what is only read by name."""


@pytest.mark.parametrize("name", ["minilm", "gpt2", "llama", "t5", "mixtral", "vit"])
def test_every_weight_of_a_transformers_model(name: str, tiny: Callable[[str], Any]) -> None:
    model = tiny(name)
    plan = plan_dropconnect(model, EVERY_WEIGHT)
    found = find(model)
    weights = {key for key in found if key.endswith("weight") or ".experts." in key}
    named = {key for site in plan for key in (site.name, *site.shared_with)}
    assert named == weights
    for site in plan:
        assert site.uses == found[site.name] != ()
        op = site.uses[0].op
        is_router = op == "linear" and not isinstance(model.get_submodule(site.module), nn.Linear)
        assert site.kind == ("other" if is_router else KINDS.get(op, "other"))
    lines = str(plan).splitlines()
    assert lines[0].split() == [
        *("site", "kind", "shape", "used", "by", "then", "p", "options", "notes")
    ]


def test_printed_plan(tiny: Callable[[str], Any]) -> None:
    plan = plan_dropconnect(tiny("minilm"), ["*.layer.0.*dense", "pooler.dense"], p=0.1)
    assert [line.split() for line in str(plan).splitlines()[2:-1]] == [
        ["encoder.layer.0.attention.output.dense.weight", "linear", "32x32", "linear", "-", "0.1"],
        ["encoder.layer.0.intermediate.dense.weight", "linear", "64x32", "linear", "gelu", "0.1"],
        ["encoder.layer.0.output.dense.weight", "linear", "32x64", "linear", "-", "0.1"],
        ["pooler.dense.weight", "linear", "32x32", "linear", "tanh", "0.1"],
    ]


def _through_helper(module: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, module.weight, module.bias)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return _through_helper(self.second, self.first(x).relu()).softmax(-1)


X = torch.ones(5, 3, 4)


def test_plain_model_is_walked_without_inputs_and_looked_at_with() -> None:
    assert [site.uses for site in plan_dropconnect(Net(), "first")] == [()]
    plan = plan_dropconnect(Net(), "*", example_inputs=X)
    assert [site.uses for site in plan] == [
        (Use(op="linear", by="first", activation="relu"),),
        (Use(op="linear", by="", activation="softmax"),),
    ]
    assert "used by" not in str(plan_dropconnect(Net(), "first"))


def test_a_weight_that_a_helper_reads_is_drawn_by_the_caller() -> None:
    model = Net()
    plan = plan_dropconnect(model, "second", example_inputs=X)
    assert plan[0].drawn_by == ("",)
    apply_dropconnect(model, "second", p=1.0, example_inputs=X)
    assert torch.equal(model(X), model.second.bias.softmax(-1).expand(5, 3, 3))


def test_a_plan_remembers_who_draws() -> None:
    plan = plan_dropconnect(Net(), "second", p=1.0, example_inputs=X)
    read = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert read == plan
    model = apply_dropconnect(Net(), read)
    assert dropconnect_sites(model)[0].drawn_by == ("",)
    assert torch.equal(model(X), model.second.bias.softmax(-1).expand(5, 3, 3))


def test_refuses_what_the_run_shows() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1), nn.Flatten(0, 1), nn.Linear(4, 2))
    before = dict(model.named_parameters())
    apply_dropconnect(model, "0", inference="moments", example_inputs=X)
    with pytest.raises(
        SurgeryError,
        match=r"3\.weight .*takes dimension 0 .* size 15 \(shape \(15, 4\)\), but .* \(5, 3, 4\)",
    ):
        apply_dropconnect(model, "3", sampling="example", example_inputs=X)
    apply_dropconnect(model, "3", sampling="example", example_dim="all", example_inputs=X)
    assert [id(p) for p in model.parameters()] == [id(p) for p in before.values()]


def test_inputs_that_do_not_fit() -> None:
    model = Net()
    with pytest.raises(CaptureError, match="Net"):
        plan_dropconnect(model, "*", example_inputs=torch.ones(2, 7))
    assert not dropconnect_sites(model).sites


def test_import_of_the_core_brings_the_plugin_when_it_plans() -> None:
    load_plugins()
    assert plan_dropconnect(Net(), "first", example_inputs=X)[0].uses
