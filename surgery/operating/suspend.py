"""The plain model for a while, and then DropConnect as it was.

Both take what to do meanwhile as a function, not as the body of a `with`: the end of a `with` cannot be
made sure of when an interrupt comes just there.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

from ..base.journal import Step, at_once, content, data_of, image, restoring, surely
from ..modules.operated import DropConnectModule
from ..modules.own_generator import draw_from, generator_of
from ..modules.places import carriers, set_state, states_of
from ..modules.state import SiteState
from ..modules.walk import named_modules
from ..planning.catalogue import Catalogue
from ..planning.graphs import graph_surgeon
from ..planning.in_place import current_plan
from ..planning.prepare import Change, prepare
from ..planning.runs import RunOnce
from ..spec.config import DropConnectConfig
from .surgeon import carry_out, operate, undo

Result = TypeVar("Result")


def suspended(model: nn.Module, call: Callable[[], Result]) -> Result:
    """What `call` returns, with the model plain meanwhile. It may change values, but not modules.

    Raises:
        NotOperatedError, SurgeryError: see `undo`.
    """
    modules = named_modules(model)
    changes = [_as_change(module) for _, module in carriers(modules)]
    kept = [(change, _buffers(change.module)) for change in changes]
    surgeon = graph_surgeon(module for _, module in modules)
    nodes = {} if surgeon is None else surgeon.nodes(model)

    def put_back() -> None:
        if not any(change.states and states_of(change.module) for change in changes):
            carry_out(kept, Catalogue(model).graphs, nodes)

    def while_plain() -> Result:
        undo(model)
        return call()

    return restoring(put_back, while_plain)


def reapplied(model: nn.Module, call: Callable[[], Result]) -> Result:
    """What `call` returns, with the model plain meanwhile; then the same sites, found by name, are
    operated on again. `call` may resize weights and replace modules, as resizing an embedding does.
    If it fails, or is interrupted, everything is as it was before.
    """
    plan = current_plan(model)
    kept = [
        (name, dict(states_of(module)), _buffers(module))
        for name, module in carriers(named_modules(model))
    ]
    put_back = at_once(_all_of(model))
    try:
        undo(model)
        result = call()
        run = RunOnce(model, None)
        operate(prepare(model, plan, None, DropConnectConfig(), run, resized=True))
        for name, states, anchors in kept:
            for state in states.values():
                _put_back(model.get_submodule(name), state, anchors)
        return result
    except BaseException:
        surely(put_back)
        raise


def _all_of(model: nn.Module) -> list[Step]:
    """Steps that put back what resizing changes: modules, the memory of weights, configurations."""
    modules = [module for _, module in named_modules(model)]
    surgeon = graph_surgeon(modules)
    steps = image(modules) if surgeon is None else surgeon.image(model)
    steps += data_of(model.parameters())
    for held in _held_by(modules):
        steps += content(held)
    return steps


_NO_CONFIGURATION = (
    nn.Module,
    Tensor,
    type,
    types.ModuleType,
    types.FunctionType,
    types.MethodType,
)


def _held_by(things: list[Any], depth: int = 2) -> Iterator[dict[str, Any]]:
    """The attributes of objects that modules hold, and of what these hold: a configuration says how
    many words there are."""
    for thing in things:
        for value in list(vars(thing).values()):
            if not isinstance(value, _NO_CONFIGURATION) and hasattr(value, "__dict__"):
                yield value.__dict__
                if depth > 1:
                    yield from _held_by([value], depth - 1)


def _as_change(module: nn.Module) -> Change:
    """What would put in place again what is in place in a module."""
    if not isinstance(module, DropConnectModule):
        return Change(module, states_of(module), in_graph=True)
    states, draws = dict(module._dropconnect), list(module._dropconnect_draws)
    return Change(module, states, draws=draws, scope=module._dropconnect_scope)


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """The anchors of a module, by buffer name."""
    names = [state.anchor for state in states_of(module).values() if state.anchor is not None]
    return {name: getattr(module, name) for name in names}


def _put_back(module: Any, old: SiteState, anchors: dict[str, Tensor]) -> None:
    """The state and the anchor as they were. If the weight was resized along its first dimension,
    rows that stayed keep their anchor; new rows keep the one just made, their value now."""
    new = states_of(module)[old.name]
    if new.layout == old.layout:
        set_state(module, old)
    else:
        draw_from([new], generator_of(old))
    if old.anchor is None:
        return
    before, now = anchors[old.anchor], module._buffers[old.anchor]
    if now.shape == before.shape:
        module._buffers[old.anchor] = before
    elif now.shape[1:] == before.shape[1:]:
        rows = min(len(now), len(before))
        now[:rows] = before[:rows]
