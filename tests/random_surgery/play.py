"""Sequences of random actions: play one, find which of its actions a fault needs, play many."""

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import nn

from . import graphs, parts
from .actions import FIRST, OF_GRAPHS, OF_MODELS
from .choices import Action
from .world import World

LENGTH = 12
"""Actions of the longest sequence."""

EXPECTED = (
    ".*never dropped",
    "Initializing zero-element tensors",
    "LSTM with projections is not supported with oneDNN",
    ".*LeafSpec",  # of torch.export, as the next
    "The tensor attributes",
    "For backward hooks to be called",  # of Gaussians, as docs/limits.md says
    "Full backward hook is firing",  # of torch, as the next
    "None of the inputs have requires_grad",  # of torch's reentrant checkpoint
    "Converting a tensor with requires_grad=True to a scalar",
)
"""Warnings that say what is so; any other is a fault."""


@dataclass
class Played:
    """What one sequence was."""

    seed: int
    steps: list[str] = field(default_factory=list)
    fault: str | None = None
    where: str = ""
    """The lines of code that the fault came through."""


def play(
    seed: int,
    make: Callable[[Random], nn.Module] = parts.model,
    actions: Sequence[Action] = OF_MODELS,
    keep: Sequence[int] | None = None,
) -> Played:
    """Play the sequence of a seed; with `keep`, only these of its actions."""
    played = Played(seed)
    rng = Random(f"{seed}: model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for message in EXPECTED:
            warnings.filterwarnings("ignore", message)
        torch.default_generator.manual_seed(seed)
        model = make(rng)
        world = World(model, rng)
        played.steps.append(f"model: {model}")
        names = rng.choices(actions, k=rng.randint(3, LENGTH))
        # Most sequences begin with surgery.
        names[0] = FIRST if rng.random() < 0.8 else names[0]
        try:
            world.check()
            for index, one in enumerate(names):
                if keep is not None and index not in keep:
                    continue
                played.steps.append(f"{index}: {one.__name__}")
                own = Random(f"{seed}: {index}")
                torch.default_generator.manual_seed(own.randrange(2**32))
                note = one(world, own)
                if note is not None:
                    played.steps[-1] += f" {note}"
                world.check()
        except Exception as error:
            played.fault = f"{type(error).__name__}: {error}"
            played.where = traceback.format_exc()
    return played


def shortest(seed: int, fault: Played, **how: Any) -> list[int]:
    """The actions of a sequence that its fault needs, found by leaving one out after another."""
    keep = [int(step.split(":")[0]) for step in fault.steps[1:]]
    for index in reversed(keep[:-1]):
        fewer = [one for one in keep if one != index]
        again = play(seed, keep=fewer, **how)
        if again.fault is not None and again.fault.split(":")[0] == str(fault.fault).split(":")[0]:
            keep = fewer
    return keep


def how(of_graphs: bool) -> dict[str, Any]:
    """What is played: models and what is done to them, or graphs."""
    return {"make": graphs.model, "actions": OF_GRAPHS} if of_graphs else {}


def many(
    first: int, count: int, of_graphs: bool
) -> tuple[Counter[str], list[tuple[Played, list[int]]]]:
    """Play so many; how often each action was done, and the faults, each with the actions it needs."""
    torch.set_num_threads(1)
    done: Counter[str] = Counter()
    faults = []
    for seed in range(first, first + count):
        played = play(seed, **how(of_graphs))
        done.update(step.split()[1] for step in played.steps[1:])
        if played.fault is not None:
            faults.append((played, shortest(seed, played, **how(of_graphs))))
    return done, faults


def command(seed: int, keep: Sequence[int], of_graphs: bool) -> str:
    """What plays some of the actions of a sequence again."""
    flag = "--graphs " if of_graphs else ""
    kept = ",".join(map(str, keep))
    return f"python -m tests.random_surgery {flag}--seed {seed} --keep {kept}"
