"""DropConnect for `transformers.Trainer`, as a callback."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

import surgery.adapters.transformers.trainer  # noqa: F401  it teaches Trainer to save plainly
from surgery.adapters.transformers.schedules import Schedule, make_schedule
from surgery.modules.keys import plain_state_dict
from surgery.modules.own_generator import as_generator, own_generators
from surgery.modules.places import states_in
from surgery.modules.state import change_p
from surgery.operating.surgeon import can_undo
from surgery.operating.suspend import suspended
from surgery.planning.in_place import unused_sites
from surgery.spec.config import DropConnectConfig
from surgery.spec.errors import SurgeryError
from surgery.spec.forms import file_name, read_json
from surgery.spec.plan import Plan, Site
from surgery.spec.saved import PLAN_FILE
from surgery.verbs.apply import (
    apply_dropconnect,
    dropconnect_sites,
    plan_dropconnect,
    strip_dropconnect,
)
from surgery.verbs.checkpoint import anchors, read_dropconnect, set_anchors
from surgery.verbs.generators import set_generators
from surgery.verbs.savers import holds


class DropConnectCallback(TrainerCallback):  # type: ignore[misc]
    """Puts DropConnect into the model that a Trainer trains, and moves p as training goes.

        Trainer(model, args, ..., callbacks=[DropConnectCallback("all-linear", p=0.1)])

    When training begins, DropConnect is applied. A model that has it already is extended by the sites
    it does not have; with the default targets it stays as it is. Every logged loss
    has `dropconnect_p` beside it in `trainer.state.log_history`. Checkpoints hold plain weights.
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
        self.generator = as_generator(generator)
        self.targets = targets
        self.exclude = exclude
        self.has_options = p is not None or config is not None or bool(options)
        base = config if config is not None else DropConnectConfig(p=0.1)
        self.config = base.replace(**options if p is None else {"p": p, **options})
        self.schedule = make_schedule(schedule, warmup)
        self.moves_p = schedule != "constant" or warmup > 0.0
        self.strip_at_end = strip_at_end
        self.anchors_from = anchors_from
        self._looked_for_unused = False
        self._done: weakref.ref[nn.Module] | None = None
        """The model that this callback has seen to: it may be trained again."""

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        """Apply, and after a resume take the anchors from the checkpoint."""
        had_it = bool(dropconnect_sites(model))
        found = None
        draws = self.generator is not None or bool(own_generators(model))
        if state.global_step > 0 and (draws or self._wants_anchors(model)):
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
        self._apply(model)
        if found is not None:
            saved = read_dropconnect(found, model)
            set_anchors(model, saved.anchors)
            set_generators(model, saved.generators)

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        """Move p: every site's own, by the same factor."""
        if not self.moves_p:
            return
        factor = self.schedule(state.global_step / max(state.max_steps - 1, 1))
        change_p(states_in(model), factor=factor)

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        """After the first step, warn of sites that never dropped anything."""
        if self._looked_for_unused:
            return
        if any(site.p > 0 for site in states_in(model)):
            self._looked_for_unused = True
            unused = unused_sites(model, compiled=bool(args.torch_compile))
            if unused:
                warnings.warn(
                    f"{len(unused)} DropConnect sites were not used by the first training step, the "
                    f"first of them {unused[0]!r}: exclude them, or check that the model calls them",
                    stacklevel=2,
                )

    def on_log(
        self, args: Any, state: Any, control: Any, *, model: Any, logs: Any, **_: Any
    ) -> None:
        """Put p beside the loss, for the callbacks that come after this one and for the history."""
        if "loss" not in logs:
            return
        p = max((site.p for site in states_in(model)), default=None)
        if p is not None:
            logs["dropconnect_p"] = state.log_history[-1]["dropconnect_p"] = p

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        """Give every site its full p again; strip, if asked to."""
        change_p(states_in(model))
        if self.strip_at_end and dropconnect_sites(model):
            strip_dropconnect(model)

    def _apply(self, model: nn.Module) -> None:
        """Put in place what is missing.

        Raises:
            SurgeryError: a site is in place with other options.
        """
        sites = dropconnect_sites(model)
        if not sites.sites:
            apply_dropconnect(
                model,
                self._targets,
                exclude=self.exclude,
                config=self.config,
                generator=self.generator,
            )
        elif self._done is None or self._done() is not model:
            have = {name: site for site in sites for name in (site.name, *site.shared_with)}
            wanted = self._wanted(model, sites)
            check = self.targets is not None or self.has_options
            wrong = [one for one in wanted if check and _differs(have.get(one.name), one)]
            if wrong:
                raise SurgeryError(
                    f"{wrong[0].name} has DropConnect already, with {have[wrong[0].name].config}, and "
                    f"this callback is for {wrong[0].config}; give both the same, or exclude it here, "
                    "or call strip_dropconnect first"
                )
            missing = Plan(tuple(one for one in wanted if one.name not in have))
            if missing.sites:
                apply_dropconnect(model, missing, generator=self.generator)
        self._done = weakref.ref(model)

    def _wanted(self, model: nn.Module, sites: Plan) -> Plan:
        """The sites that a model should have which has some."""
        if self.targets is None:
            return Plan(tuple(dataclasses.replace(one, config=self.config) for one in sites))
        if not can_undo(model):  # FSDP holds it: no site can be added
            return Plan()
        return suspended(
            model,
            lambda: plan_dropconnect(model, self.targets, exclude=self.exclude, config=self.config),
        )

    @property
    def _targets(self) -> Any:
        return "all-linear" if self.targets is None else self.targets

    def _wants_anchors(self, model: nn.Module) -> bool:
        if dropconnect_sites(model):
            return bool(anchors(model))
        plan = plan_dropconnect(model, self._targets, exclude=self.exclude, config=self.config)
        return any(site.config.toward == "pretrained" for site in plan)


def _differs(there: Site | None, wanted: Site) -> bool:
    """Whether a site is in place with other options; what `eval()` does may be changed at any time."""
    if there is None:
        return False
    same = wanted.config.replace(inference=there.config.inference, samples=there.config.samples)
    return same != there.config


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
    return {file_name(file, f"{index}: weight_map[{name!r}]") for name, file in map_.items()}


def _has_adapters(folder: Path, model: Any) -> bool:
    """Whether `folder` is what PEFT wrote of this model, with exactly these weights."""
    if not hasattr(model, "peft_config"):
        return False
    from surgery.adapters.peft import holds_adapters

    return holds_adapters(folder, model)
