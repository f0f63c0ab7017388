"""Taking nodes out of graphs that others have edited since."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from surgery import SurgeryError, apply_dropconnect, dropconnect_sites, strip_dropconnect
from surgery.modules.state import change_p
from surgery.operating.surgeon import can_undo
from surgery.operating.suspend import reapplied, suspended
from surgery.transforms.operating.remove import remove

from ..graphs import (
    Functional,
    GraphSnapshot,
    Mixed,
    P,
    Tied,
    about_torch,
    both_dialects,
    names,
    node,
    table,
    tokens,
    traced,
    train,
)

pytestmark = about_torch


@both_dialects
def test_a_second_removal_changes_nothing(dialect: str) -> None:
    model = traced(Mixed(), dialect, tokens())
    apply_dropconnect(model, "*", p=P)
    strip_dropconnect(model)
    before = GraphSnapshot(model)
    results = remove(model)
    assert [result.modified for result in results] == [False]
    assert GraphSnapshot(model) == before


@both_dialects
def test_other_edits_stay(dialect: str) -> None:
    x = torch.randn(2, 4)
    model = traced(Functional(), dialect, x)
    plain = copy.deepcopy(model)
    apply_dropconnect(model, "*", p=P)
    for target in (model, plain):
        relu = node(target, "relu")
        relu.target = torch.tanh
        with target.graph.inserting_after(relu):
            negated = target.graph.call_function(torch.neg, (relu,))
        relu.replace_all_uses_with(
            negated, delete_user_cb=lambda user, own=negated: user is not own
        )
        target.recompile()
    strip_dropconnect(model)
    assert table(model.graph) == table(plain.graph)
    assert model.code == plain.code
    assert torch.equal(model(x), plain(x))


@both_dialects
def test_another_input_of_a_replaced_product_stays(dialect: str) -> None:
    model = traced(Functional(), dialect, torch.randn(2, 4))
    apply_dropconnect(model, "v", p=P)
    product = node(model, "dropconnect_v")
    product.replace_input_with(node(model, "relu"), node(model, "linear"))
    strip_dropconnect(model)
    assert node(model, "linear_1").args[0] is node(model, "linear")


@both_dialects
def test_dead_code_elimination_leaves_the_nodes(dialect: str) -> None:
    model = traced(Tied(), dialect, tokens())
    apply_dropconnect(model, "*", p=P)
    model.graph.eliminate_dead_code()
    assert {"dropconnect_table", "dropconnect_both"} <= set(names(model))
    strip_dropconnect(model)
    assert not any(name.startswith("dropconnect") for name in names(model))


def erase(model: fx.GraphModule) -> None:
    """Put the raw weight where the masked one was."""
    made = node(model, "dropconnect_both")
    raw: Any = made.args[0]
    made.replace_all_uses_with(raw)
    model.graph.erase_node(made)


def retarget(model: fx.GraphModule) -> None:
    model.add_module("identity", nn.Identity())
    node(model, "dropconnect_both").target = "identity"


def rewire(model: fx.GraphModule) -> None:
    made = node(model, "dropconnect_both")
    with model.graph.inserting_before(made):
        made.args = (model.graph.call_function(torch.neg, made.args),)


@both_dialects
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (erase, "both: no node calls 'both_dropconnect' any more: it was erased"),
        (
            retarget,
            "both: no node calls 'both_dropconnect' any more: it was erased, or got another",
        ),
        (
            rewire,
            "both: node 'dropconnect_both' does not take the raw weight any more, but neg: it was "
            "re-wired",
        ),
    ],
    ids=["erased", "retargeted", "rewired"],
)
def test_edited_nodes_are_an_error(
    dialect: str, edit: Callable[[fx.GraphModule], None], message: str
) -> None:
    model = traced(Tied(), dialect, tokens())
    apply_dropconnect(model, "*", p=P)
    edit(model)
    model.recompile()
    before = GraphSnapshot(model)
    assert not can_undo(model)
    with pytest.raises(SurgeryError) as caught:
        strip_dropconnect(model)
    text = str(caught.value)
    assert text.startswith("cannot take DropConnect out; the model is unchanged:")
    assert message in text
    assert "undo that edit of the graph, or load plain_state_dict(model)" in text
    assert GraphSnapshot(model) == before


def test_a_rewired_product_is_an_error() -> None:
    model = fx.symbolic_trace(Functional())
    apply_dropconnect(model, "w", p=P)
    product = node(model, "dropconnect_w")
    with model.graph.inserting_before(product):
        doubled = model.graph.call_function(torch.mul, (product.args[1], 2))
    product.args = (product.args[0], doubled, product.args[2])
    with pytest.raises(SurgeryError, match="node 'dropconnect_w' does not take the raw weight"):
        strip_dropconnect(model)


def test_a_new_reader_of_the_raw_weight_reads_the_plain_one() -> None:
    model = fx.symbolic_trace(Functional())
    apply_dropconnect(model, "v", p=P)
    (output,) = model.graph.find_nodes(op="output")
    with model.graph.inserting_before(output):
        raw = model.graph.get_attr("v_raw")
        penalty = model.graph.call_method("norm", (raw,))
    output.args = ((output.args[0], penalty),)
    strip_dropconnect(model)
    assert raw.target == "v"
    value, norm = model(torch.randn(2, 4))
    assert torch.equal(norm, model.v.norm())
    assert value.shape == (2, 3)


@both_dialects
def test_suspended_puts_the_same_nodes_back(dialect: str) -> None:
    model = traced(Mixed(), dialect, tokens())
    plain = copy.deepcopy(model)
    apply_dropconnect(model, "*", p=P, toward="pretrained")
    train(model, False)
    shown, state, kept = table(model.graph), list(model.state_dict()), dict(model.named_modules())
    inside = suspended(model, lambda: (table(model.graph), list(model.state_dict())))
    assert inside == (table(plain.graph), list(plain.state_dict()))
    assert table(model.graph) == shown
    assert list(model.state_dict()) == state
    assert all(
        module is kept[name] for name, module in model.named_modules() if "settle" not in name
    )
    assert not any(module.training for module in model.modules())


@both_dialects
def test_reapplied_keeps_states(dialect: str) -> None:
    model = traced(Functional(), dialect, torch.randn(2, 4))
    apply_dropconnect(model, "*", p=P, toward="pretrained")
    change_p([model.w_dropconnect.states["w"]], P, 0.5)
    anchor = model.w_anchor
    shown = table(model.graph)
    with torch.no_grad():
        reapplied(model, lambda: model.w.add_(1.0))
    assert model.w_dropconnect.states["w"].p == P * 0.5
    assert model.w_anchor is anchor
    assert table(model.graph) == shown
    strip_dropconnect(model)


class _Outer(nn.Module):
    """A graph module called by another graph, which reads the inner weight too."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.fc = nn.Linear(3, 5)

    def forward(self, x: Any) -> Any:
        return F.linear(self.fc(self.inner(x)), self.inner.v)


class _Leaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return isinstance(m, fx.GraphModule) or super().is_leaf_module(m, name)


def nested() -> fx.GraphModule:
    model = _Outer(fx.symbolic_trace(Functional()))
    return fx.GraphModule(model, _Leaves().trace(model))


def test_one_parameter_read_in_two_graphs() -> None:
    model = nested()
    before = GraphSnapshot(model)
    apply_dropconnect(model, "*", p=P)
    assert [site.name for site in dropconnect_sites(model)] == ["inner.w", "inner.v", "fc.weight"]
    assert "dropconnect_inner_v" in names(model)
    assert {"dropconnect_w", "dropconnect_v"} <= set(names(model.inner))
    model(torch.randn(2, 4)).sum().backward()
    model.zero_grad()
    with pytest.raises(SurgeryError, match=r"inner.v .*needs one matrix product"):
        apply_dropconnect(strip_dropconnect(model), "inner.v", p=P, sampling="example")
    assert GraphSnapshot(model) == before


def test_graphs_inside_a_python_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4), fx.symbolic_trace(Functional()), nn.Linear(3, 2))
    before = GraphSnapshot(model)
    apply_dropconnect(model, "*", p=P, inference="moments")
    assert [site.name for site in dropconnect_sites(model)] == [
        *("0.weight", "1.w", "1.v", "2.weight")
    ]
    assert model(torch.randn(2, 4)).shape == (2, 2)
    model.eval()
    assert type(model(torch.randn(2, 4))) is torch.Tensor
    model.train()
    strip_dropconnect(model)
    assert GraphSnapshot(model) == before
