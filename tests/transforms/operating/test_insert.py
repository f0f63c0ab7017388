"""Nodes that graph surgery puts in: how many, where, what they compute, and what is refused."""

from __future__ import annotations

import copy
import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from surgery import SurgeryError, apply_dropconnect, dropconnect_sites, set_p, strip_dropconnect
from surgery.modules.node import DropConnectNode
from surgery.transforms.operating.insert import insert
from surgery.transforms.operating.model_graphs import ModelGraphs

from ...expected import keep, masked
from ..graphs import (
    Functional,
    GraphSnapshot,
    Mixed,
    P,
    Tied,
    about_torch,
    both_dialects,
    by_hand,
    names,
    node,
    tokens,
    traced,
    train,
)

pytestmark = about_torch


def nodes_of(model: fx.GraphModule) -> dict[str, str]:
    """The DropConnect nodes: name and target."""
    return {
        n.name: str(n.target)
        for n in model.graph.find_nodes(op="call_module")
        if isinstance(model.get_submodule(str(n.target)), DropConnectNode)
    }


@both_dialects
def test_a_matrix_product_is_replaced_in_place(dialect: str) -> None:
    model = traced(Functional(), dialect, torch.randn(2, 4))
    first = next(n for n in model.graph.nodes if n.name == "linear")
    arguments = [str(arg) for arg in first.args]
    apply_dropconnect(model, "w", p=P)
    assert nodes_of(model) == {"dropconnect_w": "w_dropconnect"}
    assert node(model, "dropconnect_w") is first
    assert [str(arg) for arg in first.args] == [a.replace("w", "w_raw") for a in arguments]
    assert "linear" not in names(model)
    assert "linear_1" in names(model)
    assert "dropconnect_w = self.w_dropconnect(" in model.code
    assert "w_raw = self.w_raw" in model.code


@both_dialects
def test_other_operations_get_the_masked_weight(dialect: str) -> None:
    model = traced(Tied(), dialect, tokens())
    before = len(model.graph.nodes)
    apply_dropconnect(model, ["table", "both"], p=P)
    expected = {"dropconnect_table", "dropconnect_both"}
    if dialect == "export":  # symbolic_trace knows one name only
        expected.add("dropconnect_head")
    assert set(nodes_of(model)) == expected
    assert len(model.graph.nodes) == before + len(expected)
    both = node(model, "dropconnect_both")
    assert [user.name for user in both.users] == ["linear", "t"]
    assert node(model, "both_raw").users.keys() == {both}


@both_dialects
def test_names_of_operated_leaf_modules(dialect: str) -> None:
    model = traced(Mixed(), dialect, tokens())
    apply_dropconnect(model, "*", p=P)
    shown = [name for name in names(model) if name.startswith("dropconnect_")]
    if dialect == "symbolic":
        assert shown == [
            f"dropconnect_{n}" for n in ("table", "fc1", "w", "lstm", "conv", "settle")
        ]
    else:
        layers = [f"lstm_weight_hh_l{i}{r}" for i in (0, 1) for r in ("", "_reverse")]
        expected = ["table", "fc1", "w", *layers, "conv", "settle"]
        assert shown == [f"dropconnect_{n}" for n in expected]


@both_dialects
def test_values_and_gradients_of_a_product(dialect: str, keys) -> None:
    x = torch.randn(6, 4)
    model = traced(Functional(), dialect, x)
    plain = copy.deepcopy(model)
    apply_dropconnect(model, ["w", "v"], p=P)
    found = model(x)
    found.sum().backward()
    assert len(keys) == 2
    masks = [keep(keys[0], P, 5, 4), keep(keys[1], P, 3, 5)]
    with torch.no_grad():
        plain.w.copy_(masked(plain.w, masks[0], P))
        plain.v.copy_(masked(plain.v, masks[1], P))
    expected = plain(x)
    expected.sum().backward()
    assert torch.equal(found, expected)
    for name, mask in zip(("w", "v"), masks):
        raw, gradient = getattr(model, f"{name}_raw"), getattr(plain, name).grad
        assert torch.equal(raw.grad, masked(gradient, mask, P))
    assert torch.equal(model.b.grad, plain.b.grad)


@both_dialects
def test_one_mask_for_all_readers_and_all_names(dialect: str, keys) -> None:
    model = traced(Tied(), dialect, tokens())
    plain = copy.deepcopy(model)
    apply_dropconnect(model, "*", p=P)
    twins = ("head",) if dialect == "export" else ()
    assert [s.shared_with for s in dropconnect_sites(model)] == [twins, ()]
    found = model(tokens())
    assert len(keys) == 2
    masks = [keep(keys[0], P, 7, 4), keep(keys[1], P, 4, 4)]
    with torch.no_grad():
        plain.table.copy_(masked(plain.table, masks[0], P))
        plain.both.copy_(masked(plain.both, masks[1], P))
    assert torch.equal(found, plain(tokens()))
    found.sum().backward()
    plain(tokens()).sum().backward()
    for name, mask in zip(("table", "both"), masks):
        gradient = masked(getattr(plain, name).grad, mask, P)
        assert torch.equal(getattr(model, f"{name}_raw").grad, gradient)


def test_two_names_of_one_parameter(keys) -> None:
    model = by_hand(
        lambda g, x: g.call_function(
            F.linear, (g.call_function(F.linear, (x, g.get_attr("w"))), g.get_attr("twin"))
        ),
        w=torch.randn(4, 4),
        twin=torch.randn(4, 4),
    )
    model.twin = model.w
    before = GraphSnapshot(model)
    apply_dropconnect(model, "w", p=P)
    (site,) = dropconnect_sites(model)
    assert (site.name, site.shared_with) == ("w", ("twin",))
    x = torch.randn(2, 4)
    found = model(x)
    (key,) = keys
    used = masked(model.w_raw, keep(key, P, 4, 4), P)
    assert torch.equal(found, F.linear(F.linear(x, used), used))
    assert model.w_raw is model.twin_raw
    strip_dropconnect(model)
    assert GraphSnapshot(model) == before
    apply_dropconnect(model, "w", p=P, exclude="twin")
    assert nodes_of(model) == {"dropconnect_w": "w_dropconnect"}
    assert model.twin is model.w_raw
    strip_dropconnect(model)
    assert GraphSnapshot(model) == before


@both_dialects
@pytest.mark.parametrize("unit", ["input", "output", "tensor"])
def test_units_toward_and_bias(dialect: str, unit: str, keys) -> None:
    x = torch.randn(6, 4)
    model = traced(Functional(), dialect, x)
    plain = copy.deepcopy(model)
    apply_dropconnect(model, "w", p=P, unit=unit, toward="pretrained", bias=True)
    with torch.no_grad():
        model.w_raw.add_(1.0)
        model.b_raw.add_(1.0)
    found = model(x)
    shape = {"input": (1, 4), "output": (5, 1), "tensor": (1, 1)}[unit]
    mask = keep(keys[0], P, *shape).expand(5, 4)
    if unit == "input":
        bias_mask = keep(keys[1], P, 1)
    else:
        assert len(keys) == 1  # a dropped row drops its bias
        bias_mask = mask[:, 0]
    with torch.no_grad():
        plain.w.copy_(masked(plain.w + 1.0, mask, P, plain.w.clone()))
        plain.b.copy_(masked(plain.b + 1.0, bias_mask, P, plain.b.clone()))
    assert torch.equal(found, plain(x))


def test_the_masked_weight_of_a_product_is_computed_again() -> None:
    """Autograd keeps nothing of the weight's size beside the weight."""
    model = fx.symbolic_trace(nn.Sequential(_Big()))
    apply_dropconnect(model, "*", p=P)
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() if not isinstance(tensor, nn.Parameter) else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(torch.randn(2, 64, requires_grad=True))
    y.sum().backward()
    assert max(sizes) < 64 * 64


class _Big(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(64, 64))

    def forward(self, x):
        return F.linear(x, self.w)


@both_dialects
def test_a_second_insertion_changes_nothing(dialect: str) -> None:
    model = traced(Mixed(), dialect, tokens())
    results = insert(ModelGraphs(model), [], {})
    assert [result.modified for result in results] == [False]
    apply_dropconnect(model, "*", p=P)
    before = GraphSnapshot(model)
    assert [r.modified for r in insert(ModelGraphs(model), [], {})] == [False]
    assert GraphSnapshot(model) == before


def test_extending_an_operated_graph() -> None:
    model = fx.symbolic_trace(Mixed())
    before = GraphSnapshot(model)
    apply_dropconnect(model, "w", p=0.1)
    apply_dropconnect(model, ["fc1", "lstm"], p=0.2)
    assert [s.p for s in dropconnect_sites(model)] == [0.1, 0.2, 0.2, 0.2, 0.2, 0.2]
    with pytest.raises(SurgeryError, match="already in place"):
        apply_dropconnect(model, "w", p=0.1)
    strip_dropconnect(model)
    assert GraphSnapshot(model) == before


@pytest.mark.parametrize(
    ("function", "shape", "arguments"),
    [
        (F.linear, (3, 4), lambda x, w: (x, w)),
        (torch.matmul, (4, 3), lambda x, w: (x, w)),
        (operator.matmul, (4, 3), lambda x, w: (x, w)),
        (torch.ops.aten.linear.default, (3, 4), lambda x, w: (x, w, None)),
        (torch.ops.aten.mm.default, (4, 3), lambda x, w: (x, w)),
    ],
    ids=["linear", "matmul", "@", "aten.linear", "aten.mm"],
)
def test_hand_built_products(function: Any, shape: tuple, arguments: Any, keys) -> None:
    weight = torch.randn(*shape)
    model = by_hand(lambda g, x: g.call_function(function, arguments(x, g.get_attr("w"))), w=weight)
    before = GraphSnapshot(model)
    apply_dropconnect(model, "w", p=P, unit="output")
    x = torch.randn(2, 4)
    found = model(x)
    mask = keep(keys[0], P, *((3, 1) if shape == (3, 4) else (1, 3))).expand(*shape)
    assert torch.equal(found, function(*arguments(x, masked(weight, mask, P))))
    assert len(model.graph.nodes) == len(before.graphs[0][0]) + 1  # settle
    assert nodes_of(model) == {"dropconnect_w": "w_dropconnect"}
    strip_dropconnect(model)
    assert GraphSnapshot(model) == before


def test_two_get_attr_nodes_of_one_parameter(keys) -> None:
    model = by_hand(
        lambda g, x: g.call_function(
            torch.add,
            (
                g.call_function(F.linear, (x, g.get_attr("w"))),
                g.call_function(torch.matmul, (x, g.get_attr("w"))),
            ),
        ),
        w=torch.randn(4, 4),
    )
    before = GraphSnapshot(model)
    apply_dropconnect(model, "w", p=P)
    assert list(nodes_of(model).values()) == ["w_dropconnect"] * 2
    model(torch.randn(2, 4))
    assert len(keys) == 1
    strip_dropconnect(model)
    assert GraphSnapshot(model) == before


class _Read(nn.Module):
    """A module that is called, and whose weight a function reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, tokens):
        return F.linear(self.table(tokens), self.table.weight)


def test_a_weight_read_by_its_module_and_by_a_node() -> None:
    model = fx.symbolic_trace(_Read())
    before = GraphSnapshot(model)
    apply_dropconnect(model, "table", p=P)
    (site,) = dropconnect_sites(model)
    assert (site.name, site.kind) == ("table.weight", "embedding")
    assert {"dropconnect_table", "dropconnect_table_1"} <= set(names(model))
    copy.deepcopy(model)(tokens()).sum().backward()
    set_p(model, 0.0)
    assert model.table.weight_dropconnect.states["weight"].p == 0.0
    strip_dropconnect(model)
    assert GraphSnapshot(model) == before


def as_modules(model: fx.GraphModule) -> nn.Module:
    """`Functional` of the same weights, made of modules."""
    modules = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3, bias=False))
    modules.load_state_dict(dict(zip(modules.state_dict(), model.state_dict().values())))
    return modules


@both_dialects
@pytest.mark.parametrize("mode", ["example", "gaussian", "moments"])
@pytest.mark.parametrize("toward", ["zero", "pretrained"])
@pytest.mark.parametrize("bias", [False, True])
def test_modes_of_the_paper_are_those_of_modules(
    dialect: str, mode: str, toward: Any, bias: bool
) -> None:
    """Outputs and gradients, bit for bit."""
    x = torch.randn(6, 4)
    model = traced(Functional(), dialect, x)
    modules = as_modules(model)
    plain = model(x)
    option: Any = {"inference": mode} if mode == "moments" else {"sampling": mode}
    for target in (model, modules):
        apply_dropconnect(target, "*", p=P, toward=toward, bias=bias, **option)
        with torch.no_grad():
            for parameter in target.parameters():
                parameter.mul_(1.5)
        train(target, mode != "moments")
    torch.manual_seed(2)
    found = model(x)
    torch.manual_seed(2)
    expected = modules(x)
    assert type(found) is Tensor
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)
    found.sum().backward()
    expected.sum().backward()
    for one, other in zip(model.parameters(), modules.parameters()):
        assert torch.equal(one.grad, other.grad)


@both_dialects
def test_moments_reach_the_output_as_plain_tensors(dialect: str) -> None:
    x = torch.randn(2, 4)
    model = traced(_Last(), dialect, x)
    plain = model(x)
    apply_dropconnect(model, "w", p=P, inference="moments")
    train(model, False)
    for one, other in zip(model(x), plain):
        assert type(one) is Tensor
        assert torch.allclose(one, other)


class _Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        u = F.linear(x, self.w)
        return u, x
