"""From targets to a validated plan: look at everything, change nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..kinds.kind import follows_weight
from ..kinds.product import Demand
from ..modules.laws import give_laws
from ..modules.masking import is_managed
from ..modules.operated import DropConnectModule, operated_class, plain_class
from ..modules.places import plain_parameters, states_of, without_moments
from ..modules.ranks import note_mesh
from ..modules.state import SiteState
from ..moments.scope import needs_scope
from ..ops.part import part_of
from ..ops.part_mask import is_sharded
from ..spec.config import DropConnectConfig
from ..spec.errors import raise_all
from ..spec.plan import Plan, Site, Use
from .catalogue import Catalogue, Owner
from .graphs import Survey
from .known import Known
from .refusals import Candidate, no_class, refused
from .runs import RunOnce
from .select import select
from .ties import by_parameter, ties, with_ties


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
    _new_class: type[DropConnectModule] | None = field(default=None, init=False, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Plain names of all parameters that are operated then, in the order of the module."""
        names = tuple(self.states)
        if isinstance(self.module, DropConnectModule):
            names += tuple(self.module._dropconnect)
        if len(names) < 2:
            return names
        return tuple(name for name in plain_parameters(self.module) if name in names)

    def new_class(self) -> type[DropConnectModule]:
        """The class that the module gets.

        Raises:
            TypeError: there can be none.
        """
        if self._new_class is None:
            self._new_class = operated_class(plain_class(self.module), self.names)
        return self._new_class


class Planned(NamedTuple):
    """One site, under the names of all its users."""

    state: SiteState
    """Of the first user."""
    names: list[str]
    parameter: Tensor
    drawn_by: list[str]
    no_moments: str | None
    """Why no moments are known of it."""


@dataclass(frozen=True)
class Prepared:
    """A validated plan and the changes that carry it out."""

    sites: list[Planned]
    changes: list[Change]
    graphs: Survey | None
    """What the graphs in the model read, if it has any."""
    uses: Mapping[str, tuple[Use, ...]]
    """What is known of uses, by the name of the parameter."""

    def states(self) -> list[SiteState]:
        """What the modules will know of the sites: of every user of each."""
        return [state for change in self.changes for state in change.states.values()]

    def plan(self) -> Plan:
        """The plan as data, for those who ask; surgery itself needs only the changes."""
        return Plan(tuple(self._site(*planned) for planned in self.sites))

    def _site(
        self,
        state: SiteState,
        names: list[str],
        parameter: Tensor,
        drawn_by: list[str],
        no_moments: str | None,
    ) -> Site:
        return Site(
            module=names[0].rpartition(".")[0],
            parameter=state.name,
            kind=state.kind,
            shape=tuple(parameter.shape),
            config=state.config,
            shared_with=tuple(names[1:]),
            drawn_by=tuple(drawn_by),
            uses=self.uses.get(names[0], ()),
            no_moments=no_moments,
        )


def prepare(
    model: nn.Module,
    targets: Any,
    exclude: Any,
    config: DropConnectConfig,
    run: RunOnce,
    *,
    resized: bool = False,
) -> Prepared:
    """Select, group ties, and validate every site. Changes nothing.

    Args:
        model, targets, exclude, config: see `surgery.apply_dropconnect`.
        run: what a run of the model shows, asked for where the source leaves a doubt.
        resized: whether weights may have another shape than a plan says.

    Raises:
        SurgeryError: the first reason, or all the reasons, why the plan cannot be carried out.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module; got {type(model).__name__}")
    catalogue = Catalogue(model)
    choices, excluded = select(catalogue, targets, exclude, config)
    plan, tied = targets if isinstance(targets, Plan) else None, ties(catalogue)
    if plan is None:  # which lists the users that drop
        choices = with_ties(catalogue, choices, excluded, tied)
    known = Known(catalogue, tied, plan, run, resized)
    problems: list[str] = []
    sites = [
        [Candidate.of(user, catalogue, known) for user in users]
        for users in by_parameter(choices, problems)
    ]
    problems += refused(one for users in sites for one in users)
    changes: dict[int, Change] = {}
    planned = [] if problems else [_site(catalogue, users, changes) for users in sites]
    raise_all(problems or [*_lone_biases(changes), *_without_class(catalogue, changes)])
    _complete(catalogue, sites, changes)
    return Prepared(planned, list(changes.values()), catalogue.graphs, run.uses)


def _site(
    catalogue: Catalogue, candidates: Sequence[Candidate], changes: dict[int, Change]
) -> Planned:
    """Record the changes of one site, whose users can all be operated on."""
    names, states = [], []
    drawn_by: set[str] = set()
    for one in candidates:
        user, module, state = one.user, one.user.module, _state(one)
        names.append(state.site)
        states.append(state)
        change = _change(changes, module)
        change.states[state.name] = state
        change.in_graph = user.owner.in_graph
        if catalogue.graphs is not None:
            drawn_by.update(
                catalogue.of(reader).name for reader in catalogue.graphs.readers(module)
            )
        if needs_scope(user.config):
            for around in settling(catalogue, user.owner, state):
                _change(changes, around).scope = True
        for drawer, path in one.drawers:
            draws = _change(changes, drawer).draws
            if path not in draws:
                draws.append(path)
            drawn_by.add(catalogue.of(drawer).name)
    problems = (_no_moments(one, state) for one, state in zip(candidates, states))
    problem = next(filter(None, problems), None)
    return Planned(states[0], names, candidates[0].parameter, catalogue.in_order(drawn_by), problem)


def _no_moments(one: Candidate, state: SiteState) -> str | None:
    """Why no moments are known of a parameter. Those of a bias that is dropped with its weight are
    known if those of the weight are, which `_lone_biases` looks after."""
    lone = state.with_weight and not state.varies
    return None if lone else without_moments(state)


def settling(catalogue: Catalogue, owner: Owner, state: SiteState) -> Iterator[nn.Module]:
    """The modules whose forward may be the outermost one that a site is part of, and settles what
    leaves it. A product that is called alone returns a tensor by itself."""
    yield from catalogue.enclosing(owner)
    if state.varies:
        yield owner.module


def _change(changes: dict[int, Change], module: nn.Module) -> Change:
    """What will happen to a module, so far."""
    change = changes.get(id(module))
    if change is None:
        change = changes[id(module)] = Change(module)
    return change


def _state(one: Candidate) -> SiteState:
    user, owner = one.user, one.user.owner
    layout = owner.kind.layout(owner.module, user.name, one.parameter, user.config.unit)
    assert layout is not None  # `refused` has looked
    follows = None
    if follows_weight(user.config.unit):
        weights = (name for name in owner.parameters if owner.kind.bias(name) == user.name)
        follows = next(weights, None)
    uses = one.product, one.varies, one.in_training
    state = SiteState(user.name, one.kind, user.config, layout, follows, user.full, *uses)
    if is_sharded(one.parameter):
        state.hold(part_of(one.parameter))
    return state


def _complete(
    catalogue: Catalogue, sites: Iterable[Sequence[Candidate]], changes: dict[int, Change]
) -> None:
    """Give the states of a plan that can be carried out what is not known of one alone."""
    new = [
        (changes[id(one.user.module)].states[one.user.name], one.parameter)
        for candidates in sites
        for one in candidates
    ]
    give_laws(new)
    for owner in catalogue:
        note_meshes(owner.module)
    if have_gradients(owner.module for owner in catalogue):
        for state, _ in new:
            state.had_gradients = True


def note_meshes(module: nn.Module) -> None:
    """Let the processes that share weights of a module draw alike, for weights beside these too."""
    for one in module._parameters.values():
        if is_sharded(one) and not is_managed(module):
            note_mesh(one.device_mesh)  # type: ignore[union-attr]


def have_gradients(modules: Iterable[nn.Module]) -> bool:
    """Whether a backward pass has left a gradient on a parameter of any of these."""
    for module in modules:
        for one in module._parameters.values():
            if one is not None and one.is_leaf and one.grad is not None:
                return True
    return False


def _lone_biases(changes: dict[int, Change]) -> list[str]:
    """Biases that nothing but the product with their weight could drop, where that weight is not
    dropped in the same way."""
    problems = []
    for change in changes.values():
        bias = None if change.in_graph else change.states.get("bias")
        if bias is None:
            continue
        weight = {**states_of(change.module), **change.states}.get("weight")
        its = None if weight is None else Demand.of(weight.config)
        problem = Demand.of(bias.config).refused_apart(its)
        if problem is not None:
            problems.append(f"{bias.site} ({type(change.module).__name__}): {problem}")
    return problems


def _without_class(catalogue: Catalogue, changes: dict[int, Change]) -> Iterator[str]:
    """Modules that cannot become what surgery makes of them: of sites, and around them."""
    for change in changes.values():
        if change.in_graph or isinstance(change.module, DropConnectModule):
            continue
        problem = no_class(change.module, change.new_class)
        if problem is not None:
            name = catalogue.of(change.module).name or "(root)"
            yield f"{name} ({type(change.module).__name__}): {problem}"
