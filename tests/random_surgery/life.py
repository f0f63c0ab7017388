"""What a model goes through beside the verbs: training, evaluation, files, copies, moves, errors."""

import contextlib
import copy
import io
import pickle
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import nn

from surgery import (
    SurgeryError,
    apply_dropconnect,
    bake_dropconnect,
    dropconnect_sites,
    hold_masks,
    plain_state_dict,
    raw_state_dict,
    set_inference,
    set_p,
    strip_dropconnect,
)
from surgery.modules.places import places, states_in
from surgery.modules.state import change_p
from surgery.spec.names import ANCHOR

from ..helpers import bits_of
from .choices import action, operate, options, target
from .oracle import check_late_backward, check_step
from .world import World, backward, dropping, objects, require, set_mode, shape, walk


@action(3)
def evaluate(world: World, rng: Random) -> Any:
    """In `eval()` it is the plain model, bit for bit, gradients too."""
    if not world.evaluated():
        return None
    way = rng.choice(["plain", "no_grad", "inference", "checkpoint", "autocast"])
    found: list[Any] = []
    for model in (world.model, world.twin):
        set_mode(model, False)
        model.zero_grad()
        try:
            out = backward(world.run(model, way=way)).clone()
            found.append((out, [p.grad for p in model.parameters()]))
        except (RuntimeError, NotImplementedError) as error:  # of a type that torch lacks
            found.append(type(error))
    one, other = found
    if isinstance(one, type) or isinstance(other, type):
        require(one is other, "eval fails as the plain model does", one, other)
        return way, one
    require(bits_of(one[0]) == bits_of(other[0]), "eval is the plain model, bit for bit", way)
    for mine, its in zip(one[1], other[1], strict=True):
        require(bits_of(mine) == bits_of(its), "gradients in eval are those of the plain model")
    world.both(lambda model: model.zero_grad())
    return way


@action(3)
def train(world: World, rng: Random) -> Any:
    """Steps of the optimiser, by several ways of running a forward."""
    operate(world, rng)
    way = rng.choice(["plain", "plain", "checkpoint", "reentrant", "autocast", "held"])
    if not world.trains(way):
        return None
    for _ in range(rng.randint(1, 2)):
        world.optimizer.zero_grad(set_to_none=rng.random() < 0.5)
        with contextlib.ExitStack() as stack:
            if way == "held" and world.operated:
                with contextlib.suppress(SurgeryError):  # gaussian noise
                    stack.enter_context(hold_masks(world.model))
            backward(world.run(world.model, way=way))
        world.optimizer.step()
    world.model.zero_grad()
    world.follow()
    return way


@action(3)
def train_by_formula(world: World, rng: Random) -> Any:
    if not operate(world, rng) or not world.trains():
        return None
    with contextlib.suppress(SurgeryError):  # gaussian noise
        found = check_step(world, rng.choice([1, 1, 2]))
        if rng.random() < 0.5:
            world.optimizer.step()
        world.model.zero_grad()
        world.follow()
        return found


@action(2)
def late(world: World, rng: Random) -> Any:
    """A backward after something else was done to the model that its forward ran."""
    operate(world, rng)
    if not world.trains():
        return None
    p, chosen, how = rng.random(), target(world, rng), options(rng)
    doings: dict[str, Callable[[], Any]] = {
        "strip": lambda: strip_dropconnect(world.model, missing_ok=True),
        "set_p": lambda: set_p(world.model, p),
        "inference": lambda: set_inference(world.model, "sample"),
        "extend": lambda: apply_dropconnect(world.model, chosen, p, **how),
        "copy": lambda: copy.deepcopy(world.model),
        "forward": lambda: world.run(world.model),
        "eval": lambda: world.both(lambda model: set_mode(model, False)),
        "schedule": lambda: change_p(states_in(world.model), factor=p),
        "hold": lambda: hold_masks(world.model).__enter__().close(),
        "zero": lambda: world.model.zero_grad(),
    }
    name = rng.choice(list(doings))
    found = check_late_backward(world, lambda: world.attempt(doings[name], ValueError))
    world.model.zero_grad()
    world.follow()
    return name, found


@action(2)
def in_a_hold(world: World, rng: Random) -> Any:
    """While masks are held, something else; when they are let go, nothing of them is left."""
    if not operate(world, rng) or not world.trains():
        return None
    p, chosen, how = rng.random(), target(world, rng), options(rng)
    part = rng.choice(list(dict(walk(world.model)).values()))
    given = {key: value.clone() for key, value in plain_state_dict(world.model).items()}
    doings: dict[str, Callable[[], Any]] = {
        "strip": lambda: strip_dropconnect(world.model),
        "strip a part": lambda: strip_dropconnect(part),
        "bake": lambda: bake_dropconnect(world.model, 1),
        "set_p": lambda: set_p(world.model, p),
        "extend": lambda: apply_dropconnect(world.model, chosen, p, **how),
        "load": lambda: world.model.load_state_dict(given),
        "move": lambda: world.both(lambda model: model.to(torch.float64)),
        "eval": lambda: world.both(lambda model: set_mode(model, False)),
        "fail": lambda: 1 / 0,
    }
    name = rng.choice(list(doings))
    try:
        with hold_masks(world.model):
            backward(world.run(world.model))
            world.attempt(doings[name], ValueError)
            if world.trains():
                backward(world.run(world.model))
    except (SurgeryError, ZeroDivisionError):  # the first: gaussian noise
        pass
    held = [place.state.held_key is not None or place.state.held for place in places(world.model)]
    require(not any(held), "nothing is held any more", name)
    world.optimizer.state.clear()
    world.model.zero_grad()
    world.follow()
    return name


@action(1)
def fail(world: World, rng: Random) -> Any:
    """An exception in the middle of a forward or of a backward."""

    class Boom(Exception):
        pass

    def boom(*args: Any) -> None:
        raise Boom

    name, module = rng.choice(list(walk(world.model)))
    where = rng.choice(["before", "after", "input", "backward"])
    before = objects(world.model, values=False), dropping(world.model)
    holding: Any = contextlib.nullcontext()
    if rng.random() < 0.3 and world.operated:
        with contextlib.suppress(SurgeryError):
            holding = hold_masks(world.model)
    handle = None
    if where == "before":
        handle = module.register_forward_pre_hook(boom)
    elif where == "after":
        handle = module.register_forward_hook(boom)
    try:
        with holding:
            if where == "input":
                world.run(world.model, width=5)
            out = world.run(world.model)
            if out.requires_grad and where == "backward":
                out.register_hook(boom)
                backward(out)
    except (Boom, ArithmeticError, AssertionError, LookupError, RuntimeError, ValueError):
        pass
    if handle is not None:
        handle.remove()
    after = objects(world.model, values=False), dropping(world.model)
    require(after == before, "after an exception all is as before", where, name)
    world.model.zero_grad()
    world.follow()
    return name, where


@action(2)
def reload(world: World, rng: Random) -> Any:
    """State dicts: raw, plain or renamed; other values, strictly, by copy or by assignment."""
    way, assign = rng.choice(["raw", "plain", "renamed"]), rng.random() < 0.4
    given = world.model.state_dict() if way == "raw" else plain_state_dict(world.model)
    given = {key: value.clone() for key, value in given.items()}
    for value in given.values():
        if value.is_floating_point():
            value.mul_(0.9)
    if way == "renamed":
        given = raw_state_dict(world.model, given)
    keys = list(given)
    plain = {k: v.clone() for k, v in plain_state_dict(world.model, given).items()}
    result = world.model.load_state_dict(given, strict=True, assign=assign)
    require(not any(result) and list(given) == keys, "every key is taken, and none is changed")
    world.twin.load_state_dict(plain, assign=assign)
    if assign:
        world.rebase()
    return way, assign


@action(1)
def spoil(world: World, rng: Random) -> Any:
    """A state dict that lacks a key, has one too many or a wrong shape is refused as torch does."""
    given = world.model.state_dict() if rng.random() < 0.5 else plain_state_dict(world.model)
    names = [name for name in given if not name.endswith(ANCHOR)]
    if not names:
        return None
    name = rng.choice(names)
    match rng.randrange(3):
        case 0:
            del given[name]
        case 1:
            given["nobody"] = torch.ones(1)
        case 2:
            given[name] = torch.ones(3, 1, 7)
    plain = plain_state_dict(world.model, given)
    ends = [_load(world.model, given), _load(world.twin, plain)]
    require(ends[0] == ends[1], "what torch refuses is refused, and nothing else", name, ends)
    return name


def _load(model: nn.Module, given: dict[str, Any]) -> type[Exception] | None:
    """How the load of a state dict ends."""
    try:
        model.load_state_dict(given, strict=True)
        return None
    except RuntimeError as error:
        return type(error)


def _through_pickle(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def _through_torch_save(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@action(2)
def duplicate(world: World, rng: Random) -> Any:
    """A copy has the same sites and strips to the twin; then the copy goes on, or the original."""
    way: Any = rng.choice([copy.deepcopy, _through_pickle, _through_torch_save])
    try:
        way(world.twin)
    except (AttributeError, RuntimeError):  # torch refuses: exported graphs, parametrized modules
        way = copy.deepcopy
    new = world.unchanged(lambda: way(world.model))
    require(dropconnect_sites(new) == dropconnect_sites(world.model), "a copy has the same sites")
    if rng.random() < 0.6:
        world.model = new
        world.rebase()
    elif world.operated:
        world.unchanged(lambda: strip_dropconnect(new))
        require(shape(new) == shape(world.twin), "a copy strips to the plain model")
    return way.__name__


@action(1)
def move(world: World, rng: Random) -> Any:
    """To another type, all of it or one part."""
    dtype = rng.choice([torch.float64, torch.float32, torch.bfloat16, torch.float16])
    name = rng.choice(["", *(key for key in world.twin._modules)])
    way = rng.choice(["to", "half", "double"])

    def moved(model: nn.Module) -> None:
        part = dict(walk(model))[name]
        part.to(dtype) if way == "to" else getattr(part, way)()

    world.both(moved)
    world.optimizer.state.clear()  # Adam does not take another type
    return name, dtype, way


@action(1)
def freeze(world: World, rng: Random) -> Any:
    index, flag = rng.randrange(max(1, len(world.own))), rng.random() < 0.6

    def frozen(model: nn.Module) -> None:
        for one in list(model.parameters())[index : index + 1]:
            one.requires_grad_(flag and one.is_floating_point())

    all_can = all(one.is_floating_point() for one in world.own)
    if all_can and rng.random() < 0.2:
        return world.both(lambda model: model.requires_grad_(flag))
    world.both(frozen)
    return index, flag


@action(2)
def switch(world: World, rng: Random) -> Any:
    """Train or evaluate, the whole or a part."""
    name, mode = rng.choice([n for n, _ in walk(world.twin)] + [""] * 5), rng.random() < 0.8
    world.both(lambda model: set_mode(dict(walk(model))[name], mode))
    return name, mode
