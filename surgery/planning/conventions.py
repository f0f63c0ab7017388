"""How other libraries name what they put into models, as plugins say it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

PartsOf = Callable[[nn.Module], Iterable[nn.Module]]


class Adapted(NamedTuple):
    """What a module that somebody adapted holds."""

    containers: Sequence[tuple[nn.Module, Sequence[nn.Module]]] = ()
    """Modules that are never called themselves, and what a target that names one of them means: the
    weights of these modules. A container that stands for itself means all its parameters."""
    replaced: Mapping[nn.Module, str] = {}
    """Modules in whose place trained copies run, each with its name here. A target means one of them,
    or what is inside of it, only if it spells that name."""


_left_out: list[PartsOf] = []
_adapted: list[Callable[[nn.Module], Adapted | None]] = []


def register_left_out(parts_of: PartsOf) -> None:
    """Called by plugins: `"all-linear"` leaves out the modules that `parts_of(model)` yields, each of
    them without what is inside of it."""
    _left_out.append(parts_of)


def register_adapted(adapted: Callable[[nn.Module], Adapted | None]) -> None:
    """Called by plugins: `adapted(module)` says what a module holds, or None of most."""
    _adapted.append(adapted)


def left_out(model: nn.Module) -> set[int]:
    """Ids of the modules that `"all-linear"` leaves out."""
    return {id(part) for parts_of in _left_out for part in parts_of(model)}


class Conventions:
    """What plugins say of the modules of one model."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.inside: dict[int, Sequence[nn.Module]] = {}
        """By the id of a container: what it stands for."""
        self.replaced: dict[int, str] = {}
        """By the id of a module, or of one inside of it, in whose place a copy runs: its name."""
        for module in modules:
            for ask in _adapted:
                found = ask(module)
                if found is None:
                    continue
                self.inside.update((id(one), parts) for one, parts in found.containers)
                for original, name in found.replaced.items():
                    self.replaced.update((id(part), name) for part in original.modules())
