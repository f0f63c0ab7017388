"""What is known of how a model uses its weights: from the source of its modules, from a plan that was
made before, and from a run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence, Set

from torch import Tensor, nn

from ..kinds.expressions import ANY_ITEM, AttributeChain
from ..kinds.product import Product, needs_product
from ..kinds.reads import ARGUMENT, Forward, forward_in_source, forward_of, is_at
from ..modules.operated import plain_class
from ..spec.plan import Plan, Site
from .catalogue import Catalogue, Owner
from .runs import Look
from .select import Choice, Key
from .ties import Ties

_PRODUCTS = ("linear", "conv1d", "attention", "other")
"""Kinds of module whose weights graphs may read as those of a linear operation."""

_Around = tuple[str, nn.Module, tuple[str, ...], Forward]
"""A module that contains another: name, module, path to the other, what its forward reads."""


class Known:
    """Whose forward reads a weight. `plan_dropconnect` and `apply_dropconnect` ask in the same way."""

    def __init__(
        self,
        catalogue: Catalogue,
        ties: Ties,
        plan: Plan | None,
        look: Look,
        resized: bool = False,
    ) -> None:
        self._catalogue = catalogue
        self._ties = ties
        self._look = look
        self._drawn_by: dict[str, set[str]] | None = None if plan is None else {}
        """By the name of a parameter, what the plan says."""
        self._used_by_owner: set[str] = set()
        self._resized = resized
        self._planned: dict[Key, tuple[Site, bool]] = {}
        """What the plan says of a parameter, and whether the site has its name."""
        for site in plan or ():
            assert self._drawn_by is not None
            for name in (site.name, *site.shared_with):
                self._drawn_by.setdefault(name, set()).update(site.drawn_by)
                owned = catalogue.parameter(name)
                if owned is not None:
                    self._planned[id(owned[0].module), owned[1]] = site, name == site.name
            if any(use.by == site.module for use in site.uses):
                self._used_by_owner.add(site.name)
        self._lineages: dict[str, tuple[list[_Around], list[_Around]]] = {}

    def drawers(self, user: Choice) -> list[tuple[nn.Module, str]]:
        """The ancestors that draw the mask of a weight, because their own forward reads it, or because
        the forward of a module that does not contain the owner reads it inside theirs; each with the
        relative name of the owner."""
        around = self._above(user.owner)
        told = self._told(user, around)
        if told:
            around = self._above(user.owner, every=True)
        drawers: dict[tuple[int, str], tuple[nn.Module, str]] = {}
        for name, ancestor, path, its in around:
            full_path = (*path, user.name)
            if name in told or its.reads(full_path) or _passed_on(ancestor, its, full_path):
                relative = ".".join(path)
                drawers[id(ancestor), relative] = (ancestor, relative)
        return list(drawers.values())

    def reads_itself(self, user: Choice) -> bool:
        """Whether the owner's own forward reads a parameter, as far as its source or a run tells."""
        own = forward_of(user.owner.cls, user.module)
        if own.reads((user.name,)) or not own.complete:
            return True
        if user.full in self._used_by_owner:
            return True
        seen, mine = self._look(), set(user.owner.names)
        running = () if seen is None else seen.running.get(user.full, ())
        return any(mine.intersection(names) for names in running)

    def unlike(self, user: Choice, kind: str) -> str | None:
        """Why a plan was not made for this weight, and what to do; or None. In a graph the operation
        tells the kind: a product is one, whatever the module was."""
        if not self._planned:
            return None
        site, first = self._planned.get(user.key, (None, False))
        parameter = user.parameter
        if site is None or parameter is None or type(parameter) not in (nn.Parameter, Tensor):
            return None
        if user.owner.in_graph and site.kind in _PRODUCTS:
            first = first and kind not in ("linear", "other")
        shape = None if self._resized else tuple(parameter.shape)
        return site.unlike(kind if first else None, shape)

    def problem(self, user: Choice, product: Product | None) -> str | None:
        """Why a run of the model does not allow this, or None."""
        config = user.config
        if product is None or not needs_product(config.sampling, config.inference):
            return None
        seen = self._look() if config.inference == "moments" else self._look.given()
        if seen is None:
            return None
        by = user.owner.names
        if self._catalogue.graphs is not None and user.owner.in_graph:
            readers = (user.module, *self._catalogue.graphs.readers(user.module))
            by = [name for one in readers for name in self._catalogue.of(one).names]
        return seen.problem(user.full, config, product, by)

    def _above(self, owner: Owner, *, every: bool = False) -> list[_Around]:
        """The ancestors of a module, under each name that it has; only those whose forward may concern
        its parameters, or every one. They are looked up once for all children of a module."""
        above: list[_Around] = []
        for full in filter(None, owner.names):
            parent, _, last = full.rpartition(".")
            known = self._lineages.get(parent)
            if known is None:
                known = self._lineages[parent] = self._lineage(parent)
            for name, ancestor, path, its in known[not every]:
                above.append((name, ancestor, (*path, last), its))
        return above

    def _lineage(self, full: str) -> tuple[list[_Around], list[_Around]]:
        """A module and its ancestors, and those of them that may concern a parameter of a child."""
        every = [
            (name, owner.module, path, forward_of(owner.cls, owner.module))
            for name, owner, path in self._catalogue.lineage(full)
            if not owner.in_graph
        ]
        return every, [one for one in every if one[3].concerns(len(one[2]) + 2)]

    def _told(self, user: Choice, around: list[_Around]) -> Set[str]:
        """Names of the modules that draw for a parameter, as a plan or a run says."""
        if self._drawn_by is not None:
            told: Set[str] = self._drawn_by.get(user.full, set())
            seen = self._look.given()
        else:
            told = set()
            seen = self._look() if _is_unsure(around) else self._look.given()
        if seen is None:
            return told
        drawers = (self._drawer(user, running) for running in seen.running.get(user.full, ()))
        return told | {name for name in drawers if name is not None}

    def _drawer(self, user: Choice, running: Sequence[str]) -> str | None:
        """Who has to draw the mask of a weight that is read while these forwards run: the innermost of
        them that contains the owner; nobody, if an owner's own forward is among them, which draws."""
        tied = self._ties.get(id(user.parameter), ())
        owners = {*user.owner.names, *(name for owner, _ in tied for name in owner.names)}
        if not owners.isdisjoint(running):
            return None
        mine = {name for name, _, _ in self._catalogue.ancestors(user.owner)}
        return next((name for name in reversed(running) if name in mine), None)


def _is_unsure(around: list[_Around]) -> bool:
    """Whether a forward around an owner gives it to code whose source is not known."""
    for _, ancestor, path, its in around:
        if its.hands_out(path) or _passed_out(ancestor, its, path):
            return True
    return False


def _passed_on(ancestor: nn.Module, its: Forward, path: AttributeChain) -> bool:
    """Whether a child that a forward passes a module to reads what is at `path`."""
    return any(
        theirs is not None and theirs.reads(rest)
        for theirs, rest in _receivers(ancestor, its, path)
    )


def _passed_out(ancestor: nn.Module, its: Forward, path: AttributeChain) -> bool:
    """Whether a forward passes a module to something that cannot be looked into."""
    return any(
        theirs is None or theirs.hands_out(rest) for theirs, rest in _receivers(ancestor, its, path)
    )


def _receivers(
    ancestor: nn.Module, its: Forward, path: AttributeChain
) -> Iterator[tuple[Forward | None, AttributeChain]]:
    """What is called with the module at `path`, or one that contains it: what it reads, and how it
    reaches `path`; None for a call that cannot be looked into."""
    for callee, key, chain in its.passed:
        if len(chain) > len(path) or not is_at(chain, path):
            continue
        rest = (*ARGUMENT, *path[len(chain) :])
        called = [(child, "forward") for child in _at(ancestor, callee)]
        called = called or [(child, callee[-1]) for child in _at(ancestor, callee[:-1])]
        known = [(plain_class(child), method) for child, method in called]
        known = [
            (cls, method) for cls, method in known if inspect.isfunction(getattr(cls, method, None))
        ]
        if not known:
            yield None, rest
        for cls, method in known:
            yield forward_in_source(cls, key, method), rest


def _at(module: nn.Module, chain: AttributeChain) -> list[nn.Module]:
    """The modules at a chain below one; several where an index is not known."""
    found = [module]
    for part in chain:
        tables = [one._modules for one in found]
        found = [
            child
            for table in tables
            for name, child in table.items()
            if child is not None and part in (name, ANY_ITEM)
        ]
    return found
