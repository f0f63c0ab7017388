"""From targets to a validated plan: look at everything, change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .config import DropConnectConfig
from .errors import raise_all
from .finder import Seen
from .graphs import Survey
from .modules.kinds import SEPARATE_PROJECTIONS, follows_weight, kind_of, layout_of
from .modules.operated import WRAPPERS, plain_class
from .modules.places import plain_parameters, states_of
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
    in_graph: bool = False
    """Whether only nodes of a graph read the parameters: then the class stays."""
    draws: list[str] = field(default_factory=list)
    scope: bool = False
    """Whether its forward is one that a site inside needs to know of; see `surgery.moments`."""


@dataclass(frozen=True)
class Prepared:
    """A validated plan and the changes that carry it out."""

    plan: Plan
    changes: list[Change]
    graphs: Survey | None = None
    """What the graphs in the model read, if it has any."""


def prepare(
    model: nn.Module,
    targets: Any,
    exclude: Any,
    config: DropConnectConfig,
    seen: Seen | None = None,
) -> Prepared:
    """Select, group ties, and validate every site. Changes nothing.

    Args:
        model, targets, exclude, config: see `surgery.apply_dropconnect`.
        seen: what a run of the model showed, if there was one.

    Raises:
        SurgeryError: the first reason, or all the reasons, why the plan cannot be carried out.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module; got {type(model).__name__}")
    load_plugins()
    catalogue = Catalogue(model)
    choices, excluded = select(catalogue, targets, exclude, config)
    known = Known(targets if isinstance(targets, Plan) else None, seen)
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
            and (not is_in_graph(catalogue, module) or _is_read(catalogue, module, name))
        ]
        site = _site(catalogue, users, parameter, changes, problems, known)
        if site is not None:
            sites.append(site)
    raise_all(problems or _lone_biases(changes))
    if seen is not None:
        sites = [replace(site, uses=seen.uses.get(site.name, ())) for site in sites]
    return Prepared(Plan(tuple(sites)), list(changes.values()), catalogue.graphs)


def _site(
    catalogue: Catalogue,
    users: list[Choice],
    parameter: Tensor,
    changes: dict[int, Change],
    problems: list[str],
    known: Known,
) -> Site | None:
    """Record the changes of one site with all its users; add what is wrong to `problems`."""
    before = len(problems)
    drawn_by: list[str] = []
    for user in users:
        full = _full(catalogue, user)
        parents = _readers(catalogue, user, known.readers(full))
        problem = _problem(user, parameter, [parent for parent, _ in parents], catalogue.graphs)
        problem = problem or known.problem(full, user.config)
        if problem is None and user.config.inference == "moments":
            problem = not_followed(catalogue, user.module)
        if problem is not None:
            problems.append(f"{_full(catalogue, user)} ({type(user.module).__name__}): {problem}")
            continue
        change = changes.setdefault(id(user.module), Change(user.module))
        change.in_graph = is_in_graph(catalogue, user.module)
        change.states[user.name] = _state(catalogue, user, parameter, parents)
        for reader in catalogue.graphs.readers(user.module) if catalogue.graphs else ():
            if catalogue.name(reader) not in drawn_by:
                drawn_by.append(catalogue.name(reader))
        if needs_scope(user.config):
            for module in enclosing(catalogue, user.module):
                changes.setdefault(id(module), Change(module)).scope = True
        for parent, path in parents:
            draws = changes.setdefault(id(parent), Change(parent)).draws
            if path not in draws:
                draws.append(path)
            name = catalogue.name(parent)
            if name not in drawn_by:
                drawn_by.append(name)
    if len(problems) > before:
        return None
    first = users[0]
    return Site(
        module=catalogue.name(first.module),
        parameter=first.name,
        kind=changes[id(first.module)].states[first.name].kind,
        shape=tuple(parameter.shape),
        config=first.config,
        shared_with=tuple(_full(catalogue, user) for user in users[1:]),
        drawn_by=tuple(drawn_by),
    )


@dataclass(frozen=True)
class Known:
    """What is known of how the model uses its weights: from a plan made before, and from a run."""

    plan: Plan | None
    seen: Seen | None

    def readers(self, name: str) -> set[str]:
        """Modules whose forward reads a parameter."""
        found = set() if self.seen is None else set(self.seen.readers(name))
        for site in self.plan or ():
            if name in (site.name, *site.shared_with):
                found.update(site.drawn_by)
        return found

    def problem(self, name: str, config: DropConnectConfig) -> str | None:
        """Why a run of the model does not allow this, or None."""
        return None if self.seen is None else self.seen.problem(name, config)


def is_in_graph(catalogue: Catalogue, module: nn.Module) -> bool:
    """Whether only nodes of a graph read the module's parameters."""
    return catalogue.graphs is not None and catalogue.graphs.owns(module)


def _is_read(catalogue: Catalogue, module: nn.Module, name: str) -> bool:
    return catalogue.graphs is not None and catalogue.graphs.is_read(module, name)


def needs_scope(config: DropConnectConfig) -> bool:
    """Whether a site must know the outermost forward that it is part of."""
    return config.sampling == "example" or config.inference == "moments"


def enclosing(catalogue: Catalogue, module: nn.Module) -> Iterator[nn.Module]:
    """The modules that contain one, whose forward can be followed."""
    for full in catalogue.names[id(module)]:
        parts = full.split(".") if full else []
        for depth in range(len(parts)):
            parent = catalogue.model.get_submodule(".".join(parts[:depth]))
            followed = not isinstance(parent, torch.jit.ScriptModule)
            if (
                followed
                and not is_in_graph(catalogue, parent)
                and type(parent).__name__ not in WRAPPERS
            ):
                yield parent


def not_followed(catalogue: Catalogue, module: nn.Module) -> str | None:
    """Why moments cannot reach an activation: nobody would settle what the site returns."""
    around = list(enclosing(catalogue, module))
    if not around or not all("forward" in one.__dict__ for one in around):
        return None
    return (
        f"inference='moments' needs a forward around the site, and that of {type(around[0]).__name__} "
        "has been replaced on the instance; apply before accelerate hooks (device_map) or wrappers"
    )


def _state(
    catalogue: Catalogue, user: Choice, parameter: Tensor, parents: list[tuple[nn.Module, str]]
) -> SiteState:
    module, name, config = user.module, user.name, user.config
    kind = kind_of(module)
    layout = layout_of(module, name, parameter, config.unit)
    assert layout is not None  # _problem has looked
    follows = None
    if follows_weight(config.unit):
        weights = [weight for weight, _ in plain_parameters(module) if kind.bias(weight) == name]
        follows = weights[0] if weights else None
    product, kind_name = None, kind.name
    if catalogue.graphs is not None and is_in_graph(catalogue, module):
        product = catalogue.graphs.product(module, name)
        kind_name = catalogue.graphs.kind(module, name)
    elif name == "weight" and not parents:
        product = kind.product(plain_class(module))
    full = _full(catalogue, user)
    state = SiteState(name, kind_name, config, layout, follows, full, product)
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


def _readers(catalogue: Catalogue, user: Choice, known: set[str]) -> list[tuple[nn.Module, str]]:
    """Ancestors whose own forward reads this weight (by their source, or `known` to do so), each with
    the relative name of the owner."""
    found: dict[tuple[int, str], tuple[nn.Module, str]] = {}
    for full in catalogue.names[id(user.module)]:
        parts = full.split(".") if full else []
        for depth in range(len(parts)):
            name = ".".join(parts[:depth])
            ancestor = catalogue.model.get_submodule(name)
            path = parts[depth:]
            if is_in_graph(catalogue, ancestor):
                continue
            if name in known or reads(plain_class(ancestor)).reads((*path, user.name)):
                relative = ".".join(path)
                found[id(ancestor), relative] = (ancestor, relative)
    return list(found.values())


def _problem(
    user: Choice, parameter: Tensor, parents: list[nn.Module], graphs: Survey | None
) -> str | None:
    """Why this parameter cannot be operated on and what to do about it, or None."""
    module, name, config = user.module, user.name, user.config
    if name in states_of(module):
        return (
            "DropConnect is already in place here; call strip_dropconnect first, or exclude it. "
            "set_p changes p"
        )
    if isinstance(module, torch.jit.ScriptModule):
        return "a scripted module cannot be operated on; apply before torch.jit.script"
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
    if refused is None and graphs is not None:
        refused = graphs.problem(module, name, config)
    in_graph = graphs is not None and graphs.owns(module)
    if refused is None and not in_graph:
        refused = _no_product(user, parents)
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
    if (
        not in_graph
        and kind.name == "other"
        and not parents
        and own.complete
        and not own.reads((name,))
    ):
        return (
            f"neither {type(module).__name__}.forward nor a parent's reads it as an attribute, so "
            "a mask would never act; name the module that uses it"
        )
    return None


def _no_product(user: Choice, parents: list[nn.Module]) -> str | None:
    """Why this site cannot be sampled per example, or its moments be had, if it is to be."""
    config = user.config
    mode = next((f"sampling={m!r}" for m in ("example", "gaussian") if config.sampling == m), None)
    if mode is None and config.inference == "moments":
        mode = "inference='moments'"
    if mode is None:
        return None
    cls, kind = plain_class(user.module), kind_of(user.module)
    instead = "sampling='batch' and inference='mean' or 'sample'"
    if parents:
        return (
            f"{mode} replaces the product in its own forward, but {type(parents[0]).__name__} reads "
            f"the weight itself; use {instead} for it"
        )
    product = kind.product(cls)
    if product is None:
        return (
            f"{mode} needs a forward that is a product of input and weight, and that of "
            f"{cls.__name__} is not known to be one; use {instead} for it"
        )
    if user.name == kind.bias("weight"):
        return None if config.bias else f"{mode} drops a bias with its weight only; use bias=True"
    if user.name != "weight":
        return f"{mode} is for the weight of {cls.__name__} only; use {instead} for it"
    if not product.is_matrix and config.unit == "element" and config.sampling == "example":
        return (
            "sampling='example' would need a filter bank for every example; use unit='input', 'output' "
            "or 'tensor', or sampling='gaussian', or sampling='batch'"
        )
    if not product.is_matrix and config.unit == "input" and config.inference == "moments":
        return (
            "with unit='input' one mask entry multiplies every position of a kernel, and that variance "
            "is not known; use another unit, or inference='sample'"
        )
    return None


def _lone_biases(changes: dict[int, Change]) -> list[str]:
    """Biases that nothing but the product with their weight could drop, where that weight is not
    dropped in the same way."""
    problems = []
    for change in changes.values():
        bias = None if change.in_graph else change.states.get("bias")
        weight = {**states_of(change.module), **change.states}.get("weight")
        if bias is None or (bias.sampling == "batch" and bias.inference != "moments"):
            continue
        if weight is None or (weight.sampling, weight.inference) != (bias.sampling, bias.inference):
            problems.append(
                f"{bias.site} ({type(change.module).__name__}): sampling={bias.sampling!r} with "
                f"inference={bias.inference!r} drops a bias with its weight only, and the weight has "
                "not the same options; name the weight, whose bias=True takes the bias along"
            )
    return problems


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
