"""The public verbs, as actions."""

import contextlib
import copy
import tempfile
from dataclasses import replace
from random import Random
from typing import Any

import torch
from torch import fx, nn

from surgery import (
    NoMatchError,
    NotOperatedError,
    Plan,
    Site,
    apply_dropconnect,
    bake_dropconnect,
    dropconnect,
    dropconnect_sites,
    hold_masks,
    load_dropconnect,
    mc_predict,
    plan_dropconnect,
    predict_moments,
    save_dropconnect,
    set_inference,
    set_p,
    strip_dropconnect,
)
from surgery.modules.operated import plain_class
from surgery.modules.places import places

from ..helpers import bits_of
from ..transforms.graphs import unnamed
from . import parts
from .choices import action, operate, options, place_name, rate, target
from .world import World, class_of, dropping, objects, require, set_mode, walk


@action(5)
def apply(world: World, rng: Random) -> Any:
    """Operate, or extend. What is planned is what is done."""
    chosen, how = target(world, rng), options(rng)
    exclude = target(world, rng) if rng.random() < 0.2 else None
    if rng.random() < 0.15:
        how["example_inputs"] = parts.fitting(world.model, world.x)
    p, before = rate(rng), world.sites
    plan: list[Any] = []

    def planned() -> None:
        plan.append(plan_dropconnect(world.model, chosen, p, exclude=exclude, **how))

    if rng.random() < 0.5:
        can = world.attempt(planned, ValueError)
        if can and rng.random() < 0.5:
            how = {key: how[key] for key in ("generator", "example_inputs") if key in how}
            chosen, p, exclude = plan[0], None, None
    values = objects(world.model)
    done = world.attempt(
        lambda: apply_dropconnect(world.model, chosen, p, exclude=exclude, **how),
        ValueError,
        values=values,
    )
    require(objects(world.model) == values, "apply changes nothing of the plain model")
    if plan:
        require(done, "what is planned can be applied")
        wanted = set(before) | {site.name for site in plan[0]}
        require(set(world.sites) == wanted, "what is planned is what is done:", wanted)
    return chosen, p, exclude, how, done


@action(2)
def strip(world: World, rng: Random) -> Any:
    """The plain model, with the same objects and bits; also where no site is left and something is
    around where they were."""
    if not operate(world, rng) and not dropping(world.model):
        with contextlib.suppress(NotOperatedError):
            strip_dropconnect(world.model)
            raise AssertionError("a plain model cannot be stripped")
        return None
    values = objects(world.model)
    strip_dropconnect(world.model)
    require(objects(world.model) == values, "strip changes nothing of the plain model")
    check_plain(world)


def check_plain(world: World) -> None:
    """Nothing of DropConnect is left."""
    require(not dropping(world.model), "nothing is left after strip:", dropping(world.model))
    for (name, one), (_, other) in zip(walk(world.model), walk(world.twin), strict=True):
        require(class_of(one) is class_of(other), "strip restores classes", name)
        require(type(one) is plain_class(one), "strip restores classes", name)
        if isinstance(one, fx.GraphModule):
            require(unnamed(one.graph) == unnamed(other.graph), "strip restores graphs", name)
            continue
        require(vars(one).keys() == vars(other).keys(), "strip restores attributes", name)
        require(list(one._parameters) == list(other._parameters), "strip restores names", name)
        require(list(one._buffers) == list(other._buffers), "strip restores buffers", name)
        require(list(one._modules) == list(other._modules), "strip restores children", name)


@action(2)
def change_p(world: World, rng: Random) -> Any:
    operate(world, rng)
    p, chosen = rate(rng), place_name(world, rng) if rng.random() < 0.4 else None
    done = world.attempt(lambda: set_p(world.model, p, chosen))
    if done and chosen is None:
        found = {site.p for site in dropconnect_sites(world.model)}
        require(found <= {p}, "set_p sets p")
    return p, chosen, done


@action(2)
def change_inference(world: World, rng: Random) -> Any:
    mode: Any = rng.choice(["mean", "mean", "sample", "moments"])
    operate(world, rng)
    chosen = place_name(world, rng) if rng.random() < 0.3 else None
    samples = 2 if mode == "moments" and rng.random() < 0.3 else None
    if rng.random() < 0.5:
        return (
            mode,
            chosen,
            world.attempt(lambda: set_inference(world.model, mode, samples, chosen)),
        )

    def for_a_while() -> None:
        with set_inference(world.model, mode, samples, chosen):
            set_mode(world.model, False)
            if world.trains():
                world.run(world.model)
            _as_twin(world)

    done = world.attempt(lambda: world.unchanged(for_a_while, values=False, around=False))
    world.follow()
    return mode, samples, done


def _as_twin(world: World) -> None:
    """Give the modules of the model the modes of the twin's."""
    for (_, one), (_, other) in zip(walk(world.model), walk(world.twin), strict=True):
        for module in (one, *one._modules.values()):  # nodes, too; a child has its turn later
            if module is not None:
                module.training = other.training


@action(1)
def hold(world: World, rng: Random) -> Any:
    """Nested, which is refused; two forwards agree."""
    if not operate(world, rng) or not world.trains():
        return None

    def held() -> None:
        with hold_masks(world.model):
            first = world.run(world.model)
            held = [place.state.held_key for place in places(copy.deepcopy(world.model))]
            require(not any(key is not None for key in held), "a copy holds no masks")
            with contextlib.suppress(RuntimeError), hold_masks(world.model):
                raise AssertionError("masks are held twice")
            if not any(isinstance(m, nn.BatchNorm1d) for m in world.model.modules()):
                require(bits_of(first) == bits_of(world.run(world.model)), "held masks stay")

    done = world.attempt(held)
    world.follow()
    return done


@action(1)
def bake(world: World, rng: Random) -> Any:
    """One mask made permanent: the plain model, with zeros (or anchors) where the mask is zero."""
    if not operate(world, rng):
        return None
    seed = rng.randrange(99)
    done = world.attempt(lambda: bake_dropconnect(world.model, seed))
    if done:
        world.follow()
        check_plain(world)
    return done


@action(1)
def save(world: World, rng: Random) -> Any:
    """Plan and anchors in files; the same sites again, in a stripped model."""
    if not operate(world, rng):
        return None
    with tempfile.TemporaryDirectory() as folder:
        before, anchors = dropconnect_sites(world.model), _anchors(world.model)
        world.unchanged(lambda: save_dropconnect(world.model, folder))
        strip_dropconnect(world.model)
        check_plain(world)
        done = world.attempt(lambda: load_dropconnect(world.model, folder))
        if done:
            loaded = dropconnect_sites(world.model)
            same = _without_readers(loaded) == _without_readers(before)
            require(same, "a plan is loaded as it was saved:", before, loaded)
            now = _anchors(world.model)
            require(
                list(map(bits_of, now)) == list(map(bits_of, anchors)),
                "anchors are loaded as they were saved",
            )
    return done


def _without_readers(plan: Plan) -> list[Site]:
    """Who draws is found anew: a part that was operated alone knew nobody outside of it."""
    return [replace(site, drawn_by=()) for site in plan]


def _anchors(model: nn.Module) -> list[torch.Tensor]:
    return [place.anchor for place in places(model) if place.anchor is not None]


@action(1)
def predict(world: World, rng: Random) -> Any:
    if not operate(world, rng) or not world.trains():
        return None
    samples, x = rng.choice([2, 3]), parts.fitting(world.model, world.x)
    covariance: Any = rng.choice([None, "diagonal", "full", 3])

    def predicted() -> None:
        if covariance is None:
            mc_predict(world.model, x, samples=samples, seed=1)
        else:
            predict_moments(world.model, x, covariance)

    return covariance, world.attempt(lambda: world.unchanged(predicted))


@action(1)
def for_a_while(world: World, rng: Random) -> Any:
    """DropConnect for the length of a block, that an exception may end."""
    chosen, how, before = target(world, rng), options(rng), objects(world.model, values=False)
    try:
        with dropconnect(world.model, chosen, 0.5, **how):
            if world.trains():
                world.run(world.model)
            raise KeyError
    except (KeyError, ValueError, NoMatchError):
        pass
    require(objects(world.model, values=False) == before, "a block leaves the plain model")
    world.follow()
    return chosen, how
