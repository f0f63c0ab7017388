"""An operated graph in use: modes, p, held masks, checkpoints, moves, training, compiling."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx
from torch._dynamo.testing import CompileCounterWithBackend

from surgery import (
    apply_dropconnect,
    dropconnect_sites,
    hold_masks,
    load_dropconnect,
    plain_state_dict,
    save_dropconnect,
    set_p,
    strip_dropconnect,
)

from ..graphs import Functional, Mixed, P, about_torch, both_dialects, tokens, traced, train

pytestmark = about_torch


@both_dialects
def test_eval_is_the_plain_graph_and_training_is_of_the_nodes(dialect: str) -> None:
    x = torch.randn(3, 4)
    model = traced(Functional(), dialect, x)
    plain = model(x)
    apply_dropconnect(model, "*", p=P)
    assert not torch.equal(model(x), plain)
    torch.nn.Module.train(model, False)
    assert torch.equal(model(x), plain)
    assert not model.w_dropconnect.training
    torch.nn.Module.train(model, True)
    assert not torch.equal(model(x), plain)
    if dialect == "export":
        with pytest.raises(NotImplementedError, match=r"eval\(\) is not supported"):
            model.eval()


@both_dialects
def test_nodes_are_in_the_mode_of_the_graph(dialect: str) -> None:
    x = torch.randn(3, 4)
    model = traced(Functional(), dialect, x)
    train(model, False)
    plain = model(x)
    apply_dropconnect(model, "*", p=P)
    assert torch.equal(model(x), plain)


@both_dialects
def test_set_p_and_held_masks(dialect: str, keys) -> None:
    x = tokens()
    model = traced(Mixed(), dialect, x)
    plain = model(x)
    apply_dropconnect(model, "*", p=P)
    with hold_masks(model):
        assert torch.equal(model(x), model(x))
    assert not torch.equal(model(x), model(x))
    set_p(model, 0.0, "w")
    assert {s.name: s.p for s in dropconnect_sites(model)}["w"] == 0.0
    set_p(model, 0.0)
    assert torch.equal(model(x), plain)


@both_dialects
def test_loading_plain_and_raw_keys_also_into_copies(dialect: str) -> None:
    source = traced(Mixed(), dialect, tokens())
    model = traced(Mixed(), dialect, tokens())
    plain = {k: v.clone() for k, v in source.state_dict().items()}
    apply_dropconnect(model, "*", p=P, toward="pretrained")
    anchors = {k: v.clone() for k, v in model.state_dict().items() if k.endswith("_anchor")}
    for target in (model, copy.deepcopy(model), fx.GraphModule(model, model.graph)):
        result = target.load_state_dict(plain)
        assert not result.missing_keys
        assert not result.unexpected_keys
        assert plain_state_dict(target).keys() == plain.keys()
        assert all(torch.equal(v, plain[k]) for k, v in plain_state_dict(target).items())
        now = target.state_dict()
        assert all(torch.equal(now[k], v) for k, v in anchors.items())
        target.load_state_dict(model.state_dict())
        del now["w_anchor"]
        assert target.load_state_dict(now, strict=False).missing_keys == ["w_anchor"]


@both_dialects
def test_saving_and_loading_dropconnect(dialect: str, tmp_path) -> None:
    model = traced(Mixed(), dialect, tokens())
    apply_dropconnect(model, {"w": 0.2, "*": 0.3}, toward="pretrained")
    save_dropconnect(model, tmp_path)
    other = traced(Mixed(), dialect, tokens())
    load_dropconnect(other, tmp_path)
    assert dropconnect_sites(other) == dropconnect_sites(model)
    assert torch.equal(other.w_anchor, model.w_anchor)


def test_moving_moves_the_laws() -> None:
    model = fx.symbolic_trace(Functional())
    apply_dropconnect(model, "*", p=P)
    state = model.w_dropconnect.states["w"]
    assert state.law.scale.dtype == torch.float32
    model.double()
    assert state.law.scale.dtype == torch.float64
    model(torch.randn(2, 4, dtype=torch.float64)).sum().backward()


@both_dialects
def test_training_reaches_the_same_parameters(dialect: str) -> None:
    x = torch.randn(8, 4)
    model = traced(Functional(), dialect, x)
    parameters = list(model.parameters())
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    apply_dropconnect(model, "*", p=P)
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    old = [p.detach().clone() for p in parameters]
    model(x).square().sum().backward()
    early.step()
    strip_dropconnect(model)
    assert all(not torch.equal(a, b) for a, b in zip(old, parameters))


@both_dialects
def test_compiled_with_a_new_p(dialect: str) -> None:
    x = torch.randn(8, 4)
    model = traced(Functional(), dialect, x)
    apply_dropconnect(model, "*", p=P)
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=count)
    outputs = [compiled(x)]
    for p in (0.1, 0.7):
        set_p(model, p)
        outputs.append(compiled(x))
    assert count.frame_count == 1
    assert len({tuple(o.flatten().tolist()) for o in outputs}) == 3
    torch.manual_seed(3)
    found = compiled(x)
    torch.manual_seed(3)
    assert torch.allclose(found, model(x))
    found.sum().backward()


def test_tracing_an_operated_graph_is_refused() -> None:
    model = fx.symbolic_trace(Functional())
    apply_dropconnect(model, "*", p=P)
    with pytest.raises(RuntimeError, match="w: a graph with DropConnect cannot be traced again"):
        fx.symbolic_trace(model)
