"""What Lightning writes of an operated module has plain keys, and its averages leave anchors alone.

The weights of a checkpoint come from the strategy, also where no callback is asked
(`save_weights_only=True`). Strategies that shard (FSDP, model parallel) have a way of their own and
keep raw keys.
"""

from __future__ import annotations

from functools import partial, wraps
from typing import Any

from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import Strategy
from torch import nn

from surgery.modules.keys import plain_state_dict
from surgery.verbs.savers import Method, teach, without_anchors


def _plain(get: Method) -> Method:
    """For `Strategy.lightning_module_state_dict`."""

    @wraps(get)
    def better(strategy: Any) -> Any:
        return plain_state_dict(strategy.lightning_module, get(strategy))

    return better


def _average(callback: Any) -> list[nn.Module]:
    """The module that averages, as a copy of the one that is trained; none before `fit`."""
    model = callback._average_model
    return [] if model is None else [model.module]


def _writes_plain(save: Method) -> Method:
    """For `WeightAveraging.on_save_checkpoint`, which puts the average in the place of the weights."""

    @wraps(save)
    def better(callback: Any, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> Any:
        result = save(callback, trainer, pl_module, checkpoint)
        for model in _average(callback):
            checkpoint["state_dict"] = plain_state_dict(model, checkpoint["state_dict"])
        return result

    return better


def _pairs(change: Method) -> Method:
    """For a hook of `WeightAveraging` that copies between the average and the model, by order."""

    @wraps(change)
    def better(callback: Any, trainer: Any, pl_module: Any) -> Any:
        both = [pl_module, *_average(callback)]
        return without_anchors(both, partial(change, callback, trainer, pl_module))

    return better


teach(Strategy, "lightning_module_state_dict", _plain)
teach(WeightAveraging, "on_save_checkpoint", _writes_plain)
for hook in ("on_validation_epoch_start", "on_validation_epoch_end", "on_train_end"):
    teach(WeightAveraging, hook, _pairs)
