"""From targets to a validated plan: look at everything, change nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..kinds.product import Demand, Product
from ..kinds.table import follows_weight, kind_of, layout_of
from ..modules.laws import give_laws
from ..modules.operated import DropConnectModule, operated_class, plain_class
from ..modules.places import plain_parameters, states_of
from ..modules.state import SiteState
from ..moments.scope import needs_scope
from ..spec.config import DropConnectConfig
from ..spec.errors import raise_all
from ..spec.plan import Plan, Site, Use
from .catalogue import Catalogue
from .graphs import Survey
from .known import Known
from .refusals import no_class, not_followed, why_not
from .runs import Look
from .select import Choice, select
from .ties import Users, by_parameter, ties, with_ties


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


class Found(NamedTuple):
    """One site, under the names of all its users."""

    state: SiteState
    """Of the first user."""
    names: list[str]
    parameter: Tensor
    drawn_by: list[str]


@dataclass(frozen=True)
class Prepared:
    """A validated plan and the changes that carry it out."""

    found: list[Found]
    changes: list[Change]
    graphs: Survey | None
    """What the graphs in the model read, if it has any."""
    uses: Mapping[str, tuple[Use, ...]]
    """What is known of uses, by the name of the parameter."""

    def plan(self) -> Plan:
        """The plan as data, for those who ask; surgery itself needs only the changes."""
        return Plan(tuple(self._site(*found) for found in self.found))

    def _site(
        self, state: SiteState, names: list[str], parameter: Tensor, drawn_by: list[str]
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
        )


def prepare(
    model: nn.Module,
    targets: Any,
    exclude: Any,
    config: DropConnectConfig,
    look: Look,
    *,
    resized: bool = False,
) -> Prepared:
    """Select, group ties, and validate every site. Changes nothing.

    Args:
        model, targets, exclude, config: see `surgery.apply_dropconnect`.
        look: what a run of the model shows, asked for where the source leaves a doubt.
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
    known = Known(catalogue, tied, plan, look, resized)
    changes: dict[int, Change] = {}
    sites: list[Found] = []
    problems: list[str] = []
    found = by_parameter(catalogue, choices, problems)
    for users, parameter in found:
        site = _site(catalogue, users, parameter, changes, problems, known)
        if site is not None:
            sites.append(site)
    raise_all(problems or [*_lone_biases(changes), *_without_class(catalogue, changes)])
    _complete(found, changes, have_gradients(catalogue.modules.values()))
    return Prepared(sites, list(changes.values()), catalogue.graphs, look.uses)


def _site(
    catalogue: Catalogue,
    users: list[Choice],
    parameter: Tensor,
    changes: dict[int, Change],
    problems: list[str],
    known: Known,
) -> Found | None:
    """Record the changes of one site with all its users; add what is wrong to `problems`."""
    before = len(problems)
    names: list[str] = []
    drawn_by: set[str] = set()
    for user in users:
        module, full = user.module, catalogue.full(user.module, user.name)
        names.append(full)
        parents = known.readers(user, full)
        readers = [parent for parent, _ in parents]
        kind_name, product = _operation(catalogue, user, bool(parents))
        problem = known.unlike(user, kind_name, parameter)
        problem = problem or why_not(user, parameter, readers, known, catalogue.graphs)
        problem = problem or known.problem(user, full, product)
        if problem is None and user.config.inference == "moments":
            problem = not_followed(catalogue, module)
        if problem is not None:
            problems.append(f"{full} ({type(module).__name__}): {problem}")
            continue
        change = _change(changes, module)
        change.states[user.name] = _state(catalogue, user, full, parameter, kind_name, product)
        if catalogue.graphs is not None:
            change.in_graph = catalogue.graphs.owns(module)
            drawn_by.update(map(catalogue.name, catalogue.graphs.readers(module)))
        if needs_scope(user.config):
            for around in catalogue.enclosing(module):
                _change(changes, around).scope = True
        for parent, path in parents:
            draws = _change(changes, parent).draws
            if path not in draws:
                draws.append(path)
            drawn_by.add(catalogue.name(parent))
    if len(problems) > before:
        return None
    first = users[0]
    state = changes[id(first.module)].states[first.name]
    return Found(state, names, parameter, catalogue.in_order(drawn_by))


def _change(changes: dict[int, Change], module: nn.Module) -> Change:
    """What will happen to a module, so far."""
    found = changes.get(id(module))
    if found is None:
        found = changes[id(module)] = Change(module)
    return found


def _state(
    catalogue: Catalogue,
    user: Choice,
    full: str,
    parameter: Tensor,
    kind_name: str,
    product: Product | None,
) -> SiteState:
    module, name, config = user.module, user.name, user.config
    layout = layout_of(module, name, parameter, config.unit)
    assert layout is not None  # why_not has looked
    follows = None
    if follows_weight(config.unit):
        kind = kind_of(module)
        weights = [weight for weight in catalogue.own(module) if kind.bias(weight) == name]
        follows = weights[0] if weights else None
    return SiteState(name, kind_name, config, layout, follows, full, product)


def _operation(catalogue: Catalogue, user: Choice, by_parents: bool) -> tuple[str, Product | None]:
    """How a weight is read, as `Site.kind`, and the product that is made of it and of nothing else."""
    module, name = user.module, user.name
    if catalogue.graphs is not None and catalogue.is_in_graph(module):
        return catalogue.graphs.kind(module, name), catalogue.graphs.product(module, name)
    kind = kind_of(module)
    own = name == "weight" and not by_parents
    return kind.name, kind.product(plain_class(module)) if own else None


def _complete(found: list[Users], changes: dict[int, Change], had_gradients: bool) -> None:
    """Give the states of a plan that can be carried out what is not known of one alone."""
    new = [
        (changes[id(user.module)].states[user.name], parameter)
        for users, parameter in found
        for user in users
    ]
    give_laws(new)
    if had_gradients:
        for state, _ in new:
            state.had_gradients = True


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
            name = catalogue.name(change.module) or "(root)"
            yield f"{name} ({type(change.module).__name__}): {problem}"
