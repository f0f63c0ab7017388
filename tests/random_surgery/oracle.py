"""A training step by the formula: the twin's, with weights that are masked in memory."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import hold_masks
from surgery.modules.own_generator import OwnGeneratorState
from surgery.modules.places import Place, places, states_of
from surgery.modules.state import SiteState
from surgery.ops.hash import Key, key_tensor

from ..expected import keep, masked
from ..internals import without_extension
from .world import World, backward, require, walk

EXACT = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How far sums in another order may lie from each other."""


KeyOf = Callable[[Place], Key | None]
"""The key of the one mask of a place; None if it has none, or several."""


def held_key(place: Place) -> Key | None:
    return place.state.held_key


@contextlib.contextmanager
def drawn_keys() -> Iterator[KeyOf]:
    """Notes the keys that forwards draw inside; tells afterwards those of places with one."""
    drawn: dict[int, list[Key]] = {}

    def noting(new_key: Callable[..., Key]) -> Callable[..., Key]:
        def noted(state: SiteState, device: torch.device) -> Key:
            drawn.setdefault(id(state), []).append(new_key(state, device))
            return drawn[id(state)][-1]

        return noted

    def key_of(place: Place) -> Key | None:
        state = place.state
        if state.follows is not None:  # if its weight drops, too
            state = states_of(place.owner).get(state.follows, state)
        keys = drawn.get(id(state), [])
        return keys[0] if len(keys) == 1 else None

    with pytest.MonkeyPatch.context() as patch:
        without_extension(patch)  # which draws unseen, from whenever it is compiled
        for cls in (SiteState, OwnGeneratorState):
            patch.setattr(cls, "new_key", noting(cls.new_key))
        yield key_of


def by_formula(world: World, key_of: KeyOf) -> tuple[nn.Module, list[nn.Parameter]] | None:
    """The twin with the weights that the model used, as functions of its own parameters, and these;
    None if a site did something else than to mask a weight once."""
    twin = copy.deepcopy(world.twin)
    of_twin, own = dict(walk(twin)), list(twin.parameters())
    for place in places(world.model):
        state, owner = place.state, of_twin[place.name]
        p = state.rate * state.factor
        mode = state.mode(place.owner.training)
        if mode is None:
            continue
        key = key_of(place)
        if mode != "batch" or key is None:
            return None
        weight = owner._parameters[state.name]
        mask = keep(key_tensor(key), p, *state.layout.mask)
        anchor = None if place.anchor is None else place.anchor.view(state.layout.view)
        used = masked(weight.view(state.layout.view), mask, p, anchor).view(weight.shape)
        owner.__dict__["_parameters"][state.name] = used  # which `owner.weight` reads
        if isinstance(owner, nn.RNNBase):
            owner._flat_weights = [getattr(owner, name) for name in owner._flat_weights_names]
    return twin, own


def check_step(world: World, steps: int = 1) -> str:
    """Steps with held masks against the formula: the outputs, the gradients, and their zeros. The
    optimiser moves the weights from one to the next; the masks stay."""
    with hold_masks(world.model):
        for left in reversed(range(steps)):
            world.model.zero_grad()
            found = by_formula(world, held_key)
            out = backward(world.run(world.model))
            if found is None:
                return "no formula"
            twin, own = found
            _close(out, backward(world.run(twin)), "output")
            _check_gradients(world, own)
            if left:
                world.optimizer.step()
                world.follow()
    return "formula"


def check_late_backward(world: World, meanwhile: Callable[[], Any]) -> str:
    """A forward, something else, and then its backward: the gradients are those of then."""
    world.model.zero_grad()
    with drawn_keys() as key_of:
        out = world.run(world.model)
    found = by_formula(world, key_of)
    meanwhile()
    backward(out)
    if found is None:
        return "no formula"
    twin, own = found
    _close(out.detach(), backward(world.run(twin)), "output")
    _check_gradients(world, own)
    return "formula"


def _check_gradients(world: World, own: list[nn.Parameter]) -> None:
    for mine, its in zip(world.model.parameters(), own, strict=True):
        _check_gradient(mine.grad, its.grad)


def _check_gradient(grad: Tensor | None, wanted: Tensor | None) -> None:
    if grad is None or wanted is None:
        some = [one is not None and bool(one.any()) for one in (grad, wanted)]
        require(not any(some), "a gradient is there where the formula has one")
        return
    _close(grad, wanted, "gradient")
    if grad.dtype in EXACT:
        require(not grad[wanted == 0].any(), "gradients are zero where the mask is")


def _close(found: Tensor, wanted: Tensor, what: str) -> None:
    bound = EXACT.get(found.dtype)
    if bound is None or not wanted.isfinite().all():
        return
    size = float(wanted.abs().max()) if wanted.numel() else 0.0
    gap = float((found - wanted).abs().max()) if wanted.numel() else 0.0
    require(gap <= bound * (1 + size), f"the {what} is that of the formula:", gap, size)
