"""Canaries of what is known of activation checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from surgery.torch_private import checkpoints
from surgery.torch_private.checkpoints import Around

from .canary import canary


def seen_by(run: Any) -> list[Around]:
    """What a function sees around itself that `run` is given."""
    found: list[Around] = []

    def looks(x: Tensor) -> Tensor:
        found.append(checkpoints.around())
        return x.sin()

    run(looks)
    return found


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@canary(
    checkpoints,
    "torch.utils.checkpoint._checkpoint_hook",
    "torch.utils.checkpoint._checkpoint_impl",
    "sys._getframe",
)
def test_both_runs_have_one_checkpoint(reentrant: bool) -> None:
    def run(f: Any) -> None:
        x = torch.ones(2, requires_grad=True)
        y = checkpoint(f, x, use_reentrant=reentrant).sum()
        for _ in range(2):
            y.backward(retain_graph=True)

    first, again, third = seen_by(run)
    assert len(first.first) == 1
    assert first.again is None
    for one in (again, third):
        assert one.again is first.first[0]
        assert one.first == []
    assert again.run != third.run
    first.first[0].own = 1  # takes attributes


@canary(checkpoints, "torch.utils.checkpoint._checkpoint_hook")
def test_nested() -> None:
    def run(f: Any) -> None:
        def inner(x: Tensor) -> Tensor:
            return checkpoint(f, x, use_reentrant=False).cos()

        x = torch.ones(2, requires_grad=True)
        checkpoint(inner, x, use_reentrant=False).sum().backward()

    first, *later = seen_by(run)
    assert len(first.first) == 2
    inner, outer = first.first
    assert inner is not outer
    assert [one.again for one in later] == [outer, inner]
    assert [len(one.first) for one in later] == [1, 0]
    assert outer not in later[0].first


def test_none() -> None:
    assert checkpoints.around() == Around([], None, -1)
