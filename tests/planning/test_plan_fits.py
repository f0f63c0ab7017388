"""A plan is for the weights that it was made for: kind and shape must match."""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import (
    Plan,
    Site,
    SurgeryError,
    apply_dropconnect,
    dropconnect_sites,
    load_dropconnect,
    plan_dropconnect,
    save_dropconnect,
)
from surgery.operating.suspend import reapplied

from ..helpers import Snapshot


class Experts(nn.Module):
    """Of no known kind."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


MODELS: dict[str, Any] = {
    "Linear": lambda: nn.Linear(8, 8),
    "smaller": lambda: nn.Linear(5, 3),
    "without bias": lambda: nn.Linear(8, 8, bias=False),
    "Conv1d": lambda: nn.Conv1d(8, 8, 1),
    "Conv2d": lambda: nn.Conv2d(8, 8, 1),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(8, 4, 1),
    "Embedding": lambda: nn.Embedding(8, 8),
    "vocabulary": lambda: nn.Embedding(9, 8),
    "Experts": lambda: Experts(8, 8),
}
"""Modules whose weight has the same name."""


def of(name: str, **options: Any) -> nn.Module:
    """A model of one module, operated."""
    return apply_dropconnect(nn.ModuleDict({"a": MODELS[name]()}), "a.weight", **options)


def refuses(put: Any, model: nn.Module, one: Site, two: Site) -> None:
    before = Snapshot(model)
    with pytest.raises(SurgeryError, match=r"a\.weight") as error:
        put()
    assert Snapshot(model) == before
    if "anchor" not in str(error.value):  # which is looked at first
        shape = "x".join(map(str, two.shape))
        assert f"kind {one.kind!r} and shape " in str(error.value)
        assert f"kind {two.kind!r} and shape {shape}. Plan anew" in str(error.value)


@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_kind_and_shape_must_match(toward: str, tmp_path: Path) -> None:
    """In a plan, in its JSON and in files; the model stays as it was."""
    sites = {name: dropconnect_sites(of(name))[0] for name in MODELS}
    for name, other in product(MODELS, MODELS):
        made = of(name, toward=toward)
        save_dropconnect(made, tmp_path)
        plan, model = dropconnect_sites(made), nn.ModuleDict({"a": MODELS[other]()})
        one, two = sites[name], sites[other]
        load = partial(load_dropconnect, model, tmp_path)
        if (one.kind, one.shape) == (two.kind, two.shape):
            assert dropconnect_sites(load()) == plan
            continue
        refuses(partial(apply_dropconnect, model, plan), model, one, two)
        read = Plan.from_json(plan.to_json())
        refuses(partial(plan_dropconnect, model, read), model, one, two)
        refuses(load, model, one, two)


def test_recurrent_and_attention_weights() -> None:
    for make, other in (
        (nn.LSTM, nn.GRU),
        (nn.RNN, nn.LSTM),
        (nn.LSTMCell, nn.GRUCell),
        (lambda n, m: nn.MultiheadAttention(n, 1), lambda n, m: nn.MultiheadAttention(2 * n, 1)),
    ):
        model = nn.ModuleDict({"a": make(4, 4)})
        plan = plan_dropconnect(model, "a")
        assert plan_dropconnect(model, plan) == plan
        with pytest.raises(SurgeryError, match=r"the plan has a weight of kind '.*' and shape"):
            apply_dropconnect(nn.ModuleDict({"a": other(4, 4)}), plan)


def test_every_user_of_a_tied_weight_has_its_shape() -> None:
    """Where they are not tied any more; their kinds may differ."""
    model = nn.ModuleDict({"a": nn.Embedding(8, 4), "b": nn.Linear(4, 8)})
    model["b"].weight = model["a"].weight
    plan = plan_dropconnect(model, "a")
    untied = nn.ModuleDict({"a": nn.Embedding(8, 4), "b": nn.Linear(4, 8)})
    assert [site.name for site in plan_dropconnect(untied, plan)] == ["a.weight", "b.weight"]
    untied["b"] = nn.Linear(4, 9)
    with pytest.raises(SurgeryError, match=r"b\.weight \(Linear\): the plan has .* shape 9x4\."):
        apply_dropconnect(untied, plan)


def test_a_graph_reads_the_weights_of_a_module() -> None:
    """What an operation tells of a weight is less than what a module does."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.conv = nn.Embedding(8, 4), nn.Conv1d(4, 4, 1)
            self.fc, self.attention = nn.Linear(4, 4), nn.MultiheadAttention(4, 1, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(self.words(x).transpose(1, 2)).transpose(1, 2)
            return self.fc(self.attention(h, h, h, need_weights=False)[0])

    x = torch.arange(6).view(2, 3)
    plan = plan_dropconnect(Net(), ["words", "conv", "fc", "attention"])
    graph = torch.export.export(Net().train(), (x,)).module()
    apply_dropconnect(graph, plan)
    assert [site.name for site in dropconnect_sites(graph)] == [site.name for site in plan]
    other = Net()
    other.words, other.fc = nn.Embedding(9, 4), nn.Linear(4, 4)
    graph = torch.export.export(other, (x,)).module()
    with pytest.raises(SurgeryError, match=r"words\.weight .*: the plan has .* shape 8x4 .* 9x4\."):
        apply_dropconnect(graph, plan)


def test_a_resized_weight(tmp_path: Path) -> None:
    """An operated vocabulary may grow; a plan that was made before is told what to do."""
    model = apply_dropconnect(nn.ModuleDict({"a": nn.Embedding(8, 4)}), "a")
    save_dropconnect(model, tmp_path)
    grown = nn.Parameter(torch.randn(9, 4))
    reapplied(model, lambda: setattr(model["a"], "weight", grown))
    assert dropconnect_sites(model)[0].shape == (9, 4)
    with pytest.raises(SurgeryError, match=r"if the weight was resized .* apply the plan before"):
        load_dropconnect(nn.ModuleDict({"a": nn.Embedding(9, 4)}), tmp_path)
