"""What Lightning writes of an operated module has plain keys, and its averages leave anchors alone.

The weights of a checkpoint come from the strategy, also where no callback is asked
(`save_weights_only=True`). What strategies that shard (FSDP, model parallel) write in parts is raw:
only the run itself reads that. What they write whole is plain.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial, wraps
from typing import Any

from torch import Tensor, nn

from surgery.adapters.lightning.packages import part
from surgery.modules.keys import plain_state_dict, raw_state_dict
from surgery.verbs.savers import Method, is_operated, teach, teach_function, without_anchors


def _plain(get: Method) -> Method:
    """For `Strategy.lightning_module_state_dict`."""

    @wraps(get)
    def better(strategy: Any) -> Any:
        state = get(strategy)
        if not all(map(_is_whole, state.values())):
            return state
        return plain_state_dict(strategy.lightning_module, state)

    return better


def _is_whole(value: Any) -> bool:
    """Whether it is no part of a tensor that processes share."""
    return type(value) in (Tensor, nn.Parameter) or not isinstance(value, Tensor)


def _reads_plain(load: Method) -> Method:
    """For `_load_raw_module_state(state_dict, module, ...)`, which looks for each weight of a sharded
    module by its name."""

    @wraps(load)
    def better(state_dict: Mapping[str, Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_operated(module):
            state_dict = raw_state_dict(module, state_dict)
        return load(state_dict, module, *args, **kwargs)

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


def teach_package(package: str) -> None:
    """Teach one of `packages.PACKAGES`."""
    for file, strategy in (
        ("strategy", "Strategy"),
        ("fsdp", "FSDPStrategy"),
        ("model_parallel", "ModelParallelStrategy"),
    ):
        owner = getattr(part(package, f"strategies.{file}"), strategy)
        teach(owner, "lightning_module_state_dict", _plain)
    teach_function(part(package, "strategies.fsdp")._load_raw_module_state, _reads_plain)
    averaging = part(package, "callbacks.weight_averaging").WeightAveraging
    teach(averaging, "on_save_checkpoint", _writes_plain)
    for hook in ("on_validation_epoch_start", "on_validation_epoch_end", "on_train_end"):
        teach(averaging, hook, _pairs)
