"""The small files of our own that lie beside a plain checkpoint.

`dropconnect.json` holds the plan. `dropconnect_anchors.safetensors` holds the pretrained weights that
dropped weights go toward, and is written only if there are any.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .api import apply_dropconnect
from .config import FORMAT_VERSION
from .errors import NotOperatedError, SurgeryError
from .files import whole_file
from .keys import plain_state_dict
from .modules.places import places
from .plan import Plan, join
from .surgeon import current_plan

PLAN_FILE = "dropconnect.json"
ANCHORS_FILE = "dropconnect_anchors.safetensors"

Model = TypeVar("Model", bound=nn.Module)


def anchors(model: nn.Module) -> dict[str, Tensor]:
    """The anchors by the plain name of their weight; a tied one once."""
    sites = {site.name for site in current_plan(model)}
    found = {join(place.name, place.state.name): place.anchor for place in places(model)}
    return {name: anchor for name, anchor in found.items() if name in sites and anchor is not None}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes, dtypes and bytes: equal if and only if the tensors are."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        total.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def make_file_plain(model: nn.Module, path: Path) -> None:
    """Rename the raw keys of a safetensors file that someone wrote from `model.state_dict()`."""
    with safe_open(path, framework="pt") as stored:
        metadata = stored.metadata()
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    with whole_file(path) as temporary:
        save_file(plain_state_dict(model, tensors), temporary, metadata)


def save_dropconnect(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the plan, and the anchors if there are any, into `directory`.

    Each file appears whole or not at all.

    Raises:
        NotOperatedError: no DropConnect is in place.
    """
    plan = current_plan(model)
    if not plan.sites:
        raise NotOperatedError(f"{type(model).__name__} has no DropConnect in place to save")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    kept = anchors(model)
    form: dict[str, Any] = {"version": FORMAT_VERSION, "plan": plan.to_json(), "anchors": None}
    with contextlib.ExitStack() as files:  # both are written before either replaces an old one
        plan_path = files.enter_context(whole_file(folder / PLAN_FILE))
        if kept:
            form["anchors"] = {"file": ANCHORS_FILE, "sha256": digest(kept)}
            path = files.enter_context(whole_file(folder / ANCHORS_FILE))
            save_file({name: tensor.contiguous() for name, tensor in kept.items()}, path)
        Path(plan_path).write_text(json.dumps(form, indent=1) + "\n", encoding="utf-8")
    if not kept:
        (folder / ANCHORS_FILE).unlink(missing_ok=True)


def load_dropconnect(model: Model, directory: str | os.PathLike[str]) -> Model:
    """Put DropConnect in place as it was saved in `directory`, in place, anchors included.

    The weights are not touched: load them as for the plain model.

    Raises:
        FileNotFoundError: the directory holds no `dropconnect.json`.
        SurgeryError: the model does not have the sites, the anchors do not fit, or the files are
            damaged or of another version.
    """
    plan, kept = read_dropconnect(directory)
    wanted = {site.name: site for site in plan if site.config.toward == "pretrained"}
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in kept.items():
        shape = tuple(named[name].shape) if name in named else None
        if shape not in (None, tuple(tensor.shape)):
            raise SurgeryError(
                f"the anchor of {name!r} has shape {tuple(tensor.shape)}, the weight {shape}"
            )
    if set(kept) != set(wanted):
        raise SurgeryError(f"{ANCHORS_FILE} does not hold exactly the anchors of {PLAN_FILE}")
    apply_dropconnect(model, plan)
    set_anchors(model, kept)
    return model


def set_anchors(model: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Copy values into the anchors of `model`, by the plain name of their weight."""
    for name, anchor in anchors(model).items():
        anchor.copy_(kept[name])


def read_dropconnect(directory: str | os.PathLike[str]) -> tuple[Plan, dict[str, Tensor]]:
    """The plan and the anchors that `save_dropconnect` wrote; checks version and digest."""
    path = Path(directory) / PLAN_FILE
    try:
        form = json.loads(path.read_text(encoding="utf-8"))
        if form["version"] != FORMAT_VERSION:
            raise ValueError(
                f"it has format {form['version']!r}; this release reads {FORMAT_VERSION}"
            )
        plan, record = Plan.from_json(form["plan"]), form["anchors"]
        if record is None:
            return plan, {}
        file, expected = Path(directory) / record["file"], record["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise SurgeryError(f"cannot read {path}: {type(error).__name__}: {error}") from error
    if not file.is_file():
        raise SurgeryError(f"{path} refers to anchors in {file.name}, which is missing")
    try:
        kept = load_file(file)
    except SafetensorError as error:
        raise SurgeryError(f"{file} is damaged: {error}") from error
    if digest(kept) != expected:
        raise SurgeryError(f"{file} is damaged: its content does not match {PLAN_FILE}")
    return plan, kept
