"""What `"all-linear"` leaves out of models that are written as those of transformers and PEFT are."""

from __future__ import annotations

import pytest
from torch import nn

import surgery.adapters.conventions  # noqa: F401  the first plan loads it where it is installed
from surgery import plan_dropconnect


class Model(nn.Module):
    """A user's own, with a linear layer and other parts."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        for name, part in parts.items():
            self.add_module(name, part)


class Answers(Model):
    """It says which its output head is, as a model of transformers does."""

    def get_output_embeddings(self) -> nn.Module | None:
        return getattr(self, "head", None)


def linear() -> nn.Module:
    return nn.Linear(4, 4)


CASES = {
    "a head": (Answers(head=linear(), score=linear()), ["body", "score"]),
    "a classification head": (Answers(classifier=nn.Sequential(linear(), linear())), ["body"]),
    "the first classification head": (
        Answers(classifier=linear(), score=linear()),
        ["body", "classifier"],
    ),
    "inside another module": (
        nn.ModuleDict({"net": Answers(head=linear()), "head": linear()}),
        ["net.body", "head"],
    ),
    "a model that does not say": (
        Model(classifier=linear(), score=linear()),
        ["body", "classifier", "score"],
    ),
    "an adapter": (
        nn.ModuleDict({"query": Model(base_layer=linear(), lora_A=linear()), "key": linear()}),
        ["query.base_layer", "key"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_all_linear(case: str) -> None:
    model, expected = CASES[case]
    assert [site.module for site in plan_dropconnect(model, "all-linear")] == expected
