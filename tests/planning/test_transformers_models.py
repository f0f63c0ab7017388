"""Selection and ties on transformers' own models, built small from their configs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from surgery import apply_dropconnect, plan_dropconnect, strip_dropconnect
from surgery.modules import kind_of

from ..helpers import Snapshot

transformers = pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D  # noqa: E402

MODELS = ("gpt2", "bert", "t5")
every_model = pytest.mark.parametrize("name", MODELS)

HEADS = {"gpt2": "lm_head", "bert": "classifier", "t5": "lm_head"}


def linears(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_is_every_linear_except_the_head(name: str, tiny) -> None:
    model = tiny(name)
    found = [site.module for site in plan_dropconnect(model, "all-linear")]
    assert found == [linear for linear in linears(model) if linear != HEADS[name]]
    assert HEADS[name] in linears(model)


def test_conv1d_is_a_kind_of_its_own(tiny) -> None:
    assert kind_of(Conv1D(4, 4)).name == "conv1d"
    kinds = {site.kind for site in plan_dropconnect(tiny("gpt2"), "all-linear")}
    assert kinds == {"conv1d"}


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_tied_embeddings_are_one_site(name: str, tiny) -> None:
    model = tiny(name)
    embedding = model.get_input_embeddings()
    names = {m: n for n, m in model.named_modules()}
    (site,) = plan_dropconnect(model, names[embedding])
    users = [n for n, p in model.named_parameters(remove_duplicate=False) if p is embedding.weight]
    assert site.name == f"{names[embedding]}.weight"
    assert list(site.shared_with) == [name for name in users if name != site.name]
    assert "lm_head.weight" in site.shared_with


@every_model
@pytest.mark.parametrize("targets", ["all-linear", "*"])
def test_round_trip(name: str, targets: str, tiny) -> None:
    model = tiny(name)
    before = Snapshot(model)
    apply_dropconnect(model, targets, p=0.3, toward="pretrained")
    strip_dropconnect(model)
    assert Snapshot(model) == before


def inputs(model: nn.Module) -> dict[str, Any]:
    ids = torch.randint(0, 99, (2, 5))
    labels = torch.tensor([0, 1]) if isinstance(model, transformers.BertPreTrainedModel) else ids
    return {"input_ids": ids, "labels": labels}


@every_model
def test_every_site_draws_one_mask_in_a_training_step(name: str, keys, tiny) -> None:
    """A tied weight is drawn by each of its users; T5's encoder and decoder share an embedding."""
    model = apply_dropconnect(tiny(name), "all-linear", p=0.3).train()
    model(**inputs(model)).loss.backward()
    assert len(keys) == len(plan_dropconnect(tiny(name), "all-linear"))
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@every_model
def test_eval_is_the_plain_model(name: str, tiny) -> None:
    model = tiny(name).eval()
    batch = inputs(model)
    with torch.no_grad():
        expected = model(**batch).logits
        apply_dropconnect(model, "*", p=0.3)
        assert torch.equal(model(**batch).logits, expected)
