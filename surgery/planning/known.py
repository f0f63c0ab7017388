"""Whose forward reads a weight, and so who has to draw its mask.

Four say it: a plan that was made before, what the kinds of the modules declare, a run of the model, and
the source of the forwards. A run is made where the user gave inputs for one; without them, only where
the source shows that a module is given to code which has none.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence, Set
from typing import NamedTuple

from torch import Tensor, nn

from ..kinds.expressions import ANY_ITEM, AttributeChain
from ..kinds.product import Product, needs_product
from ..kinds.reads import ARGUMENT, Forward, forward_in_source, forward_of, is_at
from ..modules.operated import plain_class
from ..spec.plan import Plan, Site
from .catalogue import Catalogue, Owner
from .runs import RunOnce
from .select import Choice, Key
from .ties import Ties

_PRODUCTS = ("linear", "conv1d", "attention", "other")
"""Kinds of module whose weights graphs may read as those of a linear operation."""


class _Ancestor(NamedTuple):
    """A module that contains the owner of a weight."""

    name: str
    """Dotted, in the model."""
    module: nn.Module
    path: AttributeChain
    """From the ancestor to the owner."""
    forward: Forward

    def reads(self, parameter: str) -> bool:
        """Whether its forward reads this parameter of the owner, or gives the owner to a child whose
        forward does."""
        path = (*self.path, parameter)
        if self.forward.reads(path):
            return True
        receivers = self._receivers(path)
        return any(their is not None and their.reads(rest) for their, rest in receivers)

    @property
    def is_unsure(self) -> bool:
        """Whether its forward, or a child's, gives the owner to code whose source is not known."""
        if self.forward.hands_out(self.path):
            return True
        receivers = self._receivers(self.path)
        return any(their is None or their.hands_out(rest) for their, rest in receivers)

    def _receivers(self, path: AttributeChain) -> Iterator[tuple[Forward | None, AttributeChain]]:
        """Children that its forward gives what is at `path`, or what contains it, as
        `self.decoder(x, self.emb)` gives `emb` to `decoder`.

        Returns:
            their forwards, None for one that cannot be looked into, and the chain by which what is at
            `path` is found there.
        """
        for callee, key, chain in self.forward.passed:
            if len(chain) > len(path) or not is_at(chain, path):
                continue
            rest = (*ARGUMENT, *path[len(chain) :])
            called = [(child, "forward") for child in _at(self.module, callee)]
            called = called or [(child, callee[-1]) for child in _at(self.module, callee[:-1])]
            methods = [(plain_class(child), name) for child, name in called]
            known = [
                (cls, name) for cls, name in methods if inspect.isfunction(getattr(cls, name, None))
            ]
            if not known:
                yield None, rest
            for cls, name in known:
                yield forward_in_source(cls, key, name), rest
        yield from self._methods(path)

    def _methods(self, path: AttributeChain) -> Iterator[tuple[Forward, AttributeChain]]:
        """Methods of children that its forward calls, as `self.emb.look_up(x)`, which may read what is
        at `path` inside of the child."""
        for *chain, name in self.forward.methods:
            if len(chain) <= len(path) and is_at(tuple(chain), path):
                for cls in map(plain_class, _at(self.module, tuple(chain))):
                    if inspect.isfunction(getattr(cls, name, None)):
                        yield forward_in_source(cls, None, name), path[len(chain) :]


def _at(module: nn.Module, chain: AttributeChain) -> list[nn.Module]:
    """The modules at a chain below one; several where an index is not known."""
    found = [module]
    for part in chain:
        children = [item for one in found for item in one._modules.items()]
        found = [
            child for name, child in children if child is not None and part in (name, ANY_ITEM)
        ]
    return found


class Known:
    """What is known of how a model uses its weights. `plan_dropconnect` and `apply_dropconnect` ask in
    the same way."""

    def __init__(
        self,
        catalogue: Catalogue,
        ties: Ties,
        plan: Plan | None,
        run: RunOnce,
        resized: bool = False,
    ) -> None:
        self._catalogue = catalogue
        self._ties = ties
        self._run = run
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
        self._lineages: dict[str, tuple[list[_Ancestor], list[_Ancestor]]] = {}

    def drawers(self, user: Choice) -> list[tuple[nn.Module, str]]:
        """The modules around the owner that draw the mask of a weight; none where the owner's own
        forward does.

        Returns:
            (module, dotted name of the owner inside it) pairs: modules whose forward reads the weight,
            and modules inside whose forward that of another one reads it which does not contain the
            owner.
        """
        around = self._above(user.owner)
        told = self._told(user, around)
        if told:
            around = self._above(user.owner, every=True)
        drawers: dict[tuple[int, str], tuple[nn.Module, str]] = {}
        for one in around:
            if one.name in told or one.reads(user.name):
                relative = ".".join(one.path)
                drawers[id(one.module), relative] = (one.module, relative)
        return list(drawers.values())

    def reads_itself(self, user: Choice) -> bool:
        """Whether the owner's own forward reads a parameter, as far as anything tells."""
        own = forward_of(user.owner.cls, user.module)
        if own.reads((user.name,)) or not own.complete:
            return True
        if user.full in self._used_by_owner:
            return True
        shown, mine = self._run(), set(user.owner.names)
        running = () if shown is None else shown.running.get(user.full, ())
        return any(mine.intersection(names) for names in running)

    def unlike(self, user: Choice, kind: str) -> str | None:
        """Why a plan was not made for this weight, and what to do; or None.

        Args:
            user: of the weight.
            kind: how the weight is read. In a graph the operation tells that: a product is one,
                whatever the module was that had the weight.
        """
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
        """Why a run of the model does not allow what is to be done to a weight, and what to do; or
        None. `product` is what its module or node computes, if that is a product."""
        config = user.config
        if product is None or not needs_product(config.sampling, config.inference):
            return None
        shown = self._run.given()
        if shown is None:
            return None
        by = user.owner.names
        if self._catalogue.graphs is not None and user.owner.in_graph:
            readers = (user.module, *self._catalogue.graphs.readers(user.module))
            by = [name for one in readers for name in self._catalogue.of(one).names]
        return shown.problem(user.full, config, product, by)

    def _above(self, owner: Owner, *, every: bool = False) -> list[_Ancestor]:
        """The ancestors of a module, under each name that it has; only those whose forward may concern
        its parameters, or every one. They are looked up once for all children of a module."""
        above: list[_Ancestor] = []
        for full in filter(None, owner.names):
            parent, _, last = full.rpartition(".")
            known = self._lineages.get(parent)
            if known is None:
                known = self._lineages[parent] = self._lineage(parent)
            for name, module, path, forward in known[not every]:
                above.append(_Ancestor(name, module, (*path, last), forward))
        return above

    def _lineage(self, full: str) -> tuple[list[_Ancestor], list[_Ancestor]]:
        """A module and its ancestors, and those of them that may concern a parameter of a child. The
        paths lead to the module."""
        every = [
            _Ancestor(name, owner.module, path, forward_of(owner.cls, owner.module))
            for name, owner, path in self._catalogue.lineage(full)
            if not owner.in_graph
        ]
        return every, [one for one in every if one.forward.concerns(len(one.path) + 2)]

    def _told(self, user: Choice, around: list[_Ancestor]) -> Set[str]:
        """Names of the modules that draw for a parameter, as a plan or a run says."""
        if self._drawn_by is not None:
            told: Set[str] = self._drawn_by.get(user.full, set())
            shown = self._run.given()
        else:
            told = set()
            is_unsure = any(one.is_unsure for one in around)
            shown = self._run() if is_unsure else self._run.given()
        if shown is None:
            return told
        drawers = (self._drawer(user, running) for running in shown.running.get(user.full, ()))
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
