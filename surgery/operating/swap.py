"""What surgery changes in one module, written down as steps of a journal: its class, the names of its
parameters, its anchors. `Parameter` objects are moved and never copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from ..base.caching import cached
from ..base.journal import Changes
from ..modules.operated import DropConnectModule
from ..modules.places import plain_parameters
from ..modules.state import SiteState, live_name
from ..modules.wrapped import original, rewired
from ..planning.prepare import Change
from ..spec.names import raw_name
from ..torch_private.recurrent import FLAT_WEIGHTS, flat_lists, names_of


def swap(changes: Changes, change: Change, anchors: dict[str, Tensor]) -> None:
    """Let a module carry DropConnect.

    Args:
        changes: gets the steps.
        change: what will happen to the module.
        anchors: pretrained values, by buffer name.
    """
    module = change.module
    if not change.in_graph:
        _swap_class(changes, change)
    _rename(changes, module, {name: state.raw for name, state in change.states.items()})
    if anchors:
        changes.put(module._buffers, anchors)


def _swap_class(changes: Changes, change: Change) -> None:
    """The new class, and what it keeps in the attributes of the module. A module that is operated
    already keeps what it has, and gets the new sites beside."""
    module, held, cls = change.module, change.module.__dict__, change.new_class()
    states, draws, scope = change.states, tuple(change.draws), change.scope
    if isinstance(module, DropConnectModule):
        states = {**module._dropconnect, **states}
        draws = tuple(dict.fromkeys((*module._dropconnect_draws, *draws)))
        scope = scope or module._dropconnect_scope
    changes.set_class([module], cls)
    items = {
        "_dropconnect": {name: states[name] for name in cls._dropconnect_class[1]},
        "_dropconnect_draws": draws,
        "_dropconnect_scope": scope,
    }
    for state in change.states.values():
        items[state.live] = None
    forward = rewired(module) if "forward" in held else None
    if forward is not None:
        items["forward"] = forward
    changes.put(held, items)
    if FLAT_WEIGHTS in held:
        changes.drop(held, FLAT_WEIGHTS)


def _rename(changes: Changes, module: nn.Module, names: dict[str, str]) -> None:
    """Rename parameters, keeping their order and the dict object."""
    if names:
        held = module._parameters
        changes.fill(held, {names.get(name, name): value for name, value in held.items()})


def plain_names(changes: Changes, module: nn.Module, states: dict[str, SiteState]) -> None:
    """Give the parameters of a module that only graphs read their plain names."""
    _rename(changes, module, {state.raw: state.name for state in states.values()})
    _drop_anchors(changes, module, states)


def _drop_anchors(changes: Changes, module: nn.Module, states: dict[str, SiteState]) -> None:
    """Take the buffers out that hold the pretrained values of these sites."""
    for state in states.values():
        if state.anchor is not None:
            changes.drop(cast(dict[str, Any], module._buffers), state.anchor)


def unswap(changes: Changes, modules: Sequence[DropConnectModule]) -> None:
    """Make modules plain that have one operated class: the inverse of `swap`."""
    cls, names = modules[0]._dropconnect_class
    plain, added = _of_names(names)
    for module in modules:
        _rename(changes, module, plain)
        if module._buffers:
            _drop_anchors(changes, module, module._dropconnect)
        forward = original(module) if "forward" in module.__dict__ else None
        if forward is not None:
            changes.put(module.__dict__, {"forward": forward})
    if issubclass(cls, nn.RNNBase):
        for module in modules:
            changes.put(module.__dict__, _flat_weights(module))
    changes.drop_attributes(modules, added)
    changes.set_class(modules, cls)


@cached
def _of_names(names: tuple[str, ...]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Of parameters with these plain names: plain names by raw ones, and what surgery adds to the
    attributes of their module."""
    own = ("_dropconnect", "_dropconnect_draws", "_dropconnect_scope")
    plain = {raw_name(name): name for name in names}
    return plain, (*own, *(live_name(name) for name in names))


def _flat_weights(module: Any) -> dict[str, Any]:
    """The lists that `torch.nn.RNNBase` makes of its parameters."""
    parameters = plain_parameters(module)
    return flat_lists([parameters.get(name) for name in names_of(module)])
