"""Site and Plan: what `apply_dropconnect` would do, as data that can be printed and counted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from .config import FORMAT_VERSION, DropConnectConfig


def join(module: str, name: str) -> str:
    """Dotted name of `name` inside `module`; the root module is the empty string."""
    return f"{module}.{name}" if module else name


@dataclass(frozen=True, kw_only=True)
class Site:
    """One weight on which DropConnect acts."""

    module: str
    """Dotted name of the module that owns the weight; `""` is the model itself."""

    parameter: str
    """Name of the parameter inside that module, as in the plain model."""

    kind: str
    """How the weight is read: `linear`, `conv`, `rnn`, ... or `other`."""

    shape: tuple[int, ...]
    """Shape of the parameter."""

    config: DropConnectConfig
    """What is done to it."""

    shared_with: tuple[str, ...] = ()
    """Dotted names of the other parameters that are this same (tied) tensor and drop with it."""

    drawn_by: tuple[str, ...] = ()
    """Dotted names of the parent modules that read the weight themselves, so that the mask is drawn
    when *their* forward is called. Empty for the usual case: the owner's own forward."""

    @property
    def name(self) -> str:
        """Dotted name of the parameter in the plain model."""
        return join(self.module, self.parameter)

    @property
    def p(self) -> float:
        """Probability of dropping."""
        return self.config.p

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    def to_json(self) -> dict[str, Any]:
        return {
            "module": self.module,
            "parameter": self.parameter,
            "kind": self.kind,
            "shape": list(self.shape),
            "config": self.config.to_json(),
            "shared_with": list(self.shared_with),
            "drawn_by": list(self.drawn_by),
        }

    @classmethod
    def from_json(cls, form: dict[str, Any]) -> Site:
        return cls(
            module=form["module"],
            parameter=form["parameter"],
            kind=form["kind"],
            shape=tuple(form["shape"]),
            config=DropConnectConfig.from_json(form["config"]),
            shared_with=tuple(form["shared_with"]),
            drawn_by=tuple(form["drawn_by"]),
        )


@dataclass(frozen=True)
class Plan:
    """The frozen list of sites, in model order. `print(plan)` shows a table.

    A plan is data: it holds no tensors and no modules, and can be given to `apply_dropconnect` as
    its `targets`, for the same model or for another one with the same names.
    """

    sites: tuple[Site, ...] = ()

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    @overload
    def __getitem__(self, index: int) -> Site: ...
    @overload
    def __getitem__(self, index: slice) -> Plan: ...
    def __getitem__(self, index: int | slice) -> Site | Plan:
        if isinstance(index, slice):
            return Plan(self.sites[index])
        return self.sites[index]

    @property
    def numel(self) -> int:
        """Number of weights over all sites; a tied weight counts once."""
        return sum(site.numel for site in self.sites)

    def __str__(self) -> str:
        rows: list[Sequence[str]] = [("site", "kind", "shape", "p", "options", "notes")]
        rows += [_row(site) for site in self.sites]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * w for w in widths).rstrip())
        lines.append(f"{len(self)} sites, {self.numel:,} weights")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict of all sites and the version of the form."""
        return {"version": FORMAT_VERSION, "sites": [site.to_json() for site in self.sites]}

    @classmethod
    def from_json(cls, form: dict[str, Any]) -> Plan:
        """The inverse of `to_json`. Raises `ValueError` for another version."""
        if form.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"plan was saved in format {form.get('version')!r}; "
                f"this release reads format {FORMAT_VERSION}"
            )
        return cls(tuple(Site.from_json(site) for site in form["sites"]))


def _row(site: Site) -> Sequence[str]:
    default = DropConnectConfig()
    options = [
        f"{field}={getattr(site.config, field)}"
        for field in ("unit", "toward", "inference", "ranks")
        if getattr(site.config, field) != getattr(default, field)
    ]
    notes = [f"tied with {name}" for name in site.shared_with]
    notes += [f"drawn by {name or '(root)'}" for name in site.drawn_by]
    shape = "x".join(str(size) for size in site.shape) or "scalar"
    return (site.name, site.kind, shape, f"{site.p:g}", ", ".join(options), ", ".join(notes))
