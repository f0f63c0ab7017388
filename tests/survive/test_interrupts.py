"""Ctrl-C anywhere leaves a model as it was or as it should become, never between.

`python -m tests.survive.interrupts` interrupts at every instruction, and prints how many landed.
"""

from __future__ import annotations

import pytest

from .interrupts import VERBS, by_signals, sweep

SPARSE = {
    "find": 9001,
    "resize": 4001,
    "load": 5003,
    "apply": 3001,
    "save": 3001,
    "graph: apply": 2003,
    "graph: strip": 1009,
}
"""Instructions from one interrupt to the next: about ten interrupts for each verb."""

pytestmark = pytest.mark.filterwarnings("ignore:.*never dropped:UserWarning")


@pytest.mark.parametrize("name", VERBS)
def test_interrupted_here_and_there(name: str) -> None:
    landed, wrong = sweep(VERBS[name], SPARSE.get(name, 997), start=101)
    assert landed > 0
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("everywhere", [False, True], ids=["ours", "everywhere"])
@pytest.mark.parametrize("name", VERBS)
def test_interrupted_often(name: str, everywhere: bool) -> None:
    _, wrong = sweep(VERBS[name], 293 if everywhere else 41, everywhere=everywhere)
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("name", VERBS)
def test_interrupted_by_signals(name: str) -> None:
    landed, wrong = by_signals(VERBS[name], 5.0)
    assert landed > 0
    assert not wrong
