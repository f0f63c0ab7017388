"""What graph surgery refuses, naming node, site and fix, with the graph unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from surgery import (
    NoMatchError,
    SurgeryError,
    apply_dropconnect,
    dropconnect_sites,
    plan_dropconnect,
)

from ..graphs import (
    Functional,
    GraphSnapshot,
    Mixed,
    P,
    Tied,
    about_torch,
    both_dialects,
    by_hand,
    tokens,
    traced,
)

pytestmark = about_torch


def refusal(model: nn.Module, *args: Any, **kwargs: Any) -> str:
    before = GraphSnapshot(model)
    with pytest.raises(SurgeryError) as caught:
        apply_dropconnect(model, *args, **kwargs)
    with pytest.raises(SurgeryError):
        plan_dropconnect(model, *args, **kwargs)
    assert GraphSnapshot(model) == before
    return str(caught.value)


class TestRefusals:
    def test_a_weight_that_no_node_uses(self) -> None:
        model = fx.symbolic_trace(Functional())
        model.unused = nn.Parameter(torch.randn(3, 3))
        text = refusal(model, "unused", p=P)
        assert "unused" in text
        assert "no node of the graph uses it; exclude it" in text

    def test_another_name_is_used(self) -> None:
        model = fx.symbolic_trace(Functional())
        model.other = model.w
        assert "under this name (but as 'w')" in refusal(model, "other", p=P)

    @both_dialects
    @pytest.mark.parametrize("mode", ["example", "gaussian"])
    def test_per_example_masks_where_there_is_no_product(self, dialect: str, mode: str) -> None:
        model = traced(Tied(), dialect, tokens())
        text = refusal(model, "both", p=P, sampling=mode)
        assert f"sampling='{mode}' needs one matrix product that alone reads the weight" in text
        assert "node 'linear' (linear), node 'matmul' (matmul)" in text
        assert "use sampling='batch'" in text

    def test_an_lstm_node(self) -> None:
        model = traced(Mixed(), "export", tokens())
        text = refusal(model, "lstm", p=P, sampling="example")
        assert "lstm.weight_hh_l0" in text
        assert "node 'lstm' (lstm)" in text

    @pytest.mark.parametrize("between", ["norm", "larger"])
    def test_what_gives_a_tensor_may_stand_before_a_softmax(self, between: str) -> None:
        model = fx.symbolic_trace(_Between(between)).eval()
        apply_dropconnect(model, "fc", p=P, inference="moments")
        assert model(torch.randn(2, 3, 4)).sum().item() == pytest.approx(6)  # rows that add up to 1

    def test_in_place_writes(self) -> None:
        model = by_hand(
            lambda g, x: g.call_method("add_", (g.get_attr("w"), x)), w=torch.randn(2, 4)
        )
        assert "node 'add_' writes into it" in refusal(model, "w", p=P)

    def test_embedding_options(self) -> None:
        model = by_hand(
            lambda g, x: g.call_function(F.embedding, (x, g.get_attr("w")), {"max_norm": 1.0}),
            w=torch.randn(7, 4),
        )
        assert "has max_norm" in refusal(model, "w", p=P)
        model = by_hand(
            lambda g, x: g.call_function(
                torch.ops.aten.embedding.default, (g.get_attr("w"), x, -1, False, True)
            ),
            w=torch.randn(7, 4),
        )
        assert "has a sparse gradient" in refusal(model, "w", p=P)

    def test_names_that_are_taken(self) -> None:
        model = fx.symbolic_trace(Functional())
        model.w_dropconnect = nn.Identity()
        assert "already has an attribute 'w_dropconnect'" in refusal(model, "w", p=P)

    def test_a_bias_that_cannot_share_its_weights_mask(self) -> None:
        model = traced(Mixed(), "export", tokens())
        text = refusal(model, "conv", p=P, unit="output", bias=True)
        assert "needs one node for weight and bias" in text
        assert "'conv1d'" in text
        assert "use bias=False" in text


class _Between(nn.Module):
    def __init__(self, between: str) -> None:
        super().__init__()
        self.fc, self.norm, self.between = nn.Linear(4, 3), nn.InstanceNorm1d(3), between

    def forward(self, x):
        u = self.fc(x)
        if self.between == "norm":
            return self.norm(u).softmax(-1)
        return torch.cat([u, torch.max(u, -u)], -1).softmax(-1)


def test_a_part_without_its_graph_is_not_what_it_was_in_it() -> None:
    """Nobody reads its parameters then, whatever an earlier call has seen in the graph."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.fc = Functional(), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.inner(x))

    model = fx.symbolic_trace(Outer())
    apply_dropconnect(model, nn.Linear)
    before = GraphSnapshot(model)
    with pytest.raises(NoMatchError, match="none has weights that are dropped by default"):
        apply_dropconnect(model.inner, nn.Module)
    with pytest.raises(SurgeryError, match="nor a parent's reads it"):
        apply_dropconnect(model.inner, "w")
    assert GraphSnapshot(model) == before
    apply_dropconnect(model, ["inner.w", "inner.v"])
    assert len(dropconnect_sites(model)) == 3
