"""Operate and undo: the only place that changes a model.

`operate` carries out a prepared plan and cannot fail half-way; `undo` is its exact inverse. Both move
`Parameter` objects and never copy them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from .catalogue import Catalogue
from .config import DropConnectConfig
from .errors import NotOperatedError, raise_all
from .finder import Look
from .graphs import GraphSurgeon, Nodes, Survey, graph_owners, graph_surgeon
from .modules.operated import (
    DropConnectModule,
    drawn_children,
    operated_among,
    operated_class,
    plain_class,
)
from .modules.places import Place, places, plain_parameters, set_state, states_of
from .modules.state import SiteState
from .modules.walk import named_modules
from .plan import Plan, Site, join
from .prepare import Change, Prepared, has_gradients, prepare
from .scope import needs_scope

_Todo = tuple[Change, type[DropConnectModule] | None, dict[str, Tensor]]
"""A change, the class that the module gets (None: only nodes of a graph read it), its anchors."""


def operate(prepared: Prepared) -> None:
    """Carry out a prepared plan. Everything that can fail comes before the first change."""
    anchors: dict[int, Tensor] = {}
    todo = [(change, _new_class(change), _anchors(change, anchors)) for change in prepared.changes]
    _carry_out(todo, prepared.graphs, {})


def _carry_out(todo: Sequence[_Todo], graphs: Survey | None, nodes: Nodes) -> None:
    for change, cls, its_anchors in todo:
        _swap(change, cls, its_anchors)
    if graphs is not None:
        graphs.insert([(change.module, change.states) for change, _, _ in todo], nodes)


def _new_class(change: Change) -> type[DropConnectModule] | None:
    if change.in_graph:
        return None
    module, names = change.module, tuple(change.states)
    if isinstance(module, DropConnectModule):
        names += tuple(module._dropconnect)
    if len(names) > 1:
        names = tuple(name for name in plain_parameters(module) if name in names)
    return operated_class(plain_class(module), names)


def _anchors(change: Change, known: dict[int, Tensor]) -> dict[str, Tensor]:
    """The pretrained values of a module's sites, by buffer name; tied weights share one."""
    anchors = {}
    for name, state in change.states.items():
        if state.anchor is None:
            continue
        parameter = plain_parameters(change.module)[name]
        if parameter is not None:
            if id(parameter) not in known:
                known[id(parameter)] = parameter.detach().clone()
            anchors[state.anchor] = known[id(parameter)]
    return anchors


def _swap(change: Change, cls: type[DropConnectModule] | None, anchors: dict[str, Tensor]) -> None:
    if cls is not None:
        _swap_class(change, cls)
    raw = {name: state.raw for name, state in change.states.items()}
    _rename(change.module._parameters, raw)
    for name, anchor in anchors.items():
        change.module.register_buffer(name, anchor)


def _swap_class(change: Change, cls: type[DropConnectModule]) -> None:
    held = change.module.__dict__
    states = {**held.get("_dropconnect", {}), **change.states}
    draws = (*held.get("_dropconnect_draws", ()), *change.draws)
    # nn.Module's would look for a parameter first.
    object.__setattr__(change.module, "__class__", cls)
    held["_dropconnect"] = {name: states[name] for name in cls._dropconnect_class[1]}
    held["_dropconnect_draws"] = tuple(dict.fromkeys(draws))
    held["_dropconnect_scope"] = held.get("_dropconnect_scope", False) or change.scope
    for state in change.states.values():
        held[state.live] = None
    held.pop("_flat_weights", None)


def _rename(parameters: dict[str, Any], names: dict[str, str]) -> None:
    """Rename keys in place, keeping order and the dict object."""
    renamed = {names.get(name, name): value for name, value in parameters.items()}
    parameters.clear()
    parameters.update(renamed)


def undo(model: nn.Module) -> Nodes:
    """Take DropConnect out of every module and graph; returns what the nodes of graphs called.

    Raises:
        NotOperatedError: there is none in place.
        SurgeryError: a module's class was changed again since, or a node; the model is unchanged.
    """
    walked = named_modules(model)
    modules = list(operated_among(walked))
    in_graphs = [(owner, states_of(owner)) for owner in _owners_in_graphs(walked)]
    if not modules and not in_graphs:
        raise NotOperatedError(
            f"{type(model).__name__} has no DropConnect in place; there is nothing to strip"
        )
    surgeon = graph_surgeon([module for _, module in walked])
    raise_all(_all_stuck(model, modules, surgeon), "take DropConnect out")
    for owner, states in in_graphs:
        _plain_names(owner, states)
    nodes = {} if surgeon is None else surgeon.remove(model)
    for _, module in modules:
        _unswap(module)
    return nodes


def _owners_in_graphs(modules: Iterable[tuple[str, nn.Module]]) -> list[nn.Module]:
    """Of the modules of a model, those that only graphs read."""
    owners = [owner for _, owner, _ in graph_owners(modules)]
    return [owner for owner in owners if not isinstance(owner, DropConnectModule)]


def _all_stuck(
    model: nn.Module,
    modules: Iterable[tuple[str, DropConnectModule]],
    surgeon: GraphSurgeon | None,
) -> Iterator[str]:
    """Why DropConnect cannot be taken out of these modules and of the graphs now."""
    for name, module in modules:
        problem = _stuck(name, module)
        if problem is not None:
            yield problem
    if surgeon is not None:
        yield from surgeon.stuck(model)


def _stuck(name: str, module: DropConnectModule) -> str | None:
    if "_dropconnect_class" not in type(module).__dict__:
        return (
            f"{name or '(root)'}: its class was changed to {type(module).__name__} after apply (by "
            "fully_shard?); take that out first, or use plain_state_dict to get plain weights"
        )
    for state in module._dropconnect.values():
        if module.__dict__[state.live] is not None:
            return f"{name or '(root)'}: its forward is running"
    return None


def _plain_names(module: nn.Module, states: dict[str, SiteState]) -> None:
    _rename(module._parameters, {state.raw: state.name for state in states.values()})
    for state in states.values():
        if state.anchor is not None:
            del module._buffers[state.anchor]


def _unswap(module: Any) -> None:
    held = module.__dict__
    states = held["_dropconnect"]
    _plain_names(module, states)
    for state in states.values():
        del held[state.live]
    for name in ("_dropconnect", "_dropconnect_draws", "_dropconnect_scope"):
        del held[name]
    object.__setattr__(module, "__class__", module._dropconnect_class[0])
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


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
    return Plan(tuple(_in_place(found, catalogue, drawn_by) for found in users.values()))


def _in_place(users: list[Place], catalogue: Catalogue, drawn_by: dict[int, list[str]]) -> Site:
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


def was_trained(model: nn.Module) -> bool:
    """Whether there are signs that the model was trained since surgery: something dropped, a forward
    was seen to read a weight, or parameters have gradients where none had one."""
    states = [place.state for place in places(model)]
    if any(state.drawn or state.undropped_by is not None for state in states):
        return True
    return any(state.before_training for state in states) and has_gradients(model.parameters())


def _drawn_by(catalogue: Catalogue) -> dict[int, list[str]]:
    """Names of the parents that draw for a module, by the module's id."""
    found: dict[int, list[str]] = {}
    for _, module in catalogue:
        if isinstance(module, DropConnectModule):
            for child in drawn_children(module):
                found.setdefault(id(child), []).append(catalogue.name(module))
        for reader in catalogue.graphs.readers(module) if catalogue.graphs else ():
            found.setdefault(id(module), []).append(catalogue.name(reader))
    return found


def can_undo(model: nn.Module) -> bool:
    """Whether DropConnect is in place and `undo` would succeed."""
    modules = named_modules(model)
    surgeon = graph_surgeon([module for _, module in modules])
    problem = next(_all_stuck(model, operated_among(modules), surgeon), None)
    return next(places(model), None) is not None and problem is None


@contextlib.contextmanager
def suspended(model: nn.Module) -> Iterator[None]:
    """The plain model for a while. Inside, values may change but modules may not."""
    modules = named_modules(model)
    kept: list[_Todo] = [
        (_as_change(module), type(module), _buffers(module))
        for _, module in operated_among(modules)
    ]
    kept += [
        (Change(owner, states_of(owner), in_graph=True), None, _buffers(owner))
        for owner in _owners_in_graphs(modules)
    ]
    nodes = undo(model)
    try:
        yield
    finally:
        _carry_out(kept, Catalogue(model).graphs, nodes)


@contextlib.contextmanager
def reapplied(model: nn.Module) -> Iterator[None]:
    """The plain model for a while; on exit the same sites, found by name, are operated on again.
    Inside, weights may be resized and modules replaced, as resizing an embedding does."""
    plan = current_plan(model)
    kept = [
        (name, dict(states_of(module)), _buffers(module))
        for name, module in named_modules(model)
        if states_of(module)
    ]
    undo(model)
    try:
        yield
    finally:
        look = Look(model, None)
        operate(prepare(model, plan, None, DropConnectConfig(), look, resized=True))
        for name, states, anchors in kept:
            for state in states.values():
                _put_back(model.get_submodule(name), state, anchors)


def rescope(model: nn.Module) -> None:
    """Let exactly those modules follow their forward whose sites need it now."""
    owners = [place.owner for place in places(model) if needs_scope(place.state.config)]
    wanted: dict[int, nn.Module] = {}
    if owners:
        catalogue = Catalogue(model)
        wanted = {id(one): one for owner in owners for one in catalogue.enclosing(owner)}
    todo = [Change(module, scope=True) for module in wanted.values() if not _has_scope(module)]
    for change, cls in [(change, _new_class(change)) for change in todo]:
        _swap(change, cls, {})
    for _, module in operated_among(named_modules(model)):
        if module._dropconnect_scope and id(module) not in wanted:
            module.__dict__["_dropconnect_scope"] = False
            if not module._dropconnect and not module._dropconnect_draws:
                _unswap(module)


def _has_scope(module: nn.Module) -> bool:
    return isinstance(module, DropConnectModule) and module._dropconnect_scope


def _as_change(module: DropConnectModule) -> Change:
    states, draws = dict(module._dropconnect), list(module._dropconnect_draws)
    return Change(module, states, draws=draws, scope=module._dropconnect_scope)


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """The anchors of a module, by buffer name."""
    names = [state.anchor for state in states_of(module).values() if state.anchor is not None]
    return {name: getattr(module, name) for name in names}


def _put_back(module: Any, old: SiteState, anchors: dict[str, Tensor]) -> None:
    """The state and the anchor as they were. If the weight was resized along its first dimension,
    rows that stayed keep their anchor; new rows keep the one just made, their value now."""
    if states_of(module)[old.name].layout == old.layout:
        set_state(module, old)
    if old.anchor is None:
        return
    before, now = anchors[old.anchor], module._buffers[old.anchor]
    if now.shape == before.shape:
        module._buffers[old.anchor] = before
    elif now.shape[1:] == before.shape[1:]:
        rows = min(len(now), len(before))
        now[:rows] = before[:rows]
