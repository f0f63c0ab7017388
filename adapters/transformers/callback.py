"""DropConnect for `transformers.Trainer`, as a callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

import surgery.adapters.transformers.trainer  # noqa: F401  it teaches Trainer to save plainly
from surgery.modules.keys import plain_state_dict
from surgery.modules.own_generator import own_generators
from surgery.spec.config import DropConnectConfig
from surgery.spec.errors import SurgeryError
from surgery.spec.forms import file_name, read_json, shown
from surgery.spec.saved import PLAN_FILE
from surgery.verbs.apply import dropconnect_sites
from surgery.verbs.checkpoint import read_dropconnect, set_anchors
from surgery.verbs.generators import set_generators
from surgery.verbs.savers import holds
from surgery.verbs.schedules import Schedule
from surgery.verbs.training import Training


class DropConnectCallback(TrainerCallback):  # type: ignore[misc]
    """Puts DropConnect into the model that a Trainer trains, and moves p as training goes.

        Trainer(model, args, ..., callbacks=[DropConnectCallback("all-linear", p=0.1)])

    When training begins, DropConnect is applied. A model that has it already is extended by the sites
    it does not have; with the default targets it stays as it is. Every logged loss has
    `dropconnect_p` and `dropconnect_fraction` beside it, in `trainer.state.log_history` and wherever
    `report_to` reports (see `surgery.verbs.training.rates`). Checkpoints hold plain weights.
    A resumed run goes on exactly; with `toward="pretrained"` the anchors are those of the checkpoint.

    Args:
        targets, p, exclude, config, **options: as for `surgery.apply_dropconnect`; p is 0.1 unless
            given here or by `config`. None for targets means the sites that are in place, and
            `"all-linear"` if there are none.
        schedule: `"constant"`, `"linear"` or `"cosine"` (falling to 0 at the end of training), or a
            callable from progress in [0, 1] to a factor. It multiplies the p of every site.
        warmup: fraction of training, in [0, 1), over which p rises from 0.
        strip_at_end: take DropConnect out when training ends.
        anchors_from: where the checkpoint lies from which training resumes, if it is not in
            `args.output_dir`; needed only with `toward="pretrained"` or a generator.
        generator: as for `surgery.apply_dropconnect`. A run that resumes takes its state from the
            checkpoint.

    Raises:
        ValueError, TypeError: an option has a wrong value. What is wrong with `targets` shows when
            training begins, as a `surgery.SurgeryError`; so does a site that is in place with other
            options.
    """

    def __init__(
        self,
        targets: Any = None,
        p: float | None = None,
        *,
        exclude: Any = None,
        config: DropConnectConfig | None = None,
        schedule: str | Schedule = "constant",
        warmup: float = 0.0,
        strip_at_end: bool = False,
        anchors_from: str | Path | None = None,
        generator: torch.Generator | int | None = None,
        **options: Any,
    ) -> None:
        self.training = Training(
            targets, p, exclude, config, schedule, warmup, strip_at_end, generator, options
        )
        self.anchors_from = anchors_from

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        """Apply, and after a resume take the anchors from the checkpoint."""
        had_it = bool(dropconnect_sites(model))
        found = None
        draws = self.training.generator is not None or bool(own_generators(model))
        if state.global_step > 0 and (draws or self.training.wants_anchors(model)):
            found = _resumed_checkpoint(model, args, state, self.anchors_from)
            if found is None and (draws or not had_it):
                with_, unknown = (
                    ("masks from a generator", "its state is")
                    if draws
                    else ('toward="pretrained"', "the pretrained values are")
                )
                raise SurgeryError(
                    f"training resumes at step {state.global_step} with {with_}, but no checkpoint in "
                    f"{args.output_dir!r} has these weights, so {unknown} unknown; pass "
                    "DropConnectCallback(anchors_from=<the checkpoint>)"
                )
        self.training.apply(model)
        if found is not None:
            saved = read_dropconnect(found, model)
            set_anchors(model, saved.anchors)
            set_generators(model, saved.generators)

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        """Move p: every site's own, by the same factor."""
        self.training.move_p(model, state.global_step / max(state.max_steps - 1, 1))

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        """After the first step, warn of sites that never dropped anything."""
        self.training.look_for_unused(model, bool(args.torch_compile))

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        """Give every site its full p again; strip, if asked to."""
        self.training.end(model)


def _resumed_checkpoint(
    model: nn.Module, args: Any, state: Any, hint: str | Path | None
) -> Path | None:
    """The checkpoint that Trainer has just loaded. Trainer does not tell callbacks which one that is,
    so it is recognised by its weights, which are those of the model, bit for bit."""
    output = Path(str(args.output_dir))
    named = [hint, args.resume_from_checkpoint, output / f"checkpoint-{state.global_step}"]
    plain = plain_state_dict(model)
    for candidate in (*named, *sorted(output.glob("**/checkpoint-*"))):
        if isinstance(candidate, (str, Path)) and (Path(candidate) / PLAN_FILE).is_file():
            folder = Path(candidate)
            try:
                saved = read_dropconnect(folder, model)
                if (saved.anchors or saved.generators) and (
                    _has_weights(folder, plain) or _has_adapters(folder, model)
                ):
                    return folder
            except (SurgeryError, OSError):
                if candidate in named[:2]:  # the others are guesses
                    raise
    return None


def _has_weights(folder: Path, plain: dict[str, Any]) -> bool:
    """Whether the safetensors files in `folder` hold exactly these weights."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    files = _files_of(index) if index.is_file() else {SAFE_WEIGHTS_NAME}
    return all(holds(folder / file, plain) for file in sorted(files))


def _files_of(index: Path) -> set[str]:
    """The files that an index of shards names, which all lie beside it."""
    form = read_json(index)
    map_ = form.get("weight_map") if isinstance(form, dict) else None
    if not isinstance(map_, dict):
        raise SurgeryError(f"{index} holds no weight_map")
    return {file_name(file, f"{index}: weight_map[{shown(name)}]") for name, file in map_.items()}


def _has_adapters(folder: Path, model: Any) -> bool:
    """Whether `folder` is what PEFT wrote of this model, with exactly these weights."""
    if not hasattr(model, "peft_config"):
        return False
    from surgery.adapters.peft import holds_adapters

    return holds_adapters(folder, model)
