"""Site and Plan: what `apply_dropconnect` would do, as data that can be printed and counted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, overload

from .config import DropConnectConfig
from .errors import SurgeryError, printable
from .forms import FORMAT_VERSION, Reader, counted, each, fields, maybe, migrated, size, text


def join(module: str, name: str) -> str:
    """Dotted name of `name` inside `module`; the root module is the empty string."""
    return f"{module}.{name}" if module else name


def as_text(shape: tuple[int, ...]) -> str:
    """`8x3`, and `scalar` for none."""
    return "x".join(map(str, shape)) or "scalar"


@dataclass(frozen=True, kw_only=True)
class Use:
    """One way in which a model uses a parameter, found by `surgery.transforms.find`."""

    op: str
    """The operation: `linear`, `addmm`, `matmul`, `conv`, `lstm`, `embedding`, `grouped_mm`, ..."""

    by: str
    """Dotted name of the module whose own forward runs the operation; `""` is the model itself."""

    times: int = 1
    """How often, in one forward of the model."""

    activation: str | None = None
    """The activation that follows (`relu`, `gelu_new`, `silu`, ...), or None."""

    def __str__(self) -> str:
        return self.op if self.times == 1 else f"{self.times} {self.op}"


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
    """Dotted names of the other parameters that are this same (tied) tensor and drop with it, in model
    order: the site is named after the first. Users that do not drop are not listed."""

    drawn_by: tuple[str, ...] = ()
    """Dotted names of the parent modules that read the weight themselves, so that the mask is drawn
    when *their* forward is called: that of an `nn.TransformerEncoderLayer` only in `eval()`. Empty
    for the usual case: the owner's own forward."""

    uses: tuple[Use, ...] = ()
    """Which operations use the weight, and which activation follows, if the model was looked at while
    it ran (`example_inputs`, or a transformers model); else empty."""

    no_moments: str | None = field(default=None, compare=False)
    """Why `predict_moments` would refuse this site; None if mean and variance travel through what reads
    it. Not part of the JSON: it follows from the rest, in the model that the plan is made for."""

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

    def unlike(self, kind: str | None, shape: tuple[int, ...] | None) -> str | None:
        """Why a weight is not the one that the site was planned for, and what to do; or None.

        Args:
            kind, shape: of the weight; None does not count.
        """
        if kind in (None, self.kind) and shape in (None, self.shape):
            return None
        here = f"a weight of kind {kind or self.kind!r} and shape {as_text(shape or self.shape)}"
        return (
            f"the plan has a weight of kind {self.kind!r} and shape {as_text(self.shape)} here, and "
            f"this is {here}. Plan anew for this model; if the weight was resized (a vocabulary), "
            "apply the plan before, and resize then"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "module": self.module,
            "parameter": self.parameter,
            "kind": self.kind,
            "shape": list(self.shape),
            "config": self.config.to_json(),
            "shared_with": list(self.shared_with),
            "drawn_by": list(self.drawn_by),
            "uses": [asdict(use) for use in self.uses],
        }

    @classmethod
    def from_json(cls, form: Any, where: str = "site") -> Site:
        """The inverse of `to_json`; `where` is what errors call the form."""
        return cls(**fields(form, where, _SITE, {"uses": each(_use)}))


def _use(form: Any, where: str) -> Use:
    return Use(**fields(form, where, {"op": text, "by": text}, _USE))


_USE: dict[str, Reader[Any]] = {"times": size, "activation": maybe(text)}
_SITE: dict[str, Reader[Any]] = {
    "module": text,
    "parameter": text,
    "kind": text,
    "shape": each(size),
    "config": DropConnectConfig.from_json,
    "shared_with": each(text),
    "drawn_by": each(text),
}


@dataclass(frozen=True)
class Plan:
    """The frozen list of sites, in model order. `print(plan)` shows a table.

    A plan is data: it holds no tensors and no modules, and can be given to `apply_dropconnect` as
    its `targets`, for the same model or for another one with the same names. Of a tied weight, exactly
    the users that it lists drop.
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
        rows: list[Sequence[str]] = [_HEAD, *(tuple(map(printable, _row(site))) for site in self)]
        if not any(site.uses for site in self.sites):
            rows = [(*row[:3], *row[5:]) for row in rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * w for w in widths).rstrip())
        lines.append(f"{counted(len(self), 'site')}, {counted(self.numel, 'weight')}")
        if any(site.config.inference == "moments" for site in self.sites):
            lines += moments_known({one.name: one.no_moments for one in self if one.no_moments})
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict of all sites and the version of the form."""
        return {"version": FORMAT_VERSION, "sites": [site.to_json() for site in self.sites]}

    @classmethod
    def from_json(cls, form: Any, where: str = "plan") -> Plan:
        """The inverse of `to_json`.

        Args:
            form: of this version or an older one.
            where: what errors call it.

        Raises:
            SurgeryError: the form has a newer version, lacks a field, has one that is not known, or a
                wrong value, or names a weight twice.
        """
        read = fields(migrated(form, "plan", where), where, {"sites": each(Site.from_json)})
        names: set[str] = set()
        for site in read["sites"]:
            for name in (site.name, *site.shared_with):
                if name in names:
                    raise SurgeryError(f"{where} names {name!r} twice")
                names.add(name)
        return cls(read["sites"])


def moments_known(without: Mapping[str, str]) -> Iterator[str]:
    """Lines that say of which sites mean and variance are known.

    Args:
        without: by the names of those without, why.
    """
    yield from (printable(f"no moments: {name}: {why}") for name, why in without.items())
    if not without:
        yield "every site has moments"


_HEAD = ("site", "kind", "shape", "used by", "then", "p", "options", "notes")


def _row(site: Site) -> Sequence[str]:
    options = [f"{name}={value}" for name, value in site.config.options().items()]
    used_by = ", ".join(dict.fromkeys(map(str, site.uses)))
    then = ", ".join(dict.fromkeys(use.activation or "-" for use in site.uses))
    notes = [f"tied with {name}" for name in site.shared_with]
    notes += [f"drawn by {name or '(root)'}" for name in site.drawn_by]
    notes += ["no moments"] if site.no_moments else []
    return (
        *(site.name, site.kind, as_text(site.shape), used_by, then, f"{site.p:g}"),
        *(", ".join(options), ", ".join(notes)),
    )
