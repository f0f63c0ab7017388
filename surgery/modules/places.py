"""Where DropConnect is in place in a model: the modules that hold it, and the sites in these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from .state import SiteState
from .walk import Modules, modules_of, named_modules


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


class Carrier(NamedTuple):
    """A module that carries DropConnect: by its class, or by nodes beside its parameters, or both."""

    name: str
    """Dotted name of the module."""
    module: nn.Module
    own: dict[str, SiteState] | None
    """If its class is an operated one: the states of its parameters, by plain name. They are empty if
    it only draws for its children, or only follows its forward."""
    nodes: Sequence[SitesNode]
    """Beside parameters that nodes of a graph read."""


def carriers(modules: Modules) -> Iterator[Carrier]:
    """Of the modules of a model, those that carry DropConnect."""
    for name, module in modules:
        own = own_states(module)
        nodes = tuple(_nodes_beside(module)) if module._modules else ()
        if own is not None or nodes:
            yield Carrier(name, module, own, nodes)


def own_states(module: nn.Module) -> dict[str, SiteState] | None:
    """The states of an operated module; None for any other."""
    if not hasattr(type(module), "_dropconnect_class"):
        return None
    states: dict[str, SiteState] = module.__dict__["_dropconnect"]
    return states


def _nodes_beside(owner: nn.Module) -> Iterator[SitesNode]:
    return (child for child in owner._modules.values() if isinstance(child, SitesNode))


def states_of(module: nn.Module) -> dict[str, SiteState]:
    """The states of a module's own parameters, by plain name; empty if none is operated."""
    own = own_states(module)
    if own is not None:
        return own
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
    yield own_states(module) or {}
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


def set_state(module: nn.Module, state: SiteState) -> None:
    """Replace the state of one parameter of a module."""
    for states in _read_together(module):
        if state.name in states:
            states[state.name] = state


def places(model: nn.Module, remove_duplicate: bool = True) -> Iterator[Place]:
    """Every operated parameter, in model order."""
    for name, module, own, _ in carriers(named_modules(model, remove_duplicate)):
        for state in (states_of(module) if own is None else own).values():
            yield Place(name, module, state)


def states_in(model: nn.Module) -> list[SiteState]:
    """The states of all places, in any order: a schedule asks at every step."""
    states: list[SiteState] = []
    for module in modules_of(model):
        if hasattr(type(module), "_dropconnect_class"):  # as `own_states`, which takes longer
            states += module.__dict__["_dropconnect"].values()
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
