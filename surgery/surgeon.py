"""Operate and undo: the only place that changes a model.

`operate` carries out a prepared plan and cannot fail half-way; `undo` is its exact inverse. Both move
`Parameter` objects and never copy them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .config import DropConnectConfig
from .errors import NotOperatedError, raise_all
from .modules.operated import (
    DropConnectModule,
    drawn_children,
    operated_class,
    operated_modules,
    plain_class,
    plain_parameters,
)
from .modules.state import SiteState, raw_name
from .plan import Plan, Site, join
from .prepare import Change, Prepared, prepare
from .select import Catalogue


def operate(prepared: Prepared) -> None:
    """Carry out a prepared plan. Everything that can fail comes before the first change."""
    anchors: dict[int, Tensor] = {}
    todo = [(change, _new_class(change), _anchors(change, anchors)) for change in prepared.changes]
    for change, cls, its_anchors in todo:
        _swap(change, cls, its_anchors)


def _new_class(change: Change) -> type[DropConnectModule]:
    module, names = change.module, set(change.states)
    if isinstance(module, DropConnectModule):
        names |= set(module._dropconnect)
    ordered = tuple(name for name, _ in plain_parameters(module) if name in names)
    return operated_class(plain_class(module), ordered)


def _anchors(change: Change, known: dict[int, Tensor]) -> dict[str, Tensor]:
    """The pretrained values of a module's sites, by buffer name; tied weights share one."""
    anchors = {}
    parameters = dict(plain_parameters(change.module))
    for name, state in change.states.items():
        parameter = parameters[name]
        if state.anchor is not None and parameter is not None:
            if id(parameter) not in known:
                known[id(parameter)] = parameter.detach().clone()
            anchors[state.anchor] = known[id(parameter)]
    return anchors


def _swap(change: Change, cls: type[DropConnectModule], anchors: dict[str, Tensor]) -> None:
    module: Any = change.module
    states = {**module.__dict__.get("_dropconnect", {}), **change.states}
    draws = (*module.__dict__.get("_dropconnect_draws", ()), *change.draws)
    module.__class__ = cls
    module.__dict__["_dropconnect"] = {name: states[name] for name in cls._dropconnect_class[1]}
    module.__dict__["_dropconnect_draws"] = tuple(dict.fromkeys(draws))
    for state in change.states.values():
        module.__dict__[state.live] = None
    _rename(module._parameters, {name: raw_name(name) for name in change.states})
    for name, anchor in anchors.items():
        module.register_buffer(name, anchor)
    module.__dict__.pop("_flat_weights", None)


def _rename(parameters: dict[str, Any], names: dict[str, str]) -> None:
    """Rename keys in place, keeping order and the dict object."""
    renamed = [(names.get(name, name), value) for name, value in parameters.items()]
    parameters.clear()
    parameters.update(renamed)


def undo(model: nn.Module) -> None:
    """Take DropConnect out of every module.

    Raises:
        NotOperatedError: there is none in place.
        SurgeryError: a module's class was changed again since; the model is unchanged.
    """
    modules = [module for _, module in operated_modules(model)]
    if not modules:
        raise NotOperatedError(
            f"{type(model).__name__} has no DropConnect in place; there is nothing to strip"
        )
    raise_all(
        problem for name, module in operated_modules(model) if (problem := _stuck(name, module))
    )
    for module in modules:
        _unswap(module)


def _stuck(name: str, module: DropConnectModule) -> str | None:
    if "_dropconnect_class" not in type(module).__dict__:
        return (
            f"{name or '(root)'}: its class was changed to {type(module).__name__} after apply (by "
            "fully_shard?); take that out first, or use plain_state_dict to get plain weights"
        )
    if any(module.__dict__[state.live] is not None for state in module._dropconnect.values()):
        return f"{name or '(root)'}: its forward is running"
    return None


def _unswap(module: Any) -> None:
    states = module._dropconnect
    _rename(module._parameters, {state.raw: state.name for state in states.values()})
    for state in states.values():
        del module.__dict__[state.live]
        if state.anchor is not None:
            del module._buffers[state.anchor]
    del module.__dict__["_dropconnect"], module.__dict__["_dropconnect_draws"]
    module.__class__ = module._dropconnect_class[0]
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def current_plan(model: nn.Module) -> Plan:
    """The sites that are in place, in model order; empty if there are none."""
    catalogue = Catalogue(model)
    drawn_by = _drawn_by(catalogue)
    sites: dict[int, Site] = {}
    for _, module in catalogue:
        if not isinstance(module, DropConnectModule):
            continue
        name = catalogue.name(module)
        for state in module._dropconnect.values():
            parameter = module._parameters[state.raw]
            if parameter is None:
                continue
            known = sites.get(id(parameter))
            if known is None:
                sites[id(parameter)] = Site(
                    module=name,
                    parameter=state.name,
                    kind=state.kind,
                    shape=tuple(parameter.shape),
                    config=state.config,
                    drawn_by=tuple(drawn_by.get(id(module), ())),
                )
            else:
                twins = (*known.shared_with, join(name, state.name))
                sites[id(parameter)] = dataclasses.replace(known, shared_with=twins)
    return Plan(tuple(sites.values()))


def unused_sites(model: nn.Module) -> list[str]:
    """Names of the sites that should drop and have never drawn a mask. Of a tied site any user counts;
    compiled forwards do not count."""
    drawn = {
        join(name, state.name)
        for name, module in operated_modules(model)
        for state in module._dropconnect.values()
        if state.drawn or state.config.p == 0.0
    }
    return [
        site.name
        for site in current_plan(model)
        if drawn.isdisjoint((site.name, *site.shared_with))
    ]


def _drawn_by(catalogue: Catalogue) -> dict[int, list[str]]:
    """Names of the parents that draw for a module, by the module's id."""
    found: dict[int, list[str]] = {}
    for _, module in catalogue:
        if isinstance(module, DropConnectModule):
            for child in drawn_children(module):
                found.setdefault(id(child), []).append(catalogue.name(module))
    return found


def can_undo(model: nn.Module) -> bool:
    """Whether DropConnect is in place and `undo` would succeed."""
    modules = list(operated_modules(model))
    return bool(modules) and not any(_stuck(name, module) for name, module in modules)


@contextlib.contextmanager
def suspended(model: nn.Module) -> Iterator[None]:
    """The plain model for a while. Inside, values may change but modules may not."""
    kept = [
        (_as_change(module), type(module), _buffers(module))
        for _, module in operated_modules(model)
    ]
    undo(model)
    try:
        yield
    finally:
        for change, cls, anchors in kept:
            _swap(change, cls, anchors)


@contextlib.contextmanager
def reapplied(model: nn.Module) -> Iterator[None]:
    """The plain model for a while; on exit the same sites, found by name, are operated on again.
    Inside, weights may be resized and modules replaced, as resizing an embedding does."""
    plan = current_plan(model)
    kept = [
        (name, dict(module._dropconnect), _buffers(module))
        for name, module in operated_modules(model)
    ]
    undo(model)
    try:
        yield
    finally:
        operate(prepare(model, plan, None, DropConnectConfig()))
        for name, states, anchors in kept:
            for state in states.values():
                _put_back(model.get_submodule(name), state, anchors)


def _as_change(module: DropConnectModule) -> Change:
    return Change(module, dict(module._dropconnect), list(module._dropconnect_draws))


def _buffers(module: DropConnectModule) -> dict[str, Tensor]:
    """The anchors of a module, by buffer name."""
    names = [state.anchor for state in module._dropconnect.values() if state.anchor is not None]
    return {name: getattr(module, name) for name in names}


def _put_back(module: Any, old: SiteState, anchors: dict[str, Tensor]) -> None:
    """The state and the anchor as they were. If the weight was resized along its first dimension,
    rows that stayed keep their anchor; new rows keep the one just made, their value now."""
    if module._dropconnect[old.name].layout == old.layout:
        module._dropconnect[old.name] = old
    if old.anchor is None:
        return
    before, now = anchors[old.anchor], module._buffers[old.anchor]
    if now.shape == before.shape:
        module._buffers[old.anchor] = before
    elif now.shape[1:] == before.shape[1:]:
        rows = min(len(now), len(before))
        now[:rows] = before[:rows]
