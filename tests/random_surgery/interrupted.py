"""A verb that is interrupted at any instruction leaves the model as it was or as it should become."""

import copy
from collections.abc import Callable
from random import Random
from typing import Any

from torch import nn

from surgery import (
    SurgeryError,
    apply_dropconnect,
    bake_dropconnect,
    hold_masks,
    mc_predict,
    plain_state_dict,
    set_inference,
    set_p,
    strip_dropconnect,
)

from ..survive.interrupts import AtOpcode, run_traced
from . import parts
from .choices import action, operate, options, rate, target
from .world import World, require, signature

LATEST = 3000
"""The last instruction at which one comes; most verbs on these models end before."""


def _verb(world: World, rng: Random) -> tuple[str, Callable[[nn.Module], Any]]:
    """A verb with its arguments, that can be called on any copy of the model."""
    p, how, chosen, seed = rate(rng), options(rng), target(world, rng), rng.randrange(99)
    mode: Any = rng.choice(["mean", "sample"])
    x = parts.fitting(world.model, world.x)

    def held(model: nn.Module) -> None:
        with hold_masks(model):
            model(x)

    verbs: dict[str, Callable[[nn.Module], Any]] = {
        "apply": lambda model: apply_dropconnect(model, chosen, p, **how),
        "strip": strip_dropconnect,
        "set_p": lambda model: set_p(model, p),
        "set_inference": lambda model: set_inference(model, mode),
        "bake": lambda model: bake_dropconnect(model, seed),
        "hold": held,
        "forward": lambda model: model(x),
        "predict": lambda model: mc_predict(model, x, samples=2, seed=seed),
        "deepcopy": copy.deepcopy,
        "load": lambda model: model.load_state_dict(plain_state_dict(model)),
    }
    name = rng.choice(list(verbs))
    return name, verbs[name]


@action(2)
def interrupt(world: World, rng: Random) -> Any:
    operate(world, rng)
    if not world.trains():
        return None
    name, verb = _verb(world, rng)
    done = copy.deepcopy(world.model)
    before = signature(world.model)
    try:
        verb(done)
    except (SurgeryError, ValueError):  # refused
        return None
    count = int(LATEST ** rng.random())
    landed = run_traced(lambda: verb(world.model), AtOpcode(count, everywhere=False))
    found = signature(world.model)
    whole = found in (before, signature(done))
    require(whole or not landed, "an interrupt leaves before or after:", name, count)
    world.follow()
    return name, count, landed
