"""Where DropConnect is in place: the one walk over the sites of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .node import DropConnect
from .operated import DropConnectModule
from .state import SiteState
from .walk import named_modules


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


def states_of(module: nn.Module) -> dict[str, SiteState]:
    """The states of a module's own parameters, by plain name; empty if none is operated."""
    if isinstance(module, DropConnectModule):
        return module._dropconnect
    states: dict[str, SiteState] = {}
    if not module._modules:
        return states
    for child in module._modules.values():
        if isinstance(child, DropConnect):
            states.update(child.states)
    if not states:
        return states
    place = {name: index for index, name in enumerate(module._parameters)}
    return dict(sorted(states.items(), key=lambda item: place.get(item[1].raw, len(place))))


def product_site(place: Place) -> SiteState | None:
    """The weight whose product drops a site: the site itself, or for a bias the weight that it goes
    with; None if none does."""
    owner, state = place.owner, place.state
    if state.product is not None or not state.with_weight:
        return state
    together = [owner._dropconnect] if isinstance(owner, DropConnectModule) else []
    together += [
        child.states for child in owner._modules.values() if isinstance(child, DropConnect)
    ]
    for states in together:
        if state.name in states:
            found = (one for one in states.values() if one.product is not None)
            return next(found, None)
    return None


def set_state(module: nn.Module, state: SiteState) -> None:
    """Replace the state of one parameter of a module."""
    if isinstance(module, DropConnectModule):
        module._dropconnect[state.name] = state
    for child in module._modules.values():
        if isinstance(child, DropConnect) and state.name in child.states:
            child.states[state.name] = state


def places(model: nn.Module, remove_duplicate: bool = True) -> Iterator[Place]:
    """Every operated parameter, in model order."""
    for name, module in named_modules(model, remove_duplicate):
        for state in states_of(module).values():
            yield Place(name, module, state)


def states_in(model: nn.Module) -> list[SiteState]:
    """The states of all places, in any order. Without names this takes half the time, and a schedule
    asks at every step."""
    found: list[SiteState] = []
    seen: set[nn.Module] = set()
    todo: list[nn.Module | None] = [model]
    while todo:
        module = todo.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        if isinstance(module, DropConnectModule):
            found += module._dropconnect.values()
        elif isinstance(module, DropConnect):
            found += module.states.values()
        if module._modules:
            todo += module._modules.values()
    return found


def plain_parameters(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own parameters under their plain names, in order."""
    states = states_of(module)
    if not states:
        return dict(module._parameters)
    raw = {state.raw: state.name for state in states.values()}
    return {raw.get(name, name): parameter for name, parameter in module._parameters.items()}
