"""The modules and parameters of a model, under all their names."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from ..modules.places import plain_parameters
from ..modules.walk import WRAPPERS, named_modules
from ..spec.plan import join
from .graphs import graph_surgeon


class Catalogue:
    """The modules of a model under all their names (a shared module has several)."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[int, nn.Module] = {}
        self.names: dict[int, list[str]] = {}
        self._named: dict[str, nn.Module] = {}
        self._lineages: dict[str, list[tuple[str, nn.Module, tuple[str, ...]]]] = {}
        self._own: dict[int, dict[str, Tensor | None]] = {}
        for name, module in named_modules(model, remove_duplicate=False):
            self.modules[id(module)] = module
            self.names.setdefault(id(module), []).append(name)
            self._named[name] = module
        surgeon = graph_surgeon(self.modules.values())
        self.graphs = None if surgeon is None else surgeon.survey(model)
        """What the graphs in the model read; None if it has none."""

    def __iter__(self) -> Iterator[tuple[list[str], nn.Module]]:
        for key, module in self.modules.items():
            yield self.names[key], module

    def name(self, module: nn.Module) -> str:
        """The first name of a module, as in `named_modules()`."""
        return self.names[id(module)][0]

    def in_order(self, names: Collection[str]) -> list[str]:
        """First names of modules, in model order."""
        if len(names) < 2:
            return list(names)
        return [name for name, *_ in self.names.values() if name in names]

    def full(self, module: nn.Module, parameter: str) -> str:
        """The first dotted name of a parameter of a module."""
        return join(self.name(module), parameter)

    def own(self, module: nn.Module) -> dict[str, Tensor | None]:
        """The module's own parameters under their plain names, in order; looked up once."""
        found = self._own.get(id(module))
        if found is None:
            found = self._own[id(module)] = plain_parameters(module)
        return found

    def all_names(self) -> list[str]:
        """Every module name and every parameter name."""
        modules = [name for names in self.names.values() for name in names if name]
        return modules + [name for names, _, _ in self.parameters() for name in names]

    def parameters(self) -> Iterator[tuple[list[str], nn.Module, str]]:
        """(dotted plain names, owner, plain name in the owner) of every parameter."""
        for names, module in self:
            for parameter, value in self.own(module).items():
                if value is not None:
                    yield [join(name, parameter) for name in names], module, parameter

    def parameter(self, full: str) -> tuple[nn.Module, str] | None:
        """Owner and plain name of the parameter with this dotted plain name, if there is one."""
        path, _, name = full.rpartition(".")
        module = self._named.get(path)
        if module is None or self.own(module).get(name) is None:
            return None
        return module, name

    def ancestors(self, module: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
        """Name and module of everything that contains a module, from the root, and the path from there
        to the module; under each name that it has."""
        for full in self.names[id(module)]:
            if full:
                parent, _, last = full.rpartition(".")
                for name, ancestor, path in self.lineage(parent):
                    yield name, ancestor, (*path, last)

    def lineage(self, full: str) -> list[tuple[str, nn.Module, tuple[str, ...]]]:
        """A module and its ancestors, as `ancestors` yields them; looked up once for all children."""
        found = self._lineages.get(full)
        if found is None:
            parts = full.split(".") if full else []
            names = [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
            found = self._lineages[full] = [
                (name, self._named[name], tuple(parts[depth:])) for depth, name in enumerate(names)
            ]
        return found

    def enclosing(self, module: nn.Module) -> Iterator[nn.Module]:
        """The modules that contain one, whose forward can be followed."""
        for _, parent, _ in self.ancestors(module):
            if isinstance(parent, torch.jit.ScriptModule) or self.is_in_graph(parent):
                continue
            if type(parent).__name__ not in WRAPPERS:
                yield parent

    def is_in_graph(self, module: nn.Module) -> bool:
        """Whether only nodes of a graph read the module's parameters."""
        return self.graphs is not None and self.graphs.owns(module)

    def is_read(self, module: nn.Module, name: str) -> bool:
        """Whether a node of a graph reads a parameter."""
        return self.graphs is not None and self.graphs.is_read(module, name)
