"""Operate and undo: the only place that changes a model.

`operate` carries out a prepared plan and cannot stop half-way (`surgery.base.journal`); `undo` is its
exact inverse. Both move `Parameter` objects and never copy them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from ..base.caching import cached
from ..base.journal import Changes, at_once, surely
from ..modules.dropping import drawn_children, runs_now
from ..modules.masking import is_managed
from ..modules.operated import DropConnectModule, operated_among
from ..modules.places import Place, places, plain_parameters, states_of
from ..modules.state import SiteState, live_name, raw_name
from ..modules.takers import taken
from ..modules.walk import named_modules
from ..moments.scope import needs_scope
from ..planning.catalogue import Catalogue
from ..planning.graphs import GraphSurgeon, Nodes, Survey, graph_owners, graph_surgeon
from ..planning.prepare import Change, Prepared, have_gradients
from ..spec.config import DropConnectConfig
from ..spec.errors import NotOperatedError, SurgeryError, raise_all
from ..spec.plan import Plan, Site, join
from ..torch_private.recurrent import FLAT_WEIGHTS, flat_lists, names_of

Anchors = Mapping[str, Tensor]
"""Pretrained values by the plain dotted name of a weight."""

Modules = Sequence[tuple[str, nn.Module]]
"""What `named_modules` found."""

_Todo = tuple[Change, dict[str, Tensor]]
"""A change, and the anchors that come with it, by buffer name."""


def operate(prepared: Prepared, kept: Anchors | None = None) -> None:
    """Carry out a prepared plan, as a whole or not at all.

    Args:
        prepared: see `prepare`.
        kept: values of anchors, by the name of their site; of others the weight's value is taken.
    """
    known = {} if kept is None else _kept_anchors(prepared, kept)
    todo = [(change, _anchors(change, known)) for change in prepared.changes]
    carry_out(todo, prepared.graphs)


def _kept_anchors(prepared: Prepared, kept: Anchors) -> dict[int, Tensor]:
    """Anchors by the id of their weight. Of a tied weight any name will do: which one a file has
    depends on the model that it was saved from.

    Raises:
        SurgeryError: one is missing.
    """
    known: dict[int, Tensor] = {}
    for site in prepared.sites:
        if site.state.anchor is None:
            continue
        saved = next((kept[name] for name in site.names if name in kept), None)
        if saved is None:
            raise SurgeryError(
                f"no anchor was saved for {site.names[0]!r}, which is toward='pretrained'; the model "
                "is unchanged"
            )
        weight = site.parameter
        known[id(weight)] = weight.detach().clone().copy_(saved)  # with the strides of the weight
    return known


def carry_out(todo: Sequence[_Todo], graphs: Survey | None, nodes: Nodes | None = None) -> None:
    """Make these changes: to the modules in one step, to graphs so that it is taken back if it does
    not end. `nodes` are used again."""
    changes = Changes()
    for change, anchors in todo:
        swap(changes, change, anchors)
    if graphs is None:
        changes.make()
        return
    put_back = at_once(graphs.image())
    try:
        changes.make()
        graphs.insert([(change.module, change.states) for change, _ in todo], nodes or {})
    except BaseException:
        surely(put_back)
        raise


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


def swap(changes: Changes, change: Change, anchors: dict[str, Tensor]) -> None:
    module = change.module
    if not change.in_graph:
        _swap_class(changes, change)
    _rename(changes, module, {name: state.raw for name, state in change.states.items()})
    if anchors:
        changes.put(module._buffers, anchors)


def _swap_class(changes: Changes, change: Change) -> None:
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
    changes.put(held, items)
    if FLAT_WEIGHTS in held:
        changes.drop(held, FLAT_WEIGHTS)


def _rename(changes: Changes, module: nn.Module, names: dict[str, str]) -> None:
    """Rename parameters, keeping their order and the dict object."""
    if names:
        held = module._parameters
        changes.fill(held, {names.get(name, name): value for name, value in held.items()})


def undo(model: nn.Module, walked: Modules | None = None) -> None:
    """Take DropConnect out of every module and graph, as a whole or not at all.

    Args:
        model: operated.
        walked: its `named_modules`, if somebody has walked over them already.

    Raises:
        NotOperatedError: there is none in place.
        SurgeryError: a module's class was changed again since, or a node; the model is unchanged.
    """
    walked = named_modules(model) if walked is None else walked
    modules = list(operated_among(walked))
    surgeon = graph_surgeon([module for _, module in walked])
    owners = [] if surgeon is None else owners_in_graphs(walked)
    in_graphs = [(owner, states_of(owner)) for owner in owners]
    if not modules and not in_graphs:
        raise NotOperatedError(
            f"{type(model).__name__} has no DropConnect in place; there is nothing to strip"
        )
    raise_all(_all_stuck(model, modules, surgeon), "take DropConnect out")
    changes, names = Changes(), Changes()
    for alike in _by_class(modules):
        unswap(changes, alike)
    for owner, states in in_graphs:
        _plain_names(names, owner, states)
    if surgeon is None:
        changes.make()
    else:
        put_back = at_once(surgeon.image(model))
        try:
            names.make()
            surgeon.remove(model)
            changes.make()
        except BaseException:
            surely(put_back)
            raise
    for _, module in modules:
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()


def _by_class(
    modules: Iterable[tuple[str, DropConnectModule]],
) -> Iterable[list[DropConnectModule]]:
    """Modules that have one class together."""
    alike: dict[type, list[DropConnectModule]] = {}
    for _, module in modules:
        alike.setdefault(type(module), []).append(module)
    return alike.values()


def owners_in_graphs(modules: Iterable[tuple[str, nn.Module]]) -> list[nn.Module]:
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
    if module._dropconnect and is_managed(module):
        return (
            f"{name or '(root)'}: FSDP holds its parameters under their present names; "
            "plain_state_dict gives plain weights to load into a plain model"
        )
    held, parameters = module.__dict__, module._parameters
    for state in module._dropconnect.values():
        if state.raw not in parameters:
            return taken(module, state)
        # A live mask alone does not tell: a forward that was killed may have left it.
        if held[state.live] is not None and runs_now(module):
            return f"{name or '(root)'}: its forward is running"
    return None


def _plain_names(changes: Changes, module: nn.Module, states: dict[str, SiteState]) -> None:
    _rename(changes, module, {state.raw: state.name for state in states.values()})
    _drop_anchors(changes, module, states)


def _drop_anchors(changes: Changes, module: nn.Module, states: dict[str, SiteState]) -> None:
    for state in states.values():
        if state.anchor is not None:
            changes.drop(cast(dict[str, Any], module._buffers), state.anchor)


def unswap(changes: Changes, modules: Sequence[DropConnectModule]) -> None:
    """Make modules plain that have one class."""
    cls, names = modules[0]._dropconnect_class
    plain_names, added = _of_names(names)
    for module in modules:
        _rename(changes, module, plain_names)
        if module._buffers:
            _drop_anchors(changes, module, module._dropconnect)
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
    plain_names = {raw_name(name): name for name in names}
    return plain_names, (*own, *(live_name(name) for name in names))


def _flat_weights(module: Any) -> dict[str, Any]:
    """The lists that `torch.nn.RNNBase` makes of its parameters."""
    parameters = plain_parameters(module)
    return flat_lists([parameters.get(name) for name in names_of(module)])


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


def can_undo(model: nn.Module) -> bool:
    """Whether DropConnect is in place and `undo` would succeed."""
    modules = named_modules(model)
    surgeon = graph_surgeon([module for _, module in modules])
    problem = next(_all_stuck(model, operated_among(modules), surgeon), None)
    return next(places(model), None) is not None and problem is None


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
    owners = [
        place.owner
        for place in places(model)
        if needs_scope(coming.get(id(place.state)) or place.state.config)
    ]
    wanted: dict[int, nn.Module] = {}
    if owners:
        catalogue = Catalogue(model)
        wanted = {
            id(one): one for owner in owners for one in catalogue.enclosing(catalogue.of(owner))
        }
    for module in wanted.values():
        if not _has_scope(module):
            swap(changes, Change(module, scope=True), {})
    for _, module in operated_among(named_modules(model)):
        if module._dropconnect_scope and id(module) not in wanted:
            if module._dropconnect or module._dropconnect_draws:
                changes.put(module.__dict__, {"_dropconnect_scope": False})
            else:
                unswap(changes, [module])


def _has_scope(module: nn.Module) -> bool:
    return isinstance(module, DropConnectModule) and module._dropconnect_scope
