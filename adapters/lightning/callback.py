"""DropConnect for `lightning.pytorch.Trainer`, as a callback."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgery.adapters.lightning.packages import PACKAGES, imported_or_installed, part
from surgery.modules.own_generator import own_generators
from surgery.spec.config import DropConnectConfig
from surgery.spec.errors import SurgeryError
from surgery.verbs.apply import dropconnect_sites
from surgery.verbs.checkpoint import anchors, set_anchors
from surgery.verbs.schedules import Schedule
from surgery.verbs.training import Training, rates

KEY = "dropconnect"
"""Where a checkpoint of Lightning has what only a run needs that goes on."""


_CALLBACKS: tuple[Any, ...] = tuple(
    part(package, "callbacks").Callback for package in imported_or_installed()
)


class DropConnectCallback(*_CALLBACKS):  # type: ignore[misc]
    """Puts DropConnect into the module that a Lightning Trainer fits, and moves p as training goes.

        Trainer(callbacks=[DropConnectCallback("all-linear", p=0.1)]).fit(module, data)

    Of `lightning.pytorch` and `pytorch_lightning` it is for those that are imported when it is; where
    none is, for the first one that is installed.

    DropConnect is applied when `fit` sets up, before optimizers are made; with a module that makes its
    layers in `configure_model`, when `fit` starts. A module that has it already is extended by the
    sites it does not have; with the default targets it stays as it is. `dropconnect_p` and
    `dropconnect_fraction` are logged at every step (see `surgery.verbs.training.rates`).

    Checkpoints hold plain weights, which a module without DropConnect loads (`load_from_checkpoint`).
    Beside them, under "dropconnect", lie the anchors of `toward="pretrained"` and the states of the
    generators from which masks are drawn (torch's own too, which Lightning does not keep): a run that
    resumes goes on exactly, as far as its data does.

    Args:
        targets, p, exclude, config, **options: as for `surgery.apply_dropconnect`; p is 0.1 unless
            given here or by `config`. None for targets means the sites that are in place, and
            `"all-linear"` if there are none.
        schedule: `"constant"`, `"linear"` or `"cosine"` (falling to 0 at the end of training), or a
            callable from progress in [0, 1] to a factor. It multiplies the p of every site. Training
            without an end has progress 0.
        warmup: fraction of training, in [0, 1), over which p rises from 0.
        strip_at_end: take DropConnect out when training ends.
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
        generator: torch.Generator | int | None = None,
        **options: Any,
    ) -> None:
        self.training = Training(
            targets, p, exclude, config, schedule, warmup, strip_at_end, generator, options
        )
        self._resumed: dict[str, Any] | None = None
        """What the checkpoint has for a run that goes on; none once that has begun."""
        self._begun = False
        """Whether `fit` has: then the sites are in place."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Apply, before optimizers and wrappers are made."""
        if stage == "fit":
            self._resumed, self._begun = None, False
            self._had_it = bool(dropconnect_sites(pl_module))
            if not _makes_layers_later(pl_module):
                self.training.apply(pl_module)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep what is there for a run that goes on. The weights are plain, and load by themselves."""
        self._resumed = checkpoint.get(KEY, {})
        if self._begun:  # strategies that shard a module load when it is sharded
            self._go_on(trainer, pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Apply if that is not done yet; after a resume go on as the run did."""
        self.training.apply(pl_module)
        self._begun = True
        if self._resumed is not None:
            self._go_on(trainer, pl_module)

    def _go_on(self, trainer: Any, pl_module: Any) -> None:
        """Take the anchors of the checkpoint, and draw as the run did that wrote it."""
        assert self._resumed is not None
        if "anchors" in self._resumed:
            set_anchors(pl_module, self._resumed["anchors"])
        elif anchors(pl_module) and not self._had_it:
            raise SurgeryError(
                f'training resumes with toward="pretrained", but {trainer.ckpt_path} was written '
                "without DropConnect, so the pretrained values are unknown; load the pretrained "
                "weights and call apply_dropconnect on the module before fit"
            )
        self._draw_from_there(pl_module)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move p, and log it."""
        if self._resumed is not None:
            if batch_idx > 0:  # in the midst of an epoch; making the loader has drawn numbers since
                self._draw_from_there(pl_module)
            self._resumed = None
        steps = trainer.estimated_stepping_batches
        self.training.move_p(pl_module, min(trainer.global_step / max(steps - 1, 1), 1.0))
        if not trainer.barebones:
            pl_module.log_dict(rates(pl_module))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the first step, warn of sites that never dropped anything."""
        compiled = getattr(pl_module, "_compiler_ctx", None) is not None
        self.training.look_for_unused(pl_module, compiled)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add what a run needs that goes on."""
        if dropconnect_sites(pl_module):
            own = [generator.get_state() for generator in own_generators(pl_module)]
            checkpoint[KEY] = {"generators": _generators(), "own_generators": own}
            kept = anchors(pl_module)
            if kept:
                checkpoint[KEY]["anchors"] = kept

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Give every site its full p again; strip, if asked to."""
        self.training.end(pl_module)

    def _draw_from_there(self, pl_module: Any) -> None:
        """Put generators into the state of the checkpoint, if that has any."""
        if self._resumed:
            _set_generators(self._resumed["generators"])
            kept = self._resumed["own_generators"]
            for generator, state in zip(own_generators(pl_module), kept):
                generator.set_state(state.cpu())


def _makes_layers_later(module: Any) -> bool:
    """Whether its class, or one of the user's above it, has a `configure_model` of its own."""
    owner = next(cls for cls in type(module).__mro__ if "configure_model" in vars(cls))
    return not owner.__module__.startswith(PACKAGES)


def _generators() -> dict[str, Tensor]:
    """The states of torch's default generators, by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _set_generators(states: dict[str, Tensor]) -> None:
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state.cpu())
        elif int(device.rpartition(":")[2]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state.cpu(), device)
