"""TorchScript has no masks: `torch.jit.script`, and `torch.jit.trace` of what drops, say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import surgery.transforms.operating.graph_surgeon  # noqa: F401  (what the entry point of torch.fx imports)
from surgery import SurgeryError, apply_dropconnect, set_p, strip_dropconnect

from ..steps import assert_same, tensors
from ..zoo.subjects import BY_NAME, Subject

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, about jit

OPTIONS = {
    "batch": {},
    "example": {"sampling": "example"},
    "gaussian": {"sampling": "gaussian"},
    "moments": {"inference": "moments"},
}


def check(model: nn.Module, x: torch.Tensor, sites: tuple[str, ...]) -> None:
    named = "|".join(sites)
    sentence = rf"({named}) is masked, and torch.jit.{{}}.*call strip_dropconnect first"
    before = tensors(model)
    for compile_, name in (
        (torch.jit.script, "script"),
        (lambda m: torch.jit.trace(m, x), "trace"),
    ):
        for context in (torch.enable_grad, torch.no_grad):
            with context(), pytest.raises(SurgeryError, match=sentence.format(name)):
                compile_(model)
    model.eval()
    # Attention takes another path the second time, also in the plain model.
    torch.testing.assert_close(torch.jit.trace(model, x, check_trace=False)(x), model(x))
    model.train()
    set_p(model, 0.0)
    torch.testing.assert_close(torch.jit.trace(model, x, check_trace=False)(x), model(x))
    assert_same(tensors(model), before)
    strip_dropconnect(model)


def test_each_kind(subject: Subject) -> None:
    check(subject.operated(), subject.inputs(), subject.sites)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_each_sampling(options: dict[str, Any]) -> None:
    subject = BY_NAME["linear"]
    check(subject.operated(**options), subject.inputs(), subject.sites)
    graph = torch.fx.symbolic_trace(subject.plain())
    apply_dropconnect(graph, list(subject.targets), p=0.5, **options)
    check(graph, subject.inputs(), subject.sites)


def test_a_node_of_a_graph() -> None:
    graph = torch.fx.symbolic_trace(BY_NAME["parent-read"].plain())
    check(
        apply_dropconnect(graph, "proj", p=0.5), BY_NAME["parent-read"].inputs(), ("proj.weight",)
    )


def test_sampling_in_eval_is_refused_too() -> None:
    subject = BY_NAME["linear"]
    model = subject.operated(inference="sample").eval()
    with torch.no_grad(), pytest.raises(SurgeryError, match="strip_dropconnect first"):
        torch.jit.trace(model, subject.inputs())
