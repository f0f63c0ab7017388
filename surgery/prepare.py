"""From targets to a validated plan: look at everything, change nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .config import DropConnectConfig
from .errors import raise_all
from .modules.kinds import SEPARATE_PROJECTIONS, follows_weight, kind_of, layout_of
from .modules.operated import (
    DropConnectModule,
    plain_class,
    plain_parameters,
)
from .modules.reads import reads
from .modules.state import SiteState, raw_name
from .plan import Plan, Site, join
from .plugins import load_plugins
from .select import Catalogue, Choice, select


@dataclass
class Change:
    """What will happen to one module."""

    module: nn.Module
    states: dict[str, SiteState] = field(default_factory=dict)
    draws: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Prepared:
    """A validated plan and the changes that carry it out."""

    plan: Plan
    changes: list[Change]


def prepare(model: nn.Module, targets: Any, exclude: Any, config: DropConnectConfig) -> Prepared:
    """Select, group ties, and validate every site. Changes nothing.

    Raises:
        SurgeryError: the first reason, or all the reasons, why the plan cannot be carried out.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module; got {type(model).__name__}")
    load_plugins()
    catalogue = Catalogue(model)
    choices, excluded = select(catalogue, targets, exclude, config)
    ties = _ties(catalogue)
    changes: dict[int, Change] = {}
    sites: list[Site] = []
    problems: list[str] = []
    done: dict[int, Choice] = {}
    for choice in choices:
        parameter = dict(plain_parameters(choice.module)).get(choice.name)
        if parameter is None:
            problems.append(_missing(catalogue, choice))
            continue
        if id(parameter) in done:
            if done[id(parameter)].config != choice.config:
                problems.append(
                    f"{_full(catalogue, choice)} is tied with {_full(catalogue, done[id(parameter)])}"
                    ", but the two were given different options; give both the same"
                )
            continue
        done[id(parameter)] = choice
        users = [choice]
        users += [
            Choice(module, name, choice.config)
            for module, name in ties[id(parameter)]
            if (id(module), name) not in {(id(choice.module), choice.name), *excluded}
        ]
        site = _site(catalogue, users, parameter, changes, problems)
        if site is not None:
            sites.append(site)
    raise_all(problems)
    return Prepared(Plan(tuple(sites)), list(changes.values()))


def _site(
    catalogue: Catalogue,
    users: list[Choice],
    parameter: Tensor,
    changes: dict[int, Change],
    problems: list[str],
) -> Site | None:
    """Record the changes of one site with all its users; add what is wrong to `problems`."""
    known = len(problems)
    drawn_by: list[str] = []
    for user in users:
        parents = _readers(catalogue, user)
        problem = _problem(user, parameter, [parent for parent, _ in parents])
        if problem is not None:
            problems.append(f"{_full(catalogue, user)} ({type(user.module).__name__}): {problem}")
            continue
        change = changes.setdefault(id(user.module), Change(user.module))
        change.states[user.name] = _state(user, parameter)
        for parent, path in parents:
            draws = changes.setdefault(id(parent), Change(parent)).draws
            if path not in draws:
                draws.append(path)
            name = catalogue.name(parent)
            if name not in drawn_by:
                drawn_by.append(name)
    if len(problems) > known:
        return None
    first = users[0]
    return Site(
        module=catalogue.name(first.module),
        parameter=first.name,
        kind=kind_of(first.module).name,
        shape=tuple(parameter.shape),
        config=first.config,
        shared_with=tuple(_full(catalogue, user) for user in users[1:]),
        drawn_by=tuple(drawn_by),
    )


def _state(user: Choice, parameter: Tensor) -> SiteState:
    module, name, config = user.module, user.name, user.config
    kind = kind_of(module)
    layout = layout_of(module, name, parameter, config.unit)
    assert layout is not None  # _problem has looked
    follows = None
    if follows_weight(config.unit):
        weights = [weight for weight, _ in plain_parameters(module) if kind.bias(weight) == name]
        follows = weights[0] if weights else None
    state = SiteState(name, kind.name, config, layout, follows)
    state.law_for(parameter)
    return state


def _ties(catalogue: Catalogue) -> dict[int, list[tuple[nn.Module, str]]]:
    """All users of every parameter, by the parameter's id."""
    users: dict[int, list[tuple[nn.Module, str]]] = {}
    for _, module in catalogue:
        for name, parameter in plain_parameters(module):
            if parameter is not None:
                users.setdefault(id(parameter), []).append((module, name))
    return users


def _readers(catalogue: Catalogue, user: Choice) -> list[tuple[nn.Module, str]]:
    """Ancestors whose own forward reads this weight, each with the relative name of the owner."""
    found: dict[tuple[int, str], tuple[nn.Module, str]] = {}
    for full in catalogue.names[id(user.module)]:
        parts = full.split(".") if full else []
        for depth in range(len(parts)):
            ancestor = catalogue.model.get_submodule(".".join(parts[:depth]))
            path = parts[depth:]
            if reads(plain_class(ancestor)).reads((*path, user.name)):
                relative = ".".join(path)
                found[id(ancestor), relative] = (ancestor, relative)
    return list(found.values())


def _problem(user: Choice, parameter: Tensor, parents: list[nn.Module]) -> str | None:
    """Why this parameter cannot be operated on and what to do about it, or None."""
    module, name, config = user.module, user.name, user.config
    if isinstance(module, DropConnectModule) and name in module._dropconnect:
        return (
            "DropConnect is already in place here; call strip_dropconnect first, or exclude it. "
            "set_p changes p"
        )
    if isinstance(module, torch.jit.ScriptModule):
        return "a scripted module cannot be operated on; apply before torch.jit.script"
    if isinstance(module, torch.fx.GraphModule):
        return "the weight is read by a traced graph; apply to the model before tracing it"
    for reader in (module, *parents):
        if "forward" in reader.__dict__:
            return (
                f"the forward of {type(reader).__name__} has been replaced on the instance, so masks "
                "would never act; apply before accelerate hooks (device_map) or wrappers are added"
            )
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        return "the parameter is lazy and has no shape yet; run the model once, then apply"
    if type(parameter) not in (nn.Parameter, Tensor):
        return (
            f"the weight is a {type(parameter).__name__} (sharded or quantised); apply before "
            "fully_shard, tensor parallelism or quantisation"
        )
    if not parameter.is_floating_point():
        return f"the weight has dtype {parameter.dtype}; only floating-point weights can be dropped"
    if hasattr(module, raw_name(name)):
        return f"the module already has an attribute {raw_name(name)!r}; rename that first"
    if config.toward == "pretrained":
        if not parameter.requires_grad:
            return (
                "it is frozen, so it never leaves its pretrained value; exclude it or unfreeze it"
            )
        if parameter.device.type == "meta":
            return 'it has no value yet to go toward; load the weights before toward="pretrained"'
    kind = kind_of(module)
    refused = kind.refuse(module, name)
    if refused is not None:
        return refused
    if layout_of(module, name, parameter, config.unit) is None:
        return f'unit={config.unit!r} has no meaning for this parameter; use "element" or "tensor"'
    if config.bias and follows_weight(config.unit) and name in SEPARATE_PROJECTIONS:
        return (
            f"unit={config.unit!r} with bias=True would have to split one packed bias between three "
            "masks; use bias=False"
        )
    own = reads(plain_class(module))
    if kind.name == "other" and not parents and own.complete and not own.reads((name,)):
        return (
            f"neither {type(module).__name__}.forward nor a parent's reads it as an attribute, so "
            "a mask would never act; name the module that uses it"
        )
    return None


def _missing(catalogue: Catalogue, choice: Choice) -> str:
    name = _full(catalogue, choice)
    if hasattr(choice.module, "parametrizations"):
        return f"{name} is parametrized; call remove_parametrizations first, or exclude it"
    return (
        f"{name}: {type(choice.module).__name__} has no such parameter (pruned, replaced or None); "
        "exclude it"
    )


def _full(catalogue: Catalogue, choice: Choice) -> str:
    return join(catalogue.name(choice.module), choice.name)
