"""strip after apply is the identity on graphs too, whatever the dialect and the options."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from surgery import (
    NotOperatedError,
    SurgeryError,
    apply_dropconnect,
    dropconnect_sites,
    plan_dropconnect,
    strip_dropconnect,
)

from ..graphs import DIALECTS, MODELS, GraphSnapshot, about_torch, table, traced, unnamed, whole

pytestmark = about_torch

every_graph = pytest.mark.parametrize(
    ("name", "dialect"), [(name, dialect) for name in MODELS for dialect in DIALECTS]
)


def make(name: str, dialect: str) -> tuple[fx.GraphModule, Any]:
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    given = inputs()
    return traced(build(), dialect, given), given


@every_graph
@pytest.mark.parametrize("toward", ["zero", "pretrained"])
@pytest.mark.parametrize("bias", [False, True])
def test_strip_is_the_inverse_of_apply(name: str, dialect: str, toward: str, bias: bool) -> None:
    model, x = make(name, dialect)
    before, output = GraphSnapshot(model), model(x)
    plan = plan_dropconnect(model, "*", p=0.4, toward=toward, bias=bias)
    assert GraphSnapshot(model) == before
    apply_dropconnect(model, plan)
    assert dropconnect_sites(model) == plan
    assert whole(model) != before.graphs
    for graph_module in model.modules():
        if isinstance(graph_module, fx.GraphModule):
            graph_module.graph.lint()
    model(x).sum().backward()
    model.zero_grad()
    assert strip_dropconnect(model) is model
    assert GraphSnapshot(model) == before
    assert torch.equal(model(x), output)
    with pytest.raises(NotOperatedError):
        strip_dropconnect(model)


@every_graph
def test_applying_again_gives_the_same_graph(name: str, dialect: str) -> None:
    model, _ = make(name, dialect)
    apply_dropconnect(model, "*", p=0.4, toward="pretrained")
    first = table(model.graph)
    apply_dropconnect(strip_dropconnect(model), "*", p=0.4, toward="pretrained")
    assert table(model.graph) == first


@every_graph
def test_a_copy_strips_to_a_copy(name: str, dialect: str) -> None:
    model, x = make(name, dialect)
    plain, output = copy.deepcopy(model), model(x)
    apply_dropconnect(model, "*", p=0.4, toward="pretrained")
    duplicate = copy.deepcopy(model)
    assert table(duplicate.graph) == table(model.graph)
    assert sorted(duplicate.state_dict()) == sorted(model.state_dict())
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert torch.equal(duplicate(x), expected)
    duplicate = copy.deepcopy(duplicate)
    strip_dropconnect(duplicate)
    assert table(duplicate.graph) == table(plain.graph)
    assert duplicate.code == plain.code
    assert dict(duplicate.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    assert torch.equal(duplicate(x), output)
    assert len(dropconnect_sites(model)) > 0


def pickled(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("name", MODELS)
def test_a_pickle_strips_to_a_pickle(name: str) -> None:
    """Of exported modules torch refuses pickles (their input check is a local function)."""
    model, x = make(name, "symbolic")
    plain, output = pickled(model), model(x)
    apply_dropconnect(model, "*", p=0.4, toward="pretrained", bias=True)
    loaded = pickled(model)
    assert dropconnect_sites(loaded) == dropconnect_sites(model)
    assert sorted(loaded.state_dict()) == sorted(model.state_dict())
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert torch.equal(loaded(x), expected)
    strip_dropconnect(loaded)
    assert unnamed(loaded.graph) == unnamed(plain.graph)
    assert sorted(loaded.state_dict()) == sorted(plain.state_dict())
    assert torch.equal(loaded(x), output)


@every_graph
def test_exporting_after_strip_gives_the_same_program(name: str, dialect: str) -> None:
    model, x = make(name, dialect)

    def program() -> tuple[Any, ...]:
        done = torch.export.export(model, (x,), strict=False)
        state = {k: v.clone() for k, v in done.state_dict.items()}
        return str(done.graph), str(done.graph_signature), state, done.constants

    before = program()
    apply_dropconnect(model, "*", p=0.4, toward="pretrained")
    strip_dropconnect(model)
    after = program()
    assert after[:2] == before[:2]
    for one, other in zip(before[2:], after[2:]):
        assert list(one) == list(other)
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_nested_graphs_and_python_modules() -> None:
    inner = traced(MODELS["functional"][0](), "symbolic")
    model = nn.Sequential(nn.Linear(4, 4), fx.symbolic_trace(nn.Sequential(inner, nn.Linear(3, 4))))
    outer = fx.symbolic_trace(_Holder(inner))
    before = GraphSnapshot(model)
    apply_dropconnect(model, "*", p=0.5)
    assert {site.name for site in dropconnect_sites(model)} >= {"0.weight"}
    strip_dropconnect(model)
    assert GraphSnapshot(model) == before
    assert isinstance(outer, fx.GraphModule)


class _Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


OPS = {
    "linear": lambda x, w: F.linear(x, w),
    "linear-keywords": lambda x, w: F.linear(input=x, weight=w),
    "matmul": lambda x, w: x @ w,
    "method": lambda x, w: x.matmul(w),
    "addmm": lambda x, w: torch.addmm(w[0], x, w),
    "transposed": lambda x, w: x @ w.t(),
    "left": lambda x, w: (w @ x.t()).t(),
    "scale": lambda x, w: x * w[0],
    "twice": lambda x, w: F.linear(x, w) + F.linear(torch.tanh(x), w),
}


class _Random(nn.Module):
    """Operations one after another, on weights that may be shared or tied."""

    def __init__(self, ops: list[str], weights: list[int], tied: bool, leaf: bool) -> None:
        super().__init__()
        self.ops, self.order = ops, weights
        for index in set(weights):
            setattr(self, f"w{index}", nn.Parameter(torch.randn(3, 3)))
        if tied:
            self.twin = getattr(self, f"w{weights[0]}")
        self.leaf = nn.Linear(3, 3) if leaf else nn.Identity()

    def forward(self, x: Tensor) -> Any:
        kept = []
        for op, index in zip(self.ops, self.order):
            x = torch.relu(OPS[op](x, getattr(self, f"w{index}")))
            kept.append(x)
        x = self.leaf(x)
        if hasattr(self, "twin"):
            x = F.linear(x, self.twin)
        return x, {"kept": kept}


@st.composite
def graphs(draw: st.DrawFn) -> fx.GraphModule:
    count = draw(st.integers(1, 4))
    ops = draw(st.lists(st.sampled_from(sorted(OPS)), min_size=count, max_size=count))
    weights = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    model = _Random(ops, weights, draw(st.booleans()), draw(st.booleans()))
    dialect = draw(st.sampled_from(("symbolic", "symbolic", "symbolic", "export")))
    return traced(model, dialect, torch.randn(3, 3))


@settings(max_examples=60, deadline=None)
@given(
    model=graphs(),
    targets=st.sampled_from(["*", "w*", ["w0", "leaf"], "re:(w[02]|leaf.*)"]),
    options=st.fixed_dictionaries(
        {
            "p": st.floats(0, 1),
            "unit": st.sampled_from(["element", "input", "output", "tensor"]),
            "toward": st.sampled_from(["zero", "pretrained"]),
            "sampling": st.sampled_from(["batch", "batch", "example"]),
            "inference": st.sampled_from(["mean", "sample", "moments"]),
            "bias": st.booleans(),
        }
    ),
    copied=st.booleans(),
)
def test_random_graphs(model, targets, options, copied) -> None:
    before = GraphSnapshot(model)
    try:
        apply_dropconnect(model, targets, **options)
    except SurgeryError:
        event("refused")
        assert GraphSnapshot(model) == before
        return
    event("applied")
    x = torch.randn(3, 3)
    model(x)
    if copied:
        strip_dropconnect(copy.deepcopy(model))(x)
    strip_dropconnect(model)
    assert GraphSnapshot(model) == before
