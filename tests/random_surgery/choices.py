"""What actions choose at random, and the table of them."""

from collections.abc import Callable
from random import Random
from typing import Any

from torch import nn

from surgery import apply_dropconnect

from .world import World, walk

Action = Callable[[World, Random], Any]
"""Does something to a model and to its twin, and says what. It has random numbers of its own, so that a
sequence stays the same when some of its actions are left out."""

ACTIONS: list[Action] = []


def action(times: int = 1) -> Callable[[Action], Action]:
    """Registers what is to be done that often, beside the others."""

    def registered(one: Action) -> Action:
        ACTIONS.extend([one] * times)
        return one

    return registered


CLASSES = [
    nn.Linear,
    nn.Conv1d,
    nn.Embedding,
    nn.LSTM,
    nn.MultiheadAttention,
    nn.GRUCell,
    nn.Module,
]


def escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "[*?" else c for c in name)


def target(world: World, rng: Random) -> Any:
    """Something that `targets` takes: of every form, and some that match nothing."""
    weights = [n for n, p in world.twin.named_parameters(remove_duplicate=False) if p.requires_grad]
    if weights and rng.random() < 0.5:
        chosen = [escaped(one) for one in rng.sample(weights, min(len(weights), rng.randint(1, 3)))]
        return chosen[0] if rng.random() < 0.5 else chosen
    name = rng.choice([name for name, _ in walk(world.twin)])
    match rng.randrange(7):
        case 0:
            return "*"
        case 1:
            return rng.choice(CLASSES)
        case 2:
            return f"re:.*{rng.choice(['weight', 'fc', 'w', '[0-9]'])}.*"
        case 3:
            return "all-linear"
        case 4:
            return lambda full, module: full == name
        case 5:
            return {rng.choice(CLASSES): rng.random(), "*": 0.25}
        case _:
            return [escaped(name) or "*", rng.choice(CLASSES)]


def place_name(world: World, rng: Random) -> Any:
    """A site, by its name, or something that need not be one."""
    sites = world.sites
    return escaped(rng.choice(sites)) if sites and rng.random() < 0.7 else target(world, rng)


def operate(world: World, rng: Random) -> bool:
    """Whether the model is operated now: some of its weights, if none was and any can be."""
    if not world.operated:
        world.attempt(lambda: apply_dropconnect(world.model, target(world, rng), rng.random()))
    return world.operated


def options(rng: Random) -> dict[str, Any]:
    found = {
        "unit": rng.choice(["element"] * 3 + ["input", "output", "tensor"]),
        "toward": rng.choice(["zero", "pretrained"]),
        "sampling": rng.choice(["batch"] * 5 + ["example", "gaussian"]),
        "inference": rng.choice(["mean"] * 6 + ["sample", "moments"]),
        "bias": rng.random() < 0.3,
        "ranks": rng.choice(["independent", "same"]),
    }
    if rng.random() < 0.1:
        found["generator"] = rng.randrange(99)
    return {key: value for key, value in found.items() if rng.random() < 0.6}


def rate(rng: Random) -> float:
    return rng.choice([0.0, 1.0, rng.random(), rng.random(), rng.random()])
