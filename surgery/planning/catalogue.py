"""The modules and parameters of a model, under all their names."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator

import torch
from torch import nn

from ..kinds.kind import kind_of
from ..modules.operated import plain_class
from ..modules.places import plain_parameters, states_of
from ..modules.walk import WRAPPERS, named_modules
from ..spec.plan import join
from .conventions import Conventions
from .graphs import Survey, graph_surgeon


class Owner:
    """A module of a model, as the owner of its parameters. What is asked of it is found out once."""

    def __init__(self, module: nn.Module, name: str, graphs: Survey | None) -> None:
        self.module = module
        self.names = [name]
        """Its dotted names, in model order: a shared module has several."""
        self.in_graph = graphs is not None and graphs.owns(module)
        """Whether only nodes of a graph read the parameters: its forward never runs."""
        self.cls = plain_class(module)
        """The class without DropConnect."""
        self.kind = graphs.kind_of(module) if graphs and self.in_graph else kind_of(module)
        """Which weights it drops, and what their dimensions mean."""
        self.states = states = states_of(module)
        """What is known of parameters that are operated already, by plain name."""
        self.parameters = plain_parameters(module, states)
        """Its own parameters under their plain names, in order."""

    @property
    def name(self) -> str:
        """The first name, as in `named_modules()`."""
        return self.names[0]


Around = tuple[str, Owner, tuple[str, ...]]
"""A module that contains another: its name, itself, the path from there to the other."""


class Catalogue:
    """The modules of a model, each once, in model order. Changes nothing."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        named = named_modules(model, remove_duplicate=False)
        surgeon = graph_surgeon(module for _, module in named)
        self.graphs = graphs = None if surgeon is None else surgeon.survey(model)
        """What the graphs in the model read; None if it has none."""
        self._owners: dict[int, Owner] = {}
        self._named: dict[str, Owner] = {}
        self._lineages: dict[str, list[Around]] = {}
        for name, module in named:
            owner = self._owners.get(id(module))
            if owner is None:
                owner = self._owners[id(module)] = Owner(module, name, graphs)
            else:
                owner.names.append(name)
            self._named[name] = owner

    def __iter__(self) -> Iterator[Owner]:
        return iter(self._owners.values())

    @functools.cached_property
    def conventions(self) -> Conventions:
        """What other libraries have put into the model."""
        return Conventions(owner.module for owner in self)

    def of(self, module: nn.Module) -> Owner:
        """A module of the model, as the owner of its parameters."""
        return self._owners[id(module)]

    def in_order(self, names: Collection[str]) -> list[str]:
        """First names of modules, in model order."""
        if len(names) < 2:
            return list(names)
        return [owner.name for owner in self if owner.name in names]

    def all_names(self) -> list[str]:
        """Every module name and every parameter name, in all spellings."""
        modules = [name for owner in self for name in owner.names if name]
        return modules + [name for names, _, _ in self.spelled() for name in names]

    def spelled(self) -> Iterator[tuple[list[str], Owner, str]]:
        """As `parameters`; those that a container stands for have also the names in which it is named
        instead of them (`lora_A.weight`), as in the files of an adapter."""
        short: dict[int, list[str]] = {}
        for ident, parts in self.conventions.inside.items():
            for part in parts:
                for path, inner in named_modules(part) if id(part) != ident else ():
                    names = short.setdefault(id(inner), [])
                    outer = self._owners[ident].names
                    names += [join(name, path) if path else name for name in outer]
        for names, owner, parameter in self.parameters():
            also = [join(name, parameter) for name in short.get(id(owner.module), ())]
            yield [*names, *also], owner, parameter

    def parameters(self) -> Iterator[tuple[list[str], Owner, str]]:
        """(dotted plain names, owner, plain name in the owner) of every parameter."""
        for owner in self:
            for parameter, value in owner.parameters.items():
                if value is not None:
                    yield [join(name, parameter) for name in owner.names], owner, parameter

    def parameter(self, full: str) -> tuple[Owner, str] | None:
        """Owner and plain name of the parameter with this dotted plain name, if there is one."""
        path, _, name = full.rpartition(".")
        owner = self._named.get(path)
        if owner is None or owner.parameters.get(name) is None:
            return None
        return owner, name

    def ancestors(self, owner: Owner) -> Iterator[Around]:
        """Everything that contains a module, from the root; under each name that the module has."""
        for full in filter(None, owner.names):
            parent, _, last = full.rpartition(".")
            for name, ancestor, path in self.lineage(parent):
                yield name, ancestor, (*path, last)

    def lineage(self, full: str) -> list[Around]:
        """A module and its ancestors, as `ancestors` yields them; looked up once for all children."""
        known = self._lineages.get(full)
        if known is None:
            parts = full.split(".") if full else []
            names = [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
            known = self._lineages[full] = [
                (name, self._named[name], tuple(parts[depth:])) for depth, name in enumerate(names)
            ]
        return known

    def enclosing(self, owner: Owner) -> Iterator[nn.Module]:
        """The modules that contain one, whose forward can be followed."""
        for _, around, _ in self.ancestors(owner):
            if isinstance(around.module, torch.jit.ScriptModule) or around.in_graph:
                continue
            if type(around.module).__name__ not in WRAPPERS:
                yield around.module

    def is_read(self, owner: Owner, name: str) -> bool:
        """Whether a node of a graph reads a parameter."""
        return self.graphs is not None and self.graphs.is_read(owner.module, name)
