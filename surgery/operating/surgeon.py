"""Operate and undo.

`operate` carries out a prepared plan and cannot stop half-way (`surgery.base.journal`); `undo` is its
exact inverse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from ..base.journal import Changes, at_once, data_of, surely
from ..modules.dropping import runs_now
from ..modules.masking import is_managed
from ..modules.operated import DropConnectModule
from ..modules.places import carriers, plain_parameters, states_of
from ..modules.takers import taken
from ..modules.walk import Modules, named_modules
from ..ops.part_mask import spread_as
from ..planning.graphs import GraphSurgeon, Nodes, Survey, graph_surgeon
from ..planning.prepare import Change, Prepared
from ..spec.errors import NotOperatedError, SurgeryError, raise_all
from ..torch_private.modes import outside_of_inference
from .swap import plain_names, swap, unswap

Anchors = Mapping[str, Tensor]
"""Pretrained values by the plain dotted name of a weight."""

_Todo = tuple[Change, dict[str, Tensor]]
"""A change, and the anchors that come with it, by buffer name."""


def operate(prepared: Prepared, kept: Anchors | None = None) -> None:
    """Carry out a prepared plan, as a whole or not at all.

    Args:
        prepared: see `prepare`.
        kept: values of anchors, by the name of their site; of others the weight's value is taken.
    """
    with outside_of_inference():  # the model can be trained afterwards
        known = {} if kept is None else _kept_anchors(prepared, kept)
        todo = [(change, _anchors(change, known)) for change in prepared.changes]
    carry_out(todo, prepared.graphs)


def _kept_anchors(prepared: Prepared, kept: Anchors) -> dict[int, Tensor]:
    """Copies of saved anchors, each of the shape and strides of its weight, by the id of the weight. A
    tied weight may be saved under any of its names: which one depends on the model that was saved.

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
        known[id(site.parameter)] = spread_as(site.parameter, saved)
    return known


def carry_out(todo: Sequence[_Todo], graphs: Survey | None, nodes: Nodes | None = None) -> None:
    """Make changes: to the modules in one step, to graphs so that it is taken back if it does not end.

    Args:
        todo: each change with its anchors.
        graphs: what the graphs in the model read, if it has any.
        nodes: what their nodes called before, to be used again.
    """
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


def undo(
    model: nn.Module, walked: Modules | None = None, values: Sequence[tuple[Tensor, Tensor]] = ()
) -> None:
    """Take DropConnect out of every module and graph, as a whole or not at all.

    Args:
        model: operated.
        walked: its `named_modules`, if somebody has walked over them already.
        values: raw parameters, and tensors of which they take the memory with the same step.

    Raises:
        NotOperatedError: there is none in place.
        SurgeryError: a module's class was changed again since, or a node; the model is unchanged.
    """
    walked = named_modules(model) if walked is None else walked
    surgeon = graph_surgeon(module for _, module in walked)
    carrying = carriers(walked)
    if not carrying:
        raise NotOperatedError.none_in(model, "; there is nothing to strip")
    raise_all(_all_stuck(model, carrying, surgeon), "take DropConnect out")
    changes, names = Changes(), Changes()
    by_class = _by_class(carrying)
    for alike in by_class:
        unswap(changes, alike)
    for _, module in carrying:
        if not isinstance(module, DropConnectModule):
            plain_names(names, module, states_of(module))
    changes.take(partial(setattr, raw, "data", value) for raw, value in values)
    if surgeon is None:
        changes.make()
    else:
        put_back = at_once([*surgeon.image(model), *data_of(raw for raw, _ in values)])
        try:
            names.make()
            surgeon.remove(model)
            changes.make()
        except BaseException:
            surely(put_back)
            raise
    for alike in by_class:
        if isinstance(alike[0], nn.RNNBase):
            for module in alike:
                module.flatten_parameters()  # type: ignore[operator]


def _by_class(carrying: Modules) -> list[list[DropConnectModule]]:
    """Modules that have one operated class together."""
    alike: dict[type, list[DropConnectModule]] = {}
    for _, module in carrying:
        if isinstance(module, DropConnectModule):
            alike.setdefault(type(module), []).append(module)
    return list(alike.values())


def _all_stuck(model: nn.Module, carrying: Modules, surgeon: GraphSurgeon | None) -> Iterator[str]:
    """Why DropConnect cannot be taken out of these modules and of the graphs now."""
    for name, module in carrying:
        if isinstance(module, DropConnectModule):
            problem = _stuck(name or "(root)", module)
            if problem is not None:
                yield problem
    if surgeon is not None:
        yield from surgeon.stuck(model)


def _stuck(name: str, module: DropConnectModule) -> str | None:
    """Why an operated module with this name cannot be made plain now, and what to do; or None."""
    if "_dropconnect_class" not in type(module).__dict__:
        return (
            f"{name}: its class was changed to {type(module).__name__} after apply (by "
            "fully_shard?); take that out first, or use plain_state_dict to get plain weights"
        )
    if module._dropconnect and is_managed(module):
        return (
            f"{name}: FSDP holds its parameters under their present names; "
            "plain_state_dict gives plain weights to load into a plain model"
        )
    held, parameters = module.__dict__, module._parameters
    for state in module._dropconnect.values():
        if state.raw not in parameters:
            return taken(module, state)
        # A live mask alone does not tell: a forward that was killed may have left it.
        if held[state.live] is not None and runs_now(module):
            return f"{name}: its forward is running"
    return None


def can_undo(model: nn.Module) -> bool:
    """Whether DropConnect is in place and `undo` would succeed."""
    walked = named_modules(model)
    surgeon = graph_surgeon(module for _, module in walked)
    carrying = carriers(walked)
    has_sites = any(states_of(module) for _, module in carrying)
    return has_sites and next(_all_stuck(model, carrying, surgeon), None) is None
