"""What targets and exclusions mean, and what is said when they mean nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from surgery import (
    DropConnectConfig,
    NoMatchError,
    Plan,
    SurgeryError,
    apply_dropconnect,
    dropconnect_sites,
    plan_dropconnect,
    set_p,
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 4)
        self.fc2 = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.rnn = nn.LSTM(4, 4, num_layers=2)
        self.conv = nn.Conv2d(2, 2, 3)
        self.embed = nn.Embedding(5, 4)
        self.attn = nn.MultiheadAttention(4, 2)
        self.bn = nn.BatchNorm1d(4)
        self.head = nn.Bilinear(2, 2, 2)


FC = ["fc1.weight", "blocks.0.fc1.weight", "blocks.0.fc2.weight"]
FC += ["blocks.1.fc1.weight", "blocks.1.fc2.weight"]
HH = ["rnn.weight_hh_l0", "rnn.weight_hh_l1"]
ATTN = ["attn.in_proj_weight", "attn.out_proj.weight"]
REST = ["conv.weight", "embed.weight"]

MEANINGS: dict[str, tuple[Any, list[str]]] = {
    "glob-any-depth": ("*.fc*", FC),
    "glob-root-name": ("fc1", FC[:1]),
    "glob-star-dot-root": ("*.fc1", [FC[0], FC[1], FC[3]]),
    "glob-exact": ("blocks.0.fc1", FC[1:2]),
    "glob-star-crosses-dots": ("blocks*fc2", [FC[2], FC[4]]),
    "glob-question-mark": ("blocks.?.fc1", [FC[1], FC[3]]),
    "glob-set": ("blocks.[1]*", FC[3:]),
    "glob-rnn-means-hidden-to-hidden": ("rnn", HH),
    "glob-attention-means-both": ("attn", ATTN),
    "glob-parameter": ("*.weight_ih_l0", ["rnn.weight_ih_l0"]),
    "glob-parameters": ("rnn.weight_*_l1", ["rnn.weight_ih_l1", "rnn.weight_hh_l1"]),
    "glob-bias-if-asked": ("fc1.bias", ["fc1.bias"]),
    "glob-norm-parameter-if-asked": ("bn.weight", ["bn.weight"]),
    "glob-parameter-of-other-kind": ("head.weight", ["head.weight"]),
    "glob-everything": ("*", [*FC, *HH, *REST, *ATTN]),
    "regex": (r"re:blocks\.\d+\.fc1", [FC[1], FC[3]]),
    "regex-whole-name": ("re:fc1", FC[:1]),
    "regex-parameter": (r"re:rnn\.weight_ih_l\d", ["rnn.weight_ih_l0", "rnn.weight_ih_l1"]),
    "class": (nn.Linear, [*FC, "attn.out_proj.weight"]),
    "base-class": (nn.RNNBase, HH),
    "all-linear": ("all-linear", [*FC, "attn.out_proj.weight"]),
    "predicate": (lambda name, module: name.endswith("fc1"), [FC[0], FC[1], FC[3]]),
    "predicate-of-modules": (lambda name, module: isinstance(module, nn.RNNBase), HH),
    "predicate-in-list": (["rnn", lambda name, module: name == "conv"], [*HH, "conv.weight"]),
    "list": (["rnn", nn.Conv2d], [*HH, "conv.weight"]),
    "tuple-and-set": (("rnn",), HH),
    "list-with-overlap": (["*.fc1", "fc1"], [FC[0], FC[1], FC[3]]),
}


def names(*arguments: Any, **options: Any) -> list[str]:
    return [site.name for site in plan_dropconnect(Model(), *arguments, **options)]


@pytest.mark.parametrize(("targets", "expected"), MEANINGS.values(), ids=MEANINGS.keys())
def test_targets(targets: Any, expected: list[str]) -> None:
    assert sorted(names(targets)) == sorted(expected)


def test_sites_are_in_model_order() -> None:
    order = [name for name, _ in Model().named_parameters()]
    found = names(["embed", "rnn", "*.fc2", "fc1"])
    assert found == sorted(found, key=order.index)


@pytest.mark.parametrize("targets", ["*", "all-linear", nn.Module, "re:.*"], ids=str)
def test_never_norms_never_biases(targets: Any) -> None:
    found = names(targets)
    assert not [name for name in found if "bias" in name or "norm" in name or "bn" in name]


def test_bias_option_adds_the_biases_of_the_weights() -> None:
    assert names("blocks.0.fc1", bias=True) == ["blocks.0.fc1.weight", "blocks.0.fc1.bias"]
    assert names("rnn", bias=True) == [
        "rnn.weight_hh_l0",
        "rnn.bias_hh_l0",
        "rnn.weight_hh_l1",
        "rnn.bias_hh_l1",
    ]
    assert "attn.in_proj_bias" in names("attn", bias=True)


EXCLUSIONS: dict[str, tuple[Any, Any, list[str]]] = {
    "glob": ("*.fc*", "blocks.*", FC[:1]),
    "module-name-excludes-all-it-owns": ("rnn.weight_*", "rnn", []),
    "parameter": ("rnn", "*.weight_hh_l0", HH[1:]),
    "class": ("*", (nn.Linear, nn.LSTM, nn.MultiheadAttention), REST),
    "regex": ("*.fc*", r"re:.*\.fc2", [FC[0], FC[1], FC[3]]),
    "list": ("*.fc*", ["fc1", "blocks.0.*"], FC[3:]),
    "predicate": ("*.fc*", lambda name, module: name.startswith("blocks"), FC[:1]),
    "predicate-in-list": ("*.fc*", ["fc1", lambda name, module: "0" in name], FC[3:]),
    "child-of-attention": ("attn", "attn.out_proj", ATTN[:1]),
}


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"), EXCLUSIONS.values(), ids=EXCLUSIONS.keys()
)
def test_exclude(targets: Any, exclude: Any, expected: list[str]) -> None:
    if not expected:
        with pytest.raises(NoMatchError, match="nothing is left of targets="):
            names(targets, exclude=exclude)
    else:
        assert names(targets, exclude=exclude) == expected


def test_mapping_to_p_and_config() -> None:
    config = DropConnectConfig(p=0.9, unit="output")
    targets = {"blocks.0.*": 0.1, "*.fc1": config, nn.Linear: 0.3}
    plan = plan_dropconnect(Model(), targets, toward="pretrained")
    found = {site.name: (site.p, site.config.unit, site.config.toward) for site in plan}
    assert found == {
        "fc1.weight": (0.9, "output", "zero"),
        "blocks.0.fc1.weight": (0.1, "element", "pretrained"),
        "blocks.0.fc2.weight": (0.1, "element", "pretrained"),
        "blocks.1.fc1.weight": (0.9, "output", "zero"),
        "blocks.1.fc2.weight": (0.3, "element", "pretrained"),
        "attn.out_proj.weight": (0.3, "element", "pretrained"),
    }


def test_predicates_as_keys_of_a_mapping() -> None:
    targets = {lambda name, module: name == "fc1": 0.1, lambda name, module: "fc" in name: 0.2}
    found = {site.name: site.p for site in plan_dropconnect(Model(), targets)}
    assert found == {name: 0.1 if name == "fc1.weight" else 0.2 for name in FC}


def test_a_predicate_sees_every_module_under_every_name() -> None:
    model = nn.ModuleDict({"first": nn.Linear(2, 2)})
    model["second"] = model["first"]
    seen: list[Any] = []
    with pytest.raises(NoMatchError):
        plan_dropconnect(model, lambda name, module: seen.append((name, module)) or False)
    assert seen == [("", model), ("first", model["first"]), ("second", model["first"])]


def test_a_predicate_is_no_part_of_a_plan() -> None:
    """It lists the sites that were chosen, which can be written and read again."""
    plan = plan_dropconnect(Model(), lambda name, module: "fc1" in name)
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert dropconnect_sites(apply_dropconnect(Model(), again)) == plan


def test_set_p_takes_a_predicate() -> None:
    model = apply_dropconnect(Model(), "*.fc*", p=0.5)
    set_p(model, 0.1, targets=lambda name, module: name == "fc1" and type(module) is not nn.Linear)
    assert [site.p for site in dropconnect_sites(model)] == [0.1, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("predicate", "words"),
    [
        (
            lambda module: True,
            "must take two arguments, the dotted name of a module and the module",
        ),
        (lambda name, module, p: True, "missing a required argument: 'p'"),
        (lambda name, module: None, "must return True or False, and returned None for"),
        (lambda name, module: name, "returned '' for '(root)' (Model)"),
        (
            lambda name, module: {"": False, "fc1": True}[name],
            "raised KeyError for 'blocks' (ModuleList): 'blocks'",
        ),
        (lambda name, module: False, "is true of no module of Model"),
        (lambda name, module: name == "bn", "matches 1 module (the first is 'bn', a BatchNorm1d)"),
    ],
    ids=["one-argument", "three", "none", "string", "raises", "nowhere", "no-weights"],
)
@pytest.mark.parametrize("where", ["targets", "exclude"])
def test_wrong_predicates(predicate: Any, words: str, where: str) -> None:
    if where == "exclude" and "bn" in words:
        assert names("*", exclude=predicate) == names("*")
        return
    with pytest.raises(SurgeryError) as caught:
        names(**{"targets": "*", where: predicate})
    assert str(caught.value).startswith(f"{where}: ")
    assert "<lambda>" in str(caught.value)
    assert words in str(caught.value)


def test_a_module_is_no_predicate() -> None:
    with pytest.raises(SurgeryError, match=r"targets must be a pattern, .* a function of"):
        names(nn.Linear(2, 2))


def test_shared_module_is_found_under_every_name() -> None:
    model = nn.ModuleDict({"first": nn.Linear(2, 2)})
    model["second"] = model["first"]
    for pattern in ("first", "second", "*"):
        assert [site.name for site in plan_dropconnect(model, pattern)] == ["first.weight"]


def test_root_module_itself() -> None:
    assert [site.name for site in plan_dropconnect(nn.Linear(2, 2), nn.Linear)] == ["weight"]
    assert [site.name for site in plan_dropconnect(nn.Linear(2, 2), "weight")] == ["weight"]
    assert [site.name for site in plan_dropconnect(nn.LSTM(2, 2), "*")] == ["weight_hh_l0"]


@pytest.mark.parametrize(
    ("target", "near"),
    [
        ("blocks.0.fc3", "blocks.0.fc1"),
        ("*.fcx1", "fc1"),
        ("rnn.weight_hh_l7", "rnn.weight_hh_l0"),
        ("re:embedding", "embed"),
        ("*.NORM", "blocks.0.norm"),
    ],
)
def test_near_names_are_listed(target: str, near: str) -> None:
    with pytest.raises(NoMatchError) as caught:
        names(target)
    message = str(caught.value)
    assert f"targets: {target!r} matches no module and no parameter of Model." in message
    assert near in message.split("Nearest names: ")[1].split(". ")[0].split(", ")
    assert "A '*' also matches dots" in message


def test_near_names_of_a_large_model() -> None:
    deep: nn.Module = nn.Linear(2, 2)
    for name in ("query", "self", "attention", "layer", "encoder", "bert"):
        deep = nn.ModuleDict({name: deep, "other": nn.ReLU()})
    with pytest.raises(NoMatchError, match=r"Nearest names: bert\.encoder\.layer\..*\.query"):
        plan_dropconnect(deep, "*.quey")


def test_all_linear_where_nothing_is() -> None:
    with pytest.raises(
        NoMatchError, match=r"'all-linear' finds no linear layer in LSTM; name what"
    ):
        plan_dropconnect(nn.LSTM(2, 2), "all-linear")


@pytest.mark.parametrize(
    ("target", "advice"),
    [
        ("fc1", "A pattern is for whole names: write '*.fc1'."),  # as PEFT means it
        ("all_linear", "Write 'all-linear'."),
        (
            "blocks.(0|1).fc1",
            "A regular expression begins with 're:': write 're:blocks.(0|1).fc1'.",
        ),
    ],
)
def test_what_others_would_write_is_named(target: str, advice: str) -> None:
    with pytest.raises(NoMatchError) as caught:
        plan_dropconnect(nn.ModuleDict({"blocks": Model()}), target)
    assert advice in str(caught.value)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("bn", "'bn', a BatchNorm1d), but none has weights that are dropped by default"),
        ("bn", "name it: 'bn.weight'"),
        ("blocks", "To reach what is inside it, write 'blocks.*'"),
        (nn.LayerNorm, "'LayerNorm' matches 2 modules (the first is 'blocks.0.norm'"),
        (nn.Conv1d, "'Conv1d' matches no module"),
    ],
    ids=str,
)
def test_modules_without_default_weights(target: Any, words: str) -> None:
    with pytest.raises(NoMatchError) as caught:
        names(target)
    assert words in str(caught.value)


def test_no_match_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="matches no module"):
        apply_dropconnect(Model(), "nothing")


def test_one_dead_pattern_among_live_ones_is_an_error() -> None:
    """A list is not a way to hide a typing mistake."""
    with pytest.raises(NoMatchError, match="'fc9'"):
        names(["fc1", "fc9"])


def test_operated_model_is_selected_by_plain_names() -> None:
    model = apply_dropconnect(Model(), "fc1")
    with pytest.raises(NoMatchError, match=r"'fc1\.weight_raw' matches no"):
        plan_dropconnect(model, "fc1.weight_raw")
    assert [site.name for site in plan_dropconnect(model, "fc1.bias")] == ["fc1.bias"]


def test_names_with_glob_characters_are_reached_by_regex() -> None:
    model = nn.Module()
    model.add_module("a[0]", nn.Linear(2, 2))
    assert [site.name for site in plan_dropconnect(model, r"re:a\[0\]")] == ["a[0].weight"]
    assert torch.is_tensor(model.get_parameter("a[0].weight"))


def test_a_plan_is_given_alone() -> None:
    plan = plan_dropconnect(Model(), nn.Linear, p=0.5)
    with pytest.raises(ValueError, match=r"a Plan brings the p and the options .* give it alone"):
        plan_dropconnect(Model(), plan, p=0.9)
