"""Which modules follow their forward: those around a site whose result is settled where it ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeGuard

from torch import nn

from ..base.journal import Changes
from ..modules.operated import DropConnectModule
from ..modules.places import carriers, places
from ..modules.walk import named_modules
from ..moments.scope import needs_scope
from ..planning.catalogue import Catalogue
from ..planning.prepare import Change, settling
from ..spec.config import DropConnectConfig
from .swap import swap, unswap


def rescope(
    changes: Changes, model: nn.Module, configs: Mapping[int, DropConnectConfig] | None = None
) -> None:
    """Let exactly those modules follow their forward whose sites need it.

    Args:
        changes: gets what has to change.
        model: operated, or not any more.
        configs: those that states, by their id, are about to get.
    """
    coming = configs or {}
    asking = [
        place
        for place in places(model)
        if needs_scope(coming.get(id(place.state)) or place.state.config)
    ]
    wanted: dict[int, nn.Module] = {}
    if asking:
        catalogue = Catalogue(model)
        for place in asking:
            for one in settling(catalogue, catalogue.of(place.owner), place.state):
                wanted[id(one)] = one
    for module in wanted.values():
        if not _has_scope(module):
            swap(changes, Change(module, scope=True), {})
    for _, module in carriers(named_modules(model)):
        if _has_scope(module) and id(module) not in wanted:
            if module._dropconnect or module._dropconnect_draws:
                changes.put(module.__dict__, {"_dropconnect_scope": False})
            else:
                unswap(changes, [module])


def _has_scope(module: nn.Module) -> TypeGuard[DropConnectModule]:
    return isinstance(module, DropConnectModule) and module._dropconnect_scope
