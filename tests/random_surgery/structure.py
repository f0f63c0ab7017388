"""Verbs on a part of the model, and changes of what the model is made of."""

import copy
from random import Random
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from surgery import (
    apply_dropconnect,
    bake_dropconnect,
    hold_masks,
    set_inference,
    set_p,
    strip_dropconnect,
)
from surgery.modules.places import states_in
from surgery.modules.state import change_p

from ..helpers import bits_of
from . import parts
from .choices import action, operate, options, rate
from .world import World, dropping, objects, require, set_mode, walk


@action(2)
def of_a_part(world: World, rng: Random) -> Any:
    """A verb that sees a part of the model alone."""
    operate(world, rng)
    # A weight that is read by somebody outside of the part cannot drop there, as a warning says.
    names = [name for name, _ in walk(world.twin) if not name.endswith(("out_proj", "inner.proj"))]
    name = rng.choice(names)
    part = dict(walk(world.model))[name]
    verb, seed = rng.choice(["apply", "strip", "set_p", "inference", "hold", "bake"]), rng.random()
    values = objects(world.model, values=verb != "bake")

    def done() -> None:
        match verb:
            case "apply":
                apply_dropconnect(part, rng.choice(["*", nn.Module]), rate(rng), **options(rng))
            case "strip":
                strip_dropconnect(part)
                require(not dropping(part), "nothing is left in a part that was stripped")
            case "set_p":
                set_p(part, seed)
            case "inference":
                set_inference(part, rng.choice(["mean", "sample", "moments"]))
            case "hold":
                with hold_masks(part):
                    if world.trains():
                        world.run(world.model)
                world.follow()
            case "bake":
                bake_dropconnect(part, int(seed * 99))
                world.follow()

    held = verb == "hold"
    if held:
        values = objects(world.model, values=False)
    result = world.attempt(done, ValueError) if not held else world.attempt(done)
    now = objects(world.model, values=verb not in ("bake", "hold"))
    require(now == values, "a verb on a part changes nothing of the plain model", verb)
    return name, verb, result


@action(1)
def schedule(world: World, rng: Random) -> Any:
    """What callbacks do with p."""
    operate(world, rng)
    factor = rng.choice([0.0, rng.random(), 1.0])
    change_p(states_in(world.model), factor=factor)
    return factor


@action(1)
def replace(world: World, rng: Random) -> Any:
    """Put a new part where another was."""
    found = [
        (name, key)
        for name, module in walk(world.twin)
        for key in module._modules
        if isinstance(module, parts.Net) and key not in ("borrowing", "shared")
    ]
    if not found:
        return None
    name, key = rng.choice(found)
    torch.default_generator.manual_seed(rng.randrange(2**32))
    new = parts.PARTS[rng.choice(["linear", "cell", "own", "recurrent"])](rng).double()
    for model in (world.model, world.twin):
        dict(walk(model))[name].add_module(key, copy.deepcopy(new))
    world.rebase()
    return name, key, type(new).__name__


@action(1)
def assign(world: World, rng: Random) -> Any:
    """A new parameter where another was, under its plain name; or None for a bias."""
    found = [
        (name, key)
        for name, module in walk(world.twin)
        for key, value in module._parameters.items()
        if value is not None and value.is_floating_point()
    ]
    if not found:
        return None
    name, key = rng.choice(found)
    old = dict(walk(world.twin))[name]._parameters[key]
    value = torch.randn_like(old) / 3
    for model in (world.model, world.twin):
        setattr(dict(walk(model))[name], key, nn.Parameter(value.clone(), old.requires_grad))
    world.rebase()
    return name, key


@action(1)
def tie(world: World, rng: Random) -> Any:
    """One weight for two modules, from now on."""
    seed, ties = rng.random(), []
    world.both(lambda model: ties.append(parts.tie(model, Random(seed))))
    require(ties[0] == ties[1], "owners of weights are found by their class and attribute")
    world.rebase()
    return ties[0]


@action(1)
def share(world: World, rng: Random) -> Any:
    """A second parent for a module, which may be operated."""
    names = [name for name, _ in walk(world.twin) if name and not name.startswith("shared")]
    if not names:
        return None
    name = rng.choice(names)
    if "shared" not in world.twin._modules:
        world.both(lambda model: model.add_module("shared", nn.ModuleDict()))
    world.both(lambda model: model.shared.add_module("again", dict(walk(model))[name]))
    world.rebase()
    return name


@action(1)
def remove(world: World, rng: Random) -> Any:
    """Take a part out, operated or not."""
    nets = [(n, m) for n, m in walk(world.twin) if isinstance(m, parts.Net) and len(m._modules) > 1]
    if not nets:
        return None
    name, module = rng.choice(nets)
    key = rng.choice(list(module._modules))

    def removed(model: nn.Module) -> None:
        owner: Any = dict(walk(model))[name]
        delattr(owner, key)
        owner.order = [one for one in owner.order if one != key]

    world.both(removed)
    world.rebase()
    return name, key


@action(1)
def hook(world: World, rng: Random) -> Any:
    """Hooks of the user, which stay."""
    name = rng.choice([name for name, _ in walk(world.twin)])
    kind = rng.choice(
        ["forward_pre", "forward", "full_backward", "state_dict_post", "load_state_dict_post"]
    )

    def hooked(model: nn.Module) -> None:
        getattr(dict(walk(model))[name], f"register_{kind}_hook")(parts.nothing)

    world.both(hooked)
    return name, kind


@action(1)
def functional(world: World, rng: Random) -> Any:
    """Other values for one forward, under the plain names."""
    named = dict(world.twin.named_parameters(remove_duplicate=False))
    is_tied = len(named) > len(world.own)  # then torch changes the order of parameters
    if is_tied or not world.evaluated() or not world.trains():
        return None
    values = {name: value.detach() * 0.5 for name, value in named.items()}
    x = parts.fitting(world.twin, world.x)
    world.both(lambda model: set_mode(model, False))
    outputs = [functional_call(model, values, (x,)) for model in (world.model, world.twin)]
    same = bits_of(outputs[0]) == bits_of(outputs[1])
    require(same, "functional_call takes plain names and computes what the plain model does")
    return None
