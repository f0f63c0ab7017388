"""A training step by the formula: the twin's, with weights that are masked in memory."""

import copy

import torch
from torch import Tensor, nn

from surgery import hold_masks
from surgery.modules.places import places
from surgery.ops.hash import key_tensor

from ..expected import keep, masked
from .world import World, backward, require, walk

EXACT = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How far sums in another order may lie from each other."""


def by_formula(world: World) -> tuple[nn.Module, list[nn.Parameter]] | None:
    """The twin with the weights that the model uses while its masks are held, as functions of its own
    parameters, and these; None if a site does something else than to mask a weight."""
    twin = copy.deepcopy(world.twin)
    of_twin, own = dict(walk(twin)), list(twin.parameters())
    for place in places(world.model):
        state, owner = place.state, of_twin[place.name]
        p = state.rate * state.factor
        mode = state.mode(place.owner.training)
        if mode is None:
            continue
        if mode != "batch":
            return None
        weight = owner._parameters[state.name]
        mask = keep(key_tensor(state.held_key), p, *state.layout.mask)
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
            found = by_formula(world)
            out = backward(world.run(world.model))
            if found is None:
                return "no formula"
            twin, own = found
            _close(out, backward(world.run(twin)), "output")
            for mine, its in zip(world.model.parameters(), own, strict=True):
                _check_gradient(mine.grad, its.grad)
            if left:
                world.optimizer.step()
                world.follow()
    return "formula"


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
