"""Ctrl-C anywhere leaves a model as it was or as it should become, never between.

`python -m tests.survive.interrupts` interrupts at every instruction, and prints how many landed.
"""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode

from surgery import apply_dropconnect, predict_moments
from surgery.base.caching import PerObject
from surgery.base.journal import Lock
from surgery.transforms import record

from ..internals import entries_of
from .interrupted_verbs import FLOATS, VERBS, Mlp, Verb
from .interrupts import (
    AtOpcode,
    by_signals,
    left_behind,
    run_traced,
    sweep,
    sweep_of,
)

SPARSE = {
    "find": 9001,
    "resize": 4001,
    "load": 5003,
    "apply": 3001,
    "save": 3001,
    "graph: apply": 2003,
    "graph: strip": 1009,
    "graph: bake": 1009,
}
"""Instructions from one interrupt to the next: about ten interrupts for each verb."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*never dropped:UserWarning"),
    # Between a file's opening and its `with`, or in a callback of a weak reference.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.mark.parametrize("name", VERBS)
def test_interrupted_here_and_there(name: str) -> None:
    tally = sweep(VERBS[name], SPARSE.get(name, 997), start=101)
    assert tally.landed > 0
    assert not tally.wrong


def times_torch_leaves_gradients_off(call: Callable[[nn.Module], object]) -> int:
    """At how many instructions of a call of a plain model an interrupt does that; each has to be one
    that the sweep excuses."""
    left_off = 0
    for count in itertools.count(1):
        model, tracer = nn.Linear(2, 2), AtOpcode(count, everywhere=True)
        model.register_buffer("anchor", torch.zeros(2))
        hit = run_traced(lambda: call(model), tracer)  # noqa: B023
        left = left_behind()
        if left:
            left_off += 1
            assert left.keys() <= tracer.torchs_own == {"gradients"}
        if not hit:
            break
    return left_off


@pytest.mark.slow
@pytest.mark.parametrize(
    "call",
    ["lambda m: m.load_state_dict(m.state_dict())", "copy.deepcopy"],
    ids=["load", "deepcopy"],
)
def test_torch_itself_leaves_gradients_off(call: str) -> None:
    """The one exception: it does in a plain model, and the sweep knows where. In a fresh process, where
    nobody has put anything around torch's functions."""
    code = "import copy, tests.survive.test_interrupts as t"
    code += f"\nassert t.times_torch_leaves_gradients_off({call}) > 0"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=Path(__file__).parents[2]).returncode == 0


def test_no_switch_of_the_thread_is_left_by_a_recording() -> None:
    """Contexts of Python code are left by instructions of their own: a mode that stays would see every
    function of the thread from now on, and the stance of the compiler would stay eager."""
    import torch._dynamo  # noqa: F401  # else there is no stance

    recorded = Verb(Mlp, lambda model: None, lambda model: record(model, FLOATS))
    tally = sweep_of(recorded, "recorded", "__enter__", "__exit__", "_push_mode", "_pop_mode")
    assert tally.landed > 100
    assert not tally.wrong


@pytest.mark.parametrize("form", [pytest.param("diagonal", marks=pytest.mark.slow), "outputs"])
def test_no_switch_of_the_thread_is_left_by_a_prediction(form: Any) -> None:
    """Also not by what the traceback of the interrupt holds, and lets go of later."""
    verb = Verb(
        Mlp,
        lambda model: apply_dropconnect(model, nn.Linear, p=0.5),
        lambda model: predict_moments(model, FLOATS, form),
    )
    tally = sweep_of(verb, "__enter__", "__exit__", "enter_context", "_push_cm_exit", "dispatch")
    assert tally.landed > 200
    assert not tally.wrong


def test_a_recorder_that_torch_puts_back_for_good_records_nothing() -> None:
    """Functions of torch take it away while it sees them, see `interrupts.py`."""
    seen: list[Any] = []

    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(_get_current_function_mode())
            return x + 1

    graph = record(Looks(), FLOATS).graph
    nodes = len(graph.nodes)
    assert graph is vars(seen[0])["_graph"] or nodes == len(vars(seen[0])["_graph"].nodes)
    with seen[0]:
        torch.relu(torch.ones(1)) + 1
    assert len(vars(seen[0])["_graph"].nodes) == nodes


def test_a_lock_is_never_left_taken() -> None:
    """At every instruction: else the next `set_p`, of any thread, would wait for ever."""
    for count in itertools.count(1):
        lock = Lock()
        hit = run_traced(lambda: lock.holding(int), AtOpcode(count, everywhere=True))  # noqa: B023
        other = threading.Thread(target=lock.holding, args=(int,), daemon=True)
        other.start()
        other.join(10)
        assert not other.is_alive()
        if not hit:
            break
    assert count > 20


def test_what_was_known_of_a_class_that_is_gone_is_not_said_of_another() -> None:
    """Its entry stays if the call that takes it away is interrupted, and a new class may lie there."""
    known: PerObject[type, str] = PerObject()
    gone, new = type("Gone", (), {}), type("New", (), {})
    known.get(gone, lambda cls: "gone")
    left = entries_of(known)[id(gone)]
    del gone
    gc.collect()
    entries_of(known)[id(new)] = left
    assert known.get(new, lambda cls: "new") == "new"


@pytest.mark.slow
@pytest.mark.parametrize("everywhere", [False, True], ids=["ours", "everywhere"])
@pytest.mark.parametrize("name", VERBS)
def test_interrupted_often(name: str, everywhere: bool) -> None:
    tally = sweep(VERBS[name], 293 if everywhere else 41, everywhere=everywhere)
    assert not tally.wrong


@pytest.mark.slow
@pytest.mark.parametrize("name", VERBS)
def test_interrupted_by_signals(name: str) -> None:
    tally = by_signals(VERBS[name], 5.0)
    assert tally.landed > 0
    assert not tally.wrong
