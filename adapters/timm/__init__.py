"""timm: training checkpoints and hub files of an operated model are plain, and averages stay right.

Loaded through the entry point `surgery.plugins` once `timm` is imported. Its loaders end in
`model.load_state_dict`, which reads plain keys and raw ones; only what goes by the order of weights
(`remap=True`) has to see the plain model.
"""

from __future__ import annotations

import functools
from typing import Any

from timm.models import _helpers, _hub
from timm.utils import CheckpointSaver, ModelEma, ModelEmaV2, ModelEmaV3
from timm.utils import model as of_utils

from surgery.modules.keys import plain_state_dict
from surgery.modules.walk import unwrapped
from surgery.verbs.checkpoint import save_dropconnect
from surgery.verbs.savers import (
    Method,
    is_operated,
    pairs_tensors,
    teach,
    teach_function,
    works_plain,
    writes_plain,
)


def _plain(get: Method) -> Method:
    """For `get_state_dict(model, unwrap_fn)`; a `ModelEma` is no module, but has one."""

    @functools.wraps(get)
    def better(model: Any, unwrap_fn: Any = of_utils.unwrap_model) -> Any:
        state, inner = get(model, unwrap_fn), unwrap_fn(model)
        return plain_state_dict(inner, state) if is_operated(inner) else state

    return better


def _with_plan(save: Method, folder: str) -> Method:
    """For a method of `CheckpointSaver` that writes into its attribute `folder`: our files are there
    first. The weights come from `get_state_dict`, which is taught by itself."""

    @functools.wraps(save)
    def better(saver: Any, *args: Any, **kwargs: Any) -> Any:
        if is_operated(saver.model):
            save_dropconnect(unwrapped(saver.model), getattr(saver, folder) or ".")
        return save(saver, *args, **kwargs)

    return better


def _loads_by_order(load: Method) -> Method:
    """For `load_checkpoint`: only `remap=True` needs the plain model."""
    plain = works_plain(load)

    @functools.wraps(load)
    def better(*args: Any, **kwargs: Any) -> Any:
        return (plain if _remaps(*args, **kwargs) else load)(*args, **kwargs)

    return better


def _remaps(
    model: Any = None, checkpoint_path: Any = None, use_ema: Any = True, device: Any = None,
    strict: Any = True, remap: bool = False, *_: Any, **__: Any,
) -> bool:  # fmt: skip
    return remap


def _updates_by_name(update: Method) -> Method:
    """For `ModelEma.update(model)`, which looks up each name of the average in the model."""

    @functools.wraps(update)
    def better(average: Any, model: Any) -> Any:
        inner: Any = works_plain(
            lambda own: works_plain(lambda other: update(average, other))(model)
        )
        return inner(average.ema)

    return better


teach_function(of_utils.get_state_dict, _plain)
teach(CheckpointSaver, "save_checkpoint", functools.partial(_with_plan, folder="checkpoint_dir"))
teach(CheckpointSaver, "save_recovery", functools.partial(_with_plan, folder="recovery_dir"))
teach_function(_hub.save_for_hf, writes_plain)
teach_function(_helpers.load_checkpoint, _loads_by_order)
teach(ModelEma, "update", _updates_by_name)
for average in (ModelEmaV2, ModelEmaV3):
    for name in ("update", "set"):
        teach(average, name, pairs_tensors)
