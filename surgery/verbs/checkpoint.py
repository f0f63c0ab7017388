"""The small files of our own that lie beside a plain checkpoint.

`dropconnect.json` holds the plan, and the state of generators that sites have of their own.
`dropconnect_anchors-<digest>.safetensors` holds the pretrained weights that dropped weights go toward,
and is written only if there are any.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..base.files import sync_folder, whole_file
from ..base.plugins import load_plugins
from ..modules.keys import plain_keys
from ..modules.places import places
from ..modules.ranks import replica
from ..operating.surgeon import operate
from ..ops.part_mask import is_sharded, spread_as, whole
from ..planning.catalogue import Catalogue
from ..planning.in_place import current_plan
from ..planning.prepare import prepare
from ..planning.runs import RunOnce
from ..planning.select import select
from ..spec.config import DropConnectConfig
from ..spec.errors import NotOperatedError, SurgeryError
from ..spec.forms import FORMAT_VERSION, Reader, check_regular, each, read_json
from ..spec.plan import Plan, join
from ..spec.saved import ANCHORS_FILE, PLAN_FILE, are_anchors, read_saved
from ..stored.tensors import digest, type_of, write_tensors
from .generators import Kept, generators_form, give_generators, read_generator
from .raw_files import remember

_GENERATORS: dict[str, Reader[Any]] = {"generators": each(read_generator)}

Model = TypeVar("Model", bound=nn.Module)


def anchors(model: nn.Module) -> dict[str, Tensor]:
    """The anchors by the plain name of their weight; a tied one once."""
    sites = {site.name for site in current_plan(model)}
    by_name = {join(place.name, place.state.name): place.anchor for place in places(model)}
    return {name: one for name, one in by_name.items() if name in sites and one is not None}


def shares_anchors(model: nn.Module) -> bool:
    """Whether processes have parts of the anchors, so that all of them are needed to write these."""
    return any(map(is_sharded, anchors(model).values()))


def save_dropconnect(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the plan, and the anchors and the state of generators if there are any, into `directory`.

    Anchors that processes share (tensor parallelism) are gathered: all of these processes have to call
    this, and the first of them writes.

    Whenever this is cut off, the files are those of the last save or of this one: anchors lie under a
    name that says what they are, and the plan, which names them, is replaced in one step.

    Raises:
        NotOperatedError: no DropConnect is in place.
        SurgeryError: safetensors has no such dtype as an anchor.
        OSError: a file cannot be written; those of the last save are as they were.
    """
    plan = current_plan(model)
    if not plan.sites:
        raise NotOperatedError.none_in(model, " to save")
    shared = shares_anchors(model)
    kept = {name: whole(anchor).detach() for name, anchor in anchors(model).items()}
    types = {name: type_of(name, anchor) for name, anchor in kept.items()}
    if shared and torch.distributed.get_rank() != replica():
        return
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    form: dict[str, Any] = {"version": FORMAT_VERSION, "plan": plan.to_json(), "anchors": None}
    if kept:
        content = digest(kept)
        file = ANCHORS_FILE.replace(".", f"-{content[:16]}.")
        form["anchors"] = {"file": file, "sha256": content}
    generators = generators_form(model)
    if generators:
        form["generators"] = generators
    written = json.dumps(form, indent=1) + "\n"
    try:
        if kept:
            with whole_file(folder / file) as temporary:
                write_tensors(temporary, types, kept.__getitem__)
        with whole_file(folder / PLAN_FILE) as temporary:
            Path(temporary).write_text(written, encoding="utf-8")
    finally:
        _remove_unused_anchors(folder)


def _remove_unused_anchors(folder: Path) -> None:
    """Remove the anchors that the plan in `folder` does not name: of the save before, or of one that
    was cut off."""
    with contextlib.suppress(OSError, SurgeryError):  # a plan of nobody knows what: leave all
        form = read_json(folder / PLAN_FILE) if (folder / PLAN_FILE).exists() else {}
        record = form.get("anchors") if isinstance(form, dict) else None
        used = record.get("file") if isinstance(record, dict) else None
        for name in os.listdir(folder):
            if are_anchors(name) and name != used:
                (folder / name).unlink()
        sync_folder(folder)


def load_dropconnect(model: Model, directory: str | os.PathLike[str]) -> Model:
    """Put DropConnect in place as it was saved in `directory`, in place, anchors included. Sites that
    had a generator of their own get a new one in the state of then.

    The weights are not touched: load them as for the plain model.

    Raises:
        FileNotFoundError: the directory holds no `dropconnect.json`.
        SurgeryError: the model does not have the sites, the anchors do not fit, or the files are
            damaged or of a newer version.
        OSError: a file cannot be read.
    """
    plan, kept, generators = read_dropconnect(directory, model)
    load_plugins()
    prepared = prepare(model, plan, None, DropConnectConfig(), RunOnce(model, None))
    give_generators(prepared.states(), generators)
    operate(prepared, kept)
    remember(model)
    return model


def set_anchors(model: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Copy values into the anchors of `model`, by the plain name of their weight.

    Raises:
        SurgeryError: `kept` lacks one.
    """
    own = anchors(model)
    missing = sorted(set(own) - set(kept))
    if missing:
        raise SurgeryError(f"no anchor was saved for {missing[0]!r} ({len(missing)} in all)")
    for name, anchor in own.items():
        anchor.copy_(spread_as(anchor, kept[name]))


class Saved(NamedTuple):
    """What `save_dropconnect` wrote."""

    plan: Plan
    anchors: dict[str, Tensor]
    """By the plain name of their weight."""
    generators: tuple[Kept, ...]


def read_dropconnect(directory: str | os.PathLike[str], model: nn.Module) -> Saved:
    """What `save_dropconnect` wrote, whole and fit for `model`.

    Raises: as `load_dropconnect`.
    """
    path = Path(directory) / PLAN_FILE
    form = read_saved(path, _GENERATORS)
    while True:
        plan, record = form["plan"], form["anchors"]
        try:
            kept = _read_anchors(path, plan, record, model)
            return Saved(plan, kept, form.get("generators", ()))
        except FileNotFoundError as error:
            before, form = form, read_saved(path, _GENERATORS)
            if form == before:  # else it was saved again since we read the plan
                raise SurgeryError(
                    f"{path} refers to anchors in {record['file']}, which is missing"
                ) from error


def _read_anchors(
    path: Path, plan: Plan, record: Mapping[str, str] | None, model: nn.Module
) -> dict[str, Tensor]:
    wanted = {site.name for site in plan if site.config.toward == "pretrained"}
    if record is None:
        if wanted:
            raise SurgeryError(
                f"{path} wants anchors for {min(wanted)!r} and names no file of them"
            )
        return {}
    file = path.parent / record["file"]
    names = plain_keys(model)
    weights = {
        names.get(name, name): weight
        for name, weight in model.named_parameters(remove_duplicate=False)
    }
    with open_tensors(file) as stored:
        if set(stored.keys()) != wanted:
            raise SurgeryError(
                f"{file} is damaged: it does not hold exactly the anchors of {path.name}"
            )
        for name in wanted & set(weights):
            _check_fits(name, stored.get_slice(name), weights[name])
        # All are there? Then what is read now is no longer than the model.
        select(Catalogue(model), plan, None, DropConnectConfig())
        kept = {name: stored.get_tensor(name) for name in wanted}
    if digest(kept) != record["sha256"]:
        raise SurgeryError(f"{file} is damaged: its content does not match {path.name}")
    return {name: _as_weight(name, anchor, weights[name]) for name, anchor in kept.items()}


def _as_weight(name: str, anchor: Tensor, weight: Tensor) -> Tensor:
    """The anchor in the type of its weight."""
    if anchor.is_complex() == weight.is_complex() and _is_inexact(anchor):
        with contextlib.suppress(RuntimeError):  # types that torch knows by name only
            return anchor.to(weight.dtype)
    raise SurgeryError(f"the anchor of {name!r} is {anchor.dtype}, which no {weight.dtype} can be")


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _check_fits(name: str, anchor: Any, weight: Tensor) -> None:
    shape = tuple(anchor.get_shape())
    if shape != tuple(weight.shape):
        raise SurgeryError(
            f"the anchor of {name!r} has shape {shape}, the weight {tuple(weight.shape)}"
        )


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, opened to read.

    Raises:
        OSError: there is none, or it cannot be read.
        SurgeryError: it is damaged, or not a file.
    """
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as stored:
            yield stored
    except (OSError, SurgeryError):
        raise
    except Exception as error:  # whatever the library makes of such a file
        raise SurgeryError(f"{path} is damaged: {str(error)[:200]}") from error
