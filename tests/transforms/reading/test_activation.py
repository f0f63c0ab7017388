"""The activation that follows each use of a weight: across views, writes in place and nested graphs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from surgery.spec.plan import Use
from surgery.transforms.capture.capture import capture_of
from surgery.transforms.reading.find import find

from .test_find import After, every_dialect, exported_graph, found

SQRT = math.sqrt(2 / math.pi)

FOLLOWED: dict[str, tuple[Any, str | None]] = {
    "module": (nn.ReLU(), "relu"),
    "module in place": (nn.ReLU(inplace=True), "relu"),
    "function": (F.relu, "relu"),
    "method": (lambda x: x.relu(), "relu"),
    "method in place": (lambda x: x.relu_(), "relu"),
    "clamp": (lambda x: x.clamp(min=0), "relu"),
    "maximum": (lambda x: torch.where(x > 0, x, 0.0 * x), "relu"),
    "gelu module": (nn.GELU(), "gelu"),
    "gelu function": (F.gelu, "gelu"),
    "gelu tanh module": (nn.GELU(approximate="tanh"), "gelu_tanh"),
    "gelu tanh function": (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
    "gelu erf": (lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), "gelu"),
    "gelu_new": (
        lambda x: 0.5 * x * (1.0 + torch.tanh(SQRT * (x + 0.044715 * torch.pow(x, 3.0)))),
        "gelu_new",
    ),
    "gelu_new multiplied out": (
        lambda x: x / 2 + x / 2 * torch.tanh(SQRT * x * (1 + 0.044715 * x * x)),
        "gelu_new",
    ),
    "gelu_fast": (
        lambda x: 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
        "gelu_new",
    ),
    "quick_gelu": (lambda x: x * torch.sigmoid(1.702 * x), "quick_gelu"),
    "silu module": (nn.SiLU(), "silu"),
    "silu decomposed": (lambda x: x * x.sigmoid(), "silu"),
    "silu by exp": (lambda x: x / (1 + torch.exp(-x)), "silu"),
    "mish": (lambda x: x * torch.tanh(F.softplus(x)), "mish"),
    "hardswish": (lambda x: x * F.relu6(x + 3) / 6, "hardswish"),
    "tanh": (torch.tanh, "tanh"),
    "sigmoid": (nn.Sigmoid(), "sigmoid"),
    "softmax": (lambda x: x.softmax(-1), "softmax"),
    "log softmax module": (nn.LogSoftmax(-1), "log_softmax"),
    "leaky relu": (nn.LeakyReLU(0.2), "leaky_relu"),
    "elu": (F.elu, "elu"),
    "softplus": (nn.Softplus(), "softplus"),
    "squared relu": (lambda x: F.relu(x) ** 2, "relu"),
    "through views": (lambda x: F.relu(x.view(2, 2, 2).transpose(1, 2)).reshape(2, 4), "relu"),
    "through casts": (lambda x: F.gelu(x.double()).to(x.dtype), "gelu"),
    "through dropout": (lambda x: F.relu(F.dropout(x, 0.3, training=False)), "relu"),
    "gate": (lambda x: F.silu(x) * x.sum(), None),
    "glu": (lambda x: torch.cat([F.glu(x)] * 2, -1), "glu"),
    "glu by hand": (lambda x: _gated(x, torch.sigmoid), "glu"),
    "swiglu": (lambda x: _gated(x, F.silu), "swiglu"),
    "geglu": (lambda x: _gated(x, F.gelu), "geglu"),
    "reglu": (lambda x: _gated(x, F.relu), "reglu"),
    "an added gate": (lambda x: _gated(x, F.silu, torch.add), None),
    "nothing": (lambda x: x, None),
    "a scale": (lambda x: F.relu(0.5 * x), None),
    "a constant": (lambda x: F.relu(x + 1.0), None),
    "a residual": (lambda x: F.relu(x + x.sum()), None),
    "a norm": (lambda x: F.relu(F.layer_norm(x, (4,))), None),
    "soft cap": (lambda x: torch.tanh(x / 30) * 30, None),
    "two activations": (lambda x: F.relu(x) + F.gelu(x) * x.sum(), None),
    "the same twice": (lambda x: F.relu(x) @ torch.ones(4, 4) + F.relu(x), "relu"),
}


def _gated(x: Tensor, activation: Callable[[Tensor], Tensor], joined: Any = torch.mul) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.cat([joined(activation(gate), up)] * 2, -1)


@every_dialect
@pytest.mark.parametrize("name", FOLLOWED)
def test_the_activation_that_follows(name: str, dialect: str) -> None:
    after, activation = FOLLOWED[name]
    findings = found(After(after), torch.randn(2, 4), dialect)
    for parameter in ("fc.weight", "fc.bias"):
        assert findings[parameter] == (Use(op="linear", by="fc", activation=activation),)


@every_dialect
def test_a_bias_that_is_added_apart(dialect: str) -> None:
    model = After(lambda x: F.relu(x + model.bias))
    findings = found(model, torch.randn(2, 4), dialect)
    assert findings["fc.weight"] == (Use(op="linear", by="fc", activation="relu"),)
    assert findings["bias"] == (Use(op="add", by="", activation="relu"),)


@pytest.mark.parametrize("dialect", ["recorded", "symbolic"])
def test_a_value_that_is_overwritten_in_part_is_not_followed(dialect: str) -> None:
    def after(x: Tensor) -> Tensor:
        x[:, 0] = 1.0
        return F.relu(x)

    if dialect == "symbolic":
        with pytest.raises(TypeError, match="item assignment"):
            found(After(after), torch.randn(2, 4), dialect)
    else:
        findings = found(After(after), torch.randn(2, 4), dialect)
        assert findings["fc.weight"] == (Use(op="linear", by="fc"),)


@every_dialect
@pytest.mark.parametrize("reads", ["the first name", "the second name"])
def test_an_in_place_activation_acts_on_later_readers(dialect: str, reads: str) -> None:
    def after(x: Tensor) -> Tensor:
        y = x.add_(model.bias)
        x.relu_()
        return (x if reads == "the first name" else y) @ torch.ones(4, 4)

    model = After(after)
    findings = found(model, torch.randn(2, 4), dialect)
    assert findings["fc.weight"] == (Use(op="linear", by="fc", activation="relu"),)
    assert findings["bias"] == (Use(op="add", by="", activation="relu"),)


class KeepGraphs(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, fx.GraphModule) or super().is_leaf_module(module, name)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.Linear(4, 4)))
        self.w, self.fc = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.inner(self.fc(x))), self.w).relu()


NESTED = {
    "w": (Use(op="linear", by="", activation="relu"),),
    "inner.1.weight": (Use(op="linear", by="inner.1", activation="tanh"),),
    "inner.1.bias": (Use(op="linear", by="inner.1", activation="tanh"),),
    "fc.weight": (Use(op="linear", by="fc", activation="relu"),),
    "fc.bias": (Use(op="linear", by="fc", activation="relu"),),
}


@pytest.mark.parametrize("inputs", [None, torch.ones(2, 4)], ids=["traced", "recorded"])
def test_activations_are_followed_across_nested_graphs(inputs: Tensor | None) -> None:
    outer = Outer()
    graph = fx.GraphModule(outer, KeepGraphs().trace(outer))
    before = str(graph.graph), dict(graph.meta)
    assert dict(find(graph, inputs)) == NESTED
    assert (str(graph.graph), dict(graph.meta)) == before


@pytest.mark.parametrize("inputs", [None, torch.ones(2, 4)], ids=["walked", "recorded"])
def test_in_a_graph_the_graph_itself_runs_what_was_written_out(inputs: Tensor | None) -> None:
    graph = exported_graph(Outer(), torch.ones(2, 4))
    findings = find(graph, inputs)
    assert {name: uses[0].op for name, uses in findings.items()} == dict.fromkeys(NESTED, "linear")
    assert [use.by for uses in findings.values() for use in uses] == [""] * 5
    assert {n: u[0].activation for n, u in findings.items()} == {
        n: u[0].activation for n, u in NESTED.items()
    }
    assert capture_of(graph) is None
