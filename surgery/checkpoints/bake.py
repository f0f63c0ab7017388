"""One mask made permanent in a checkpoint: tensor by tensor, without a model."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..ops import Law, Layout, drop_weight
from ..planning.select import matcher
from ..spec.config import check_p
from ..spec.errors import NoMatchError, SurgeryError
from ..spec.forms import shown
from ..spec.names import anchor_name
from ..spec.saved import PLAN_FILE
from ..stored.blocks import write_all
from ..stored.header import Header
from ..stored.tensors import digest, read_tensor, write_tensor
from ..verbs.bake import baked_key, check_seed
from .copies import copies
from .copying import Progress, Range, copy, nobody
from .output import new_checkpoint
from .roles import Roles, missing_sites
from .strip import PlainFile, Total, change_index, plain_file
from .tensors import Stored, read_tensors, stored_tensors
from .weights import Weights, WrongUse, opened, read_weights

FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes of weights that can be dropped."""

Patterns = str | Iterable[str] | None


@dataclass(frozen=True)
class Baked:
    """What `bake_checkpoint` has done."""

    source: Path
    out: Path
    seed: int
    """With which it would do the same again."""
    baked: tuple[str, ...]
    """Keys of the weights that were masked."""
    unlike: tuple[str, ...]
    """Keys of weights that are as they were because `toward` does not have them."""
    tensors: int
    """How many were written."""

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        lists = {"baked": [*self.baked], "unlike": [*self.unlike]}
        return {**vars(self), "source": str(self.source), "out": str(self.out), **lists}


class Place(NamedTuple):
    """A weight to be masked."""

    site: str
    """What its mask is named after."""
    p: float
    anchor: Callable[[], Tensor] | None
    """Reads where its dropped entries go; None is zero."""


class Masks(NamedTuple):
    """What is masked, and how."""

    places: Mapping[str, Place]
    """By plain key."""
    seed: int
    progress: Progress


def bake_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    seed: int | None = None,
    *,
    toward: str | os.PathLike[str] | None = None,
    p: float | None = None,
    targets: Patterns = None,
    exclude: Patterns = None,
    progress: Total = lambda total: nobody,
) -> Baked:
    """Write a plain checkpoint whose weights have one mask made permanent: for a keep mask `m` and an
    anchor `A`, `A + m * (W - A) / (1 - p)`.

    Without `p`, the sites are those of the `dropconnect.json` beside the source, and the result is what
    `load_dropconnect` and `bake_dropconnect` would give, bit for bit. With `p` and `toward`, this is
    DARE (Yu et al. 2023, arXiv 2311.03099): of what fine-tuning changed a part is dropped, and the rest
    is rescaled.

    One tensor at a time is in memory, with its anchor and the result. Weights that are stored twice
    (the same dtype, shape and bytes, and not one number only), as tied ones can be, get one mask and
    stay equal.

    Args:
        source: a safetensors file, an index of several, or a folder with one checkpoint; raw or plain.
        out: a new file `*.safetensors` or folder, as the source is one.
        seed: of the masks; None draws one, which the result names.
        toward: the checkpoint that holds the anchors, in any of the forms of `convert_checkpoint`; None
            is zero, or what the plan says.
        p: probability of dropping, in [0, 1], of the weights that `targets` names.
        targets: globs, or `"re:..."`, over plain keys (`"*.mlp.*.weight"`). None is every weight of
            floating point that has two or more dimensions: as in `apply_dropconnect`, neither biases
            nor norms. With `toward`, None is all that both checkpoints have, also biases and norms, as
            DARE does it, but for the statistics of batch norms.
        exclude: the same, of weights that stay as they are; of a tied weight, all its names.
        progress: see `strip_checkpoint`.

    Raises:
        NoMatchError: a pattern matches no key.
        SurgeryError: there is no plan and no `p`; a site needs the model (units but `"element"`,
            Gaussian sampling); a weight does not fit its anchor; `exclude` names a weight that is
            stored twice, and one of its names only; a file is damaged.
        ValueError, TypeError: `p` is no probability.
        OSError: a file cannot be read or written.
    """
    path, target = Path(source), Path(out)
    seed = secrets.randbits(63) if seed is None else check_seed(seed)
    weights = read_weights(path)
    roles = Roles(weights.tensors(), weights.plan)
    roles.check()
    if p is None:
        _refuse_without_p(toward, targets, exclude)
        places, unlike = _of_plan(weights, roles), list[str]()
    else:
        anchors = None if toward is None else _plain_tensors(Path(toward))
        places, unlike = _of_targets(weights, roles, check_p(p), anchors, targets, exclude)
    files = {name: plain_file(header, roles) for name, header in weights.headers.items()}
    masks = Masks(places, seed, progress(sum(file.bytes for file in files.values())))
    with new_checkpoint(weights, target) as (folder, index):
        for name, file in files.items():
            if file.entries or weights.index is None:
                _write(weights.folder / name, weights.headers[name], folder / name, file, masks)
        change_index(index, roles, files)
    return Baked(
        source=path,
        out=target,
        seed=seed,
        baked=tuple(places),
        unlike=tuple(unlike),
        tensors=sum(len(file.entries) for file in files.values()),
    )


def _refuse_without_p(*given: Any) -> None:
    if any(one is not None for one in given):
        raise WrongUse("toward, targets and exclude need p; without it, the plan says all that")


def _of_plan(weights: Weights, roles: Roles) -> dict[str, Place]:
    """The sites of the plan beside a checkpoint, by plain key."""
    if weights.plan is None:
        raise WrongUse(
            f"there is no {PLAN_FILE} beside {weights.path}, which would say what to drop: give p"
        )
    keys = [key for _, key, _ in weights.entries()]
    missing = missing_sites(weights.plan, roles, keys)
    if missing:
        raise SurgeryError(
            f"the plan has {shown(missing[0])}, of which {weights.path} has no weight"
        )
    stored = stored_tensors(weights)
    saved = _saved_anchors(weights)
    places = {}
    for old, one in stored.items():
        key = roles.plain(old)
        site = None if key is None else roles.site(key)
        if key is None or site is None:
            continue
        config, anchor = site.config, None
        if config.unit != "element" or config.sampling == "gaussian":
            option = "unit" if config.unit != "element" else "sampling"
            raise SurgeryError(
                f"{shown(site.name)} has {option}={getattr(config, option)!r}, for which its module is "
                "needed: load the model, and call load_dropconnect and bake_dropconnect"
            )
        if config.toward == "pretrained":
            anchor = stored.get(anchor_name(key), saved.get(site.name))
            if anchor is None:
                raise SurgeryError(f"there is no anchor for {shown(site.name)}, as the plan wants")
        places[key] = _place(key, one, site.name, config.p, anchor)
    for names in _tied(weights, roles):  # in the model, a tied weight is baked under all its names
        known = next((places[name] for name in names if name in places), None)
        if known is not None:
            places |= {name: known for name in names if name not in places}
    return places


def _tied(weights: Weights, roles: Roles) -> list[list[str]]:
    """The plain keys of each weight that is stored more than once."""
    groups: dict[str, list[str]] = {}
    for key, first in copies(weights).items():
        groups.setdefault(first, [first]).append(key)
    plain = ([roles.plain(key) for key in group] for group in groups.values())
    return [[name for name in names if name is not None] for names in plain]


class _Read(Mapping[str, Tensor]):
    """Stored tensors, which are read one by one."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self._stored = stored

    def __getitem__(self, key: str) -> Tensor:
        return self._stored[key].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _saved_anchors(weights: Weights) -> dict[str, Stored]:
    """The anchors that belong to the plan, by the name of their site; their digest is checked."""
    if weights.anchors is None:
        return {}
    file = weights.folder / weights.anchors["file"]
    anchors = read_tensors(file)
    if digest(_Read(anchors)) != weights.anchors["sha256"]:
        raise SurgeryError(f"{file} is damaged: its content does not match {PLAN_FILE}")
    return anchors


def _place(key: str, one: Stored, site: str, p: float, anchor: Stored | None) -> Place:
    """A weight to be masked; raises `SurgeryError` if it cannot be."""
    if one.dtype not in FLOATS:
        raise SurgeryError(f"{shown(key)} is {one.dtype}; only {', '.join(FLOATS)} can be dropped")
    if anchor is None:
        return Place(site, p, None)
    if anchor.shape != one.shape or anchor.dtype not in FLOATS:
        raise SurgeryError(
            f"{shown(key)} is {one.dtype} of shape {one.shape}, and its anchor {anchor.dtype} of "
            f"{anchor.shape}; exclude it"
        )
    return Place(site, p, anchor.read)


def _of_targets(
    weights: Weights,
    roles: Roles,
    p: float,
    anchors: Mapping[str, Stored] | None,
    targets: Patterns,
    exclude: Patterns,
) -> tuple[dict[str, Place], list[str]]:
    """The weights that patterns name, by plain key; and keys of those that have no anchor."""
    stored = _by_plain_key(stored_tensors(weights), roles)
    left_out = _matching(stored, exclude, "exclude")
    named = _matching(stored, targets, "targets")
    if targets is None:
        named = {key for key in stored if _by_default(key, stored[key], anchors is not None)}
    first: dict[str, str] = {}
    for names in _tied(weights, roles):
        named |= _all_or_none(names, named, left_out)
        first |= dict.fromkeys(names, min(names, default=""))
    places, unlike = {}, []
    for key, one in stored.items():
        if key not in named or key in left_out:
            continue
        site = first.get(key, key)
        if anchors is None:
            places[key] = _place(key, one, site, p, None)
            continue
        ties = [key, *(other for other, its in first.items() if its == site)]
        anchor = next((anchors[name] for name in ties if name in anchors), None)
        if anchor is not None:
            places[key] = _place(key, one, site, p, anchor)
        elif targets is None:
            unlike.append(key)
        else:
            raise SurgeryError(f"toward has no {shown(key)}, which targets names; exclude it")
    if not places:
        why = ": toward has none of them" if unlike else "; name it in targets"
        raise NoMatchError(f"no weight is left to be masked{why}")
    return places, unlike


def _by_default(key: str, one: Stored, toward: bool) -> bool:
    """Whether a weight is masked that nobody named."""
    if one.dtype not in FLOATS:
        return False
    return not key.endswith(_STATISTICS) if toward else len(one.shape) > 1


_STATISTICS = ("running_mean", "running_var")
"""Of batch norms: what these have seen, and no parameters."""


def _all_or_none(names: list[str], named: set[str], left_out: set[str]) -> set[str]:
    """All names of a tied weight if one of them is named, or else none."""
    kept = [name for name in names if name in left_out]
    chosen = [name for name in names if name in named and name not in left_out]
    if kept and chosen:
        raise SurgeryError(
            f"{shown(kept[0])} is excluded, and {shown(chosen[0])}, which has the same values (a tied "
            "weight), is not: exclude both or none"
        )
    return set(names) if chosen else set()


def _matching(keys: Iterable[str], patterns: Patterns, where: str) -> set[str]:
    """The keys that some patterns match."""
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else (patterns or ()):
        matches = matcher(pattern, where)
        some = {key for key in keys if matches(key)}
        if not some:
            first = shown(next(iter(keys), ""))
            raise NoMatchError(f"{where}: {pattern!r} matches no key; the first key is {first}")
        found |= some
    return found


def _plain_tensors(path: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint by plain key."""
    stored = read_tensors(path)
    roles = Roles({key: (one.shape, one.dtype) for key, one in stored.items()})
    return _by_plain_key(stored, roles)


def _by_plain_key(stored: Mapping[str, Stored], roles: Roles) -> dict[str, Stored]:
    named = ((roles.plain(key), one) for key, one in stored.items())
    return {plain: one for plain, one in named if plain is not None}


def _write(source: Path, header: Header, target: Path, file: PlainFile, masks: Masks) -> None:
    """Write one plain file: what is masked from tensors, the rest from bytes."""
    with opened(source) as old, open(target, "wb+", buffering=0) as new:
        write_all(new, file.head)
        for key, plain in file.names.items():
            entry, start = header.entries[key], len(file.head) + file.entries[plain].start
            if plain in masks.places:
                new.seek(start)
                write_tensor(new, _masked(read_tensor(old, header, key), plain, masks))
                masks.progress(entry.bytes)
            else:
                moved = Range(header.data_at + entry.start, start, entry.bytes)
                copy(old, new, [moved], masks.progress)


def _masked(weight: Tensor, plain: str, masks: Masks) -> Tensor:
    """The weight with its mask made permanent."""
    place = masks.places[plain]
    anchor = None if place.anchor is None else place.anchor().to(weight.dtype)
    law = Law.of(place.p, weight.device, weight.dtype)
    key = baked_key(masks.seed, place.site)
    return drop_weight(weight, key, law, Layout.elements(weight.numel()), anchor)
