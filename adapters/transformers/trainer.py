"""Trainer writes a model that is no `PreTrainedModel` itself: the plain one, with our files before it.

Loaded through the entry point `surgery.plugins` once `Trainer` exists. A checkpoint counts as complete
for Trainer once it has the weights and, at the end, `trainer_state.json`; so nothing of it may have to
be put right afterwards.
"""

from __future__ import annotations

from functools import partial, wraps
from typing import Any

from transformers.trainer import Trainer

from surgery.modules.keys import plain_state_dict
from surgery.verbs.checkpoint import save_dropconnect
from surgery.verbs.savers import Method, is_operated, is_taught, teach, with_plain_names
from surgery.verbs.training import rates


def _saves_plain(save: Method) -> Method:
    """For `Trainer.save_model`, whatever `_save` a subclass has."""

    @wraps(save)
    def taught(trainer: Any, output_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        inner = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        if not is_operated(trainer.model) or is_taught(inner, "save_pretrained"):
            return save(trainer, output_dir, *args, **kwargs)
        if trainer.args.should_save:
            save_dropconnect(inner, output_dir or trainer.args.output_dir)
        return with_plain_names(trainer.model, partial(save, trainer, output_dir, *args, **kwargs))

    return taught


def _renames(save: Method) -> Method:
    """For `Trainer._save`, which may be given a state dict that was gathered."""

    @wraps(save)
    def taught(trainer: Any, output_dir: str | None = None, state_dict: Any = None) -> Any:
        if state_dict is not None and is_operated(trainer.model):
            state_dict = plain_state_dict(trainer.model, state_dict)
        return save(trainer, output_dir, state_dict)

    return taught


def _logs_rates(log: Method) -> Method:
    """For `Trainer.log`: p and what is dropped beside each loss, before anybody reports it. (Callbacks
    that report are called before those of users.)"""

    @wraps(log)
    def taught(trainer: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        if "loss" in logs:
            logs = {**logs, **rates(trainer.model)}
        return log(trainer, logs, *args, **kwargs)

    return taught


teach(Trainer, "log", _logs_rates)
teach(Trainer, "save_model", _saves_plain)
teach(Trainer, "_save", _renames)
