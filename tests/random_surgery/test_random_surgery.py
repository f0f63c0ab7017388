"""A part of the random sequences; `make random COUNT=50000` plays any number.

A sequence that fails is played again, with the actions that its fault needs, by the command in its
message.
"""

from random import Random

import pytest
import torch
from torch import nn

from surgery import apply_dropconnect

from . import parts, verbs
from .play import command, many, play, shortest
from .world import World, dropping

OFTEN, SELDOM = 60, 30
"""Sequences of models and of graphs for each of the tests below: 300 in all."""


@pytest.fixture(autouse=True)
def threads():
    """What a sequence does depends on no other."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("first", range(0, 4 * OFTEN, OFTEN))
def test_models_beside_their_plain_twins(first: int) -> None:
    check(first, OFTEN, of_graphs=False)


@pytest.mark.parametrize("first", range(0, 2 * SELDOM, SELDOM))
def test_graphs_beside_their_plain_twins(first: int) -> None:
    check(first, SELDOM, of_graphs=True)


@pytest.mark.slow
@pytest.mark.parametrize("of_graphs", [False, True], ids=["models", "graphs"])
def test_many_more(of_graphs: bool) -> None:
    check(1000, 1000, of_graphs)


def check(first: int, count: int, of_graphs: bool) -> None:
    done, faults = many(first, count, of_graphs)
    assert sum(done.values()) > 5 * count
    assert not [(played.fault, command(played.seed, keep, of_graphs)) for played, keep in faults]


def test_strip_where_the_only_site_was_replaced() -> None:
    """What was around it is left, so that the model is not plain: strip has something to do."""
    model = parts.Net({"inner": parts.Net({"fc": nn.Linear(6, 6)}, ["fc"])}, ["inner"])
    world = World(model.double(), Random(0))
    apply_dropconnect(world.model, nn.Linear, inference="moments")
    for one in (world.model, world.twin):
        one.inner.fc = nn.Identity()
    world.rebase()
    assert not world.operated
    assert dropping(world.model)
    verbs.strip(world, Random(0))
    assert not dropping(world.model)
    world.check()


def test_a_fault_is_found_and_its_sequence_made_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself: a strip that does nothing."""
    monkeypatch.setattr(verbs, "strip_dropconnect", lambda model: model)
    played = next(one for one in map(play, range(20)) if one.fault is not None)
    keep = shortest(played.seed, played)
    again = play(played.seed, keep=keep)
    assert played.fault.startswith("Fault: nothing is left after strip")
    assert again.fault.startswith("Fault: nothing is left after strip")
    assert len(again.steps) <= len(played.steps)
    assert f"--seed {played.seed} --keep" in command(played.seed, keep, of_graphs=False)
