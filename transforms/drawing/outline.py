"""What a tree and a picture show of a model: its parts, equal neighbours folded, and its sites."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import nn

from surgery import dropconnect_sites
from surgery.modules.node import DropConnectNode, Settle
from surgery.modules.operated import plain_class
from surgery.modules.places import plain_parameters
from surgery.spec.config import DropConnectConfig
from surgery.spec.plan import Plan, Site, join


@dataclass(frozen=True)
class Weight:
    """One parameter of a module."""

    name: str
    """Plain name inside its module."""
    shape: tuple[int, ...]
    site: Site | None = None
    """The site that drops it."""
    tied: str | None = None
    """Dotted name of the first parameter that is this same tensor and drops, or does not, as this one
    does. None if this one is the first."""

    @property
    def size(self) -> str:
        """`3072×768`."""
        return "×".join(map(str, self.shape)) or "scalar"

    @property
    def mark(self) -> str | None:
        """`p=0.3 unit=input`, `with wte.weight` if it is tied, or None if it is not dropped."""
        if self.site is None:
            return None
        return f"with {self.tied}" if self.tied else describe(self.site.config)

    @property
    def note(self) -> str:
        """`tied with wte.weight`, or empty if it is not or the mark says so."""
        return f"tied with {self.tied}" if self.tied and self.site is None else ""

    @property
    def signature(self) -> tuple[object, ...]:
        return (self.name, self.shape, self.site and self.site.config, self.tied is None)


@dataclass(frozen=True)
class Part:
    """A module, or a run of equal neighbours of which it is the first."""

    path: str
    """Dotted name."""
    label: str
    """Name to show below the part that contains it: `fc`, `layer.0`."""
    kind: str
    """Name of its plain class."""
    weights: tuple[Weight, ...]
    children: tuple[Part, ...]
    count: int = 1
    """Number of modules in the run."""
    signature: tuple[object, ...] = field(default=(), repr=False)
    """Equal for parts that look the same."""

    @property
    def title(self) -> str:
        """`layer.0–5`."""
        return self.label if self.count == 1 else f"{self.label}–{self.last}"

    @property
    def last(self) -> str:
        """Number of the last module in the run."""
        return self.paths()[-1].rpartition(".")[2]

    def paths(self) -> list[str]:
        """Dotted names of all modules in the run."""
        head, _, index = self.path.rpartition(".")
        if self.count == 1:
            return [self.path]
        return [join(head, str(int(index) + i)) for i in range(self.count)]

    def walk(self) -> Iterator[Part]:
        """This part and all below it."""
        yield self
        for child in self.children:
            yield from child.walk()

    def by_path(self) -> dict[str, Part]:
        """This part and all below it, by their dotted names."""
        return {part.path: part for part in self.walk()}

    def all_weights(self) -> tuple[Weight, ...]:
        """The weights of this part and of all below it, with names that are relative to this part."""
        below = (
            replace(weight, name=join(child.label, weight.name))
            for child in self.children
            for weight in child.all_weights()
        )
        return (*self.weights, *below)


def describe(config: DropConnectConfig) -> str:
    """p and the options that are not the default ones: `p=0.3 unit=input`."""
    options = [f"{name}={value}" for name, value in config.options().items()]
    return " ".join([f"p={config.p:g}", *options])


def outline(model: nn.Module, plan: Plan | None = None) -> Part:
    """The parts of a model; `plan` says what is dropped, by default what is in place."""
    plan = dropconnect_sites(model) if plan is None else plan
    sites = {name: site for site in plan for name in (site.name, *site.shared_with)}
    return _part(model, "", type(model).__name__, sites, {})


def _part(
    module: nn.Module,
    path: str,
    label: str,
    sites: dict[str, Site],
    seen: dict[tuple[int, bool], str],
) -> Part:
    weights = tuple(_weights(module, path, sites, seen))
    children: list[Part] = []
    for name, child in module.named_children():
        if not isinstance(child, (DropConnectNode, Settle)):
            children += _lift(_part(child, join(path, name), name, sites, seen), child)
    folded = _folded(children)
    kind = plain_class(module).__name__
    return Part(path, label, kind, weights, folded, signature=_signature(kind, weights, folded))


def _weights(
    module: nn.Module, path: str, sites: dict[str, Site], seen: dict[tuple[int, bool], str]
) -> Iterator[Weight]:
    for name, parameter in plain_parameters(module).items():
        if parameter is not None:
            full = join(path, name)
            site = sites.get(full)
            first = seen.setdefault((id(parameter), site is None), full)
            tied = None if first == full else first
            yield Weight(name, tuple(parameter.shape), site, tied)


def _lift(part: Part, module: nn.Module) -> list[Part]:
    """The entries of a list of layers stand where the list stands: `layer.0`."""
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)) or not part.children:
        return [part]
    return [replace(child, label=join(part.label, child.label)) for child in part.children]


def _folded(children: list[Part]) -> tuple[Part, ...]:
    """Neighbours that are numbered and equal are joined."""
    runs: list[Part] = []
    for child in children:
        if runs and _continues(runs[-1], child):
            runs[-1] = replace(runs[-1], count=runs[-1].count + child.count)
        else:
            runs.append(child)
    return tuple(runs)


def _continues(run: Part, child: Part) -> bool:
    head, _, index = run.label.rpartition(".")
    follows = index.isdecimal() and child.label == join(head, str(int(index) + run.count))
    return follows and run.signature == child.signature


def _signature(
    kind: str, weights: tuple[Weight, ...], children: tuple[Part, ...]
) -> tuple[object, ...]:
    below = tuple((child.label, child.count, child.signature) for child in children)
    return (kind, tuple(weight.signature for weight in weights), below)
