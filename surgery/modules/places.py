"""Where DropConnect is in place in a model: the modules that hold it, and the sites in these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .state import SiteState
from .walk import Modules, modules_of, named_modules


class StatesHolder(nn.Module):
    """What every operated module is; the rest of it is `surgery.modules.operated.DropConnectModule`."""

    _dropconnect: dict[str, SiteState]
    """State by plain parameter name; empty for a module that only draws for its children, or only
    follows its forward."""


class SitesNode(nn.Module):
    """A module with the states of sites that a graph reads; it is a child of their owner. See
    `surgery.modules.node`. (An operated module has its states in its `__dict__`.)"""

    states: dict[str, SiteState]
    """By plain parameter name."""


@dataclass(frozen=True)
class Place:
    """One operated parameter of one module. A tied weight has several."""

    name: str
    """Dotted name of the owner."""
    owner: nn.Module
    """The module that holds the raw parameter."""
    state: SiteState

    @property
    def raw(self) -> Any:
        """The raw parameter; None if it was removed since."""
        return getattr(self.owner, self.state.raw, None)  # FSDP keeps it outside of the table

    @property
    def anchor(self) -> Tensor | None:
        """Where dropped weights go; None is zero."""
        return None if self.state.anchor is None else self.owner._buffers[self.state.anchor]


def carriers(modules: Modules) -> Modules:
    """Of the modules of a model, those that carry DropConnect: by their class, or by nodes beside
    their parameters, or both."""
    return [
        (name, module)
        for name, module in modules
        if isinstance(module, StatesHolder) or (module._modules and any(_nodes_beside(module)))
    ]


def _nodes_beside(owner: nn.Module) -> Iterator[SitesNode]:
    return (child for child in owner._modules.values() if isinstance(child, SitesNode))


def states_of(module: nn.Module) -> dict[str, SiteState]:
    """The states of a module's own parameters, by plain name; empty if none is operated."""
    if isinstance(module, StatesHolder):
        return module._dropconnect
    if not module._modules:
        return {}
    states = {name: one for node in _nodes_beside(module) for name, one in node.states.items()}
    if not states:
        return states
    order = {name: index for index, name in enumerate(module._parameters)}
    return dict(sorted(states.items(), key=lambda item: order.get(item[1].raw, len(order))))


def _read_together(module: nn.Module) -> Iterator[dict[str, SiteState]]:
    """The states of a module's parameters: of those that its forward reads, and of those that one node
    beside them reads."""
    if isinstance(module, StatesHolder):
        yield module._dropconnect
    for node in _nodes_beside(module):
        yield node.states


def product_site(place: Place) -> SiteState | None:
    """The weight whose product drops a site: the site itself, or for a bias the weight that it goes
    with; None if none does."""
    state = place.state
    if state.product is not None or not state.with_weight:
        return state
    for states in _read_together(place.owner):
        if state.name in states:
            found = (one for one in states.values() if one.product is not None)
            return next(found, None)
    return None


def moved_by(place: Place) -> SiteState | None:
    """The site whose function mean and variance come from: itself, or the weight that a bias is dropped
    with."""
    return place.state if place.state.varies else product_site(place)


def without_moments(by: SiteState | None, draws: bool = False) -> str | None:
    """Why no moments are known of a site, and what to do; or None. A forward in `inference="moments"`,
    `predict_moments`, `tree` and plans ask this.

    Args:
        by: `moved_by` of it.
        draws: whether they are those of `samples=Z`.
    """
    if by is None or not (by.product or by.varies):
        return "no moments are known of what reads it"
    return by.refused(by.sampling, "moments", draws)


def set_state(module: nn.Module, state: SiteState) -> None:
    """Replace the state of one parameter of a module."""
    for states in _read_together(module):
        if state.name in states:
            states[state.name] = state


def places(model: nn.Module, remove_duplicate: bool = True) -> Iterator[Place]:
    """Every operated parameter, in model order."""
    for name, module in carriers(named_modules(model, remove_duplicate)):
        for state in states_of(module).values():
            yield Place(name, module, state)


def states_in(model: nn.Module) -> list[SiteState]:
    """The states of all places, in any order: a schedule asks at every step."""
    states: list[SiteState] = []
    for module in modules_of(model):
        if isinstance(module, StatesHolder):
            states += module._dropconnect.values()
        elif isinstance(module, SitesNode):
            states += module.states.values()
    return states


def plain_parameters(
    module: nn.Module, states: dict[str, SiteState] | None = None
) -> dict[str, Tensor | None]:
    """The module's own parameters under their plain names, in order.

    Args:
        module: operated or not.
        states: its `states_of`, if somebody has asked already.
    """
    states = states_of(module) if states is None else states
    if not states:
        return dict(module._parameters)
    raw = {state.raw: state.name for state in states.values()}
    return {raw.get(name, name): parameter for name, parameter in module._parameters.items()}
