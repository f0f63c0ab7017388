"""The sites that are in place in a model: as a plan, by name, and what became of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..modules.dropping import drawn_children
from ..modules.operated import DropConnectModule
from ..modules.places import Place, places, states_in, states_of
from ..modules.state import SiteState
from ..modules.walk import Modules
from ..spec.config import DropConnectConfig
from ..spec.errors import NotOperatedError
from ..spec.plan import Plan, Site, join
from .catalogue import Catalogue
from .prepare import have_gradients
from .select import Choice, select


def current_plan(model: nn.Module) -> Plan:
    """The sites that are in place, in model order; empty if there are none."""
    users: dict[int, list[Place]] = {}
    for place in places(model):
        if place.raw is not None:
            users.setdefault(id(place.raw), []).append(place)
    if not users:
        return Plan()
    catalogue = Catalogue(model)
    drawn_by = _drawn_by(catalogue)
    return Plan(tuple(_site(its_users, catalogue, drawn_by) for its_users in users.values()))


def _site(users: list[Place], catalogue: Catalogue, drawn_by: dict[int, list[str]]) -> Site:
    """The site that a parameter is, whose users drop."""
    first = users[0]
    drawers = {name for place in users for name in drawn_by.get(id(place.owner), ())}
    return Site(
        module=first.name,
        parameter=first.state.name,
        kind=first.state.kind,
        shape=tuple(first.raw.shape),
        config=first.state.config,
        shared_with=tuple(join(place.name, place.state.name) for place in users[1:]),
        drawn_by=tuple(catalogue.in_order(drawers)),
    )


def _drawn_by(catalogue: Catalogue) -> dict[int, list[str]]:
    """Names of the parents that draw for a module, by the module's id."""
    drawers: dict[int, list[str]] = {}
    for owner in catalogue:
        module = owner.module
        if isinstance(module, DropConnectModule):
            for child in drawn_children(module):
                drawers.setdefault(id(child), []).append(owner.name)
        for reader in catalogue.graphs.readers(module) if catalogue.graphs else ():
            drawers.setdefault(id(module), []).append(catalogue.of(reader).name)
    return drawers


def states_named(model: nn.Module, targets: Any) -> list[SiteState]:
    """The states of the sites that `targets` names: of a tied weight, those of all its users.

    Args:
        model: operated.
        targets: as for `surgery.apply_dropconnect`; None means all sites.

    Raises:
        NotOperatedError: the model, or every parameter that `targets` names, has no DropConnect.
        SurgeryError: see `select`.
    """
    every = states_in(model)
    if not every:
        raise NotOperatedError.none_in(model)
    if targets is None:
        return every
    choices, _ = select(Catalogue(model), targets, None, DropConnectConfig())
    named = {key for choice in choices for key in _parameters(choice)}
    states = [place.state for place in places(model) if id(place.raw) in named]
    if not states:
        raise NotOperatedError(f"targets={targets!r} names weights, but none has DropConnect")
    return states


def _parameters(choice: Choice) -> Iterator[int]:
    """Ids of the operated parameter that was chosen and of the bias that drops with it."""
    states = choice.owner.states
    state = states.get(choice.name)
    if state is None:
        return
    yield id(getattr(choice.module, state.raw))
    bias = states.get(choice.bias or "") if state.config.bias else None
    if bias is not None:
        yield id(getattr(choice.module, bias.raw))


def unused_sites(model: nn.Module, *, compiled: bool = False) -> list[str]:
    """Names of the sites that should drop and never did. Of a tied site any user counts.

    Args:
        model: what was trained.
        compiled: whether its forwards may be compiled: then sites that replace a product are left
            out, since what a graph does in their place is not counted.
    """
    dropped = {
        join(place.name, place.state.name)
        for place in places(model)
        if place.state.drawn
        or place.state.config.p == 0.0
        or (compiled and place.state.sampling != "batch")
    }
    return [
        site.name
        for site in current_plan(model)
        if dropped.isdisjoint((site.name, *site.shared_with))
    ]


def was_trained(modules: Modules) -> bool:
    """Whether there are signs that a model was trained since surgery: something dropped, a forward
    was seen to read a weight, or parameters have gradients where none had one.

    Args:
        modules: all of the model.
    """
    had_gradients = True
    for _, module in modules:
        for state in states_of(module).values():
            if state.drawn or state.undropped_by is not None:
                return True
            had_gradients = had_gradients and state.had_gradients
    return not had_gradients and have_gradients(module for _, module in modules)
