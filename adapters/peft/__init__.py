"""HuggingFace PEFT: adapter files of an operated model are plain, and plain adapters load into it.

Loaded through the entry point `surgery.plugins` once `peft` models can exist.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft.peft_model import PeftModel
from peft.tuners.adalora import AdaLoraModel
from peft.utils import hotswap, save_and_load
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from torch import nn

import surgery.adapters.conventions  # noqa: F401  it says what "all-linear" leaves out
from surgery.modules.keys import plain_state_dict
from surgery.modules.places import places
from surgery.verbs.savers import (
    holds,
    resizes_plain,
    teach,
    teach_function,
    works_plain,
    writes_plain,
)


def holds_adapters(folder: Path, model: Any) -> bool:
    """Whether the adapter files in `folder` hold exactly the weights of every adapter of `model`."""
    whole = plain_state_dict(model)  # embeddings and biases are under their own names in the file
    for name in model.peft_config:
        own = save_and_load.get_peft_model_state_dict(
            model, adapter_name=name, save_embedding_layers=False
        )
        file = (folder if name == "default" else folder / name) / SAFETENSORS_WEIGHTS_NAME
        if not holds(file, {**whole, **own}):
            return False
    return True


def _loads_adapter(load: Callable[..., Any]) -> Callable[..., Any]:
    """For `set_peft_model_state_dict`, whose keys lack the name of the adapter: a raw key is known by
    its last part."""
    taught = works_plain(load)

    def with_plain_keys(model: Any, peft_model_state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(model, nn.Module):
            peft_model_state_dict = _plain_adapter(model, peft_model_state_dict)
        return taught(model, peft_model_state_dict, *args, **kwargs)

    return with_plain_keys


def _plain_adapter(model: nn.Module, adapter: Mapping[str, Any]) -> Mapping[str, Any]:
    leaves: dict[str, str | None] = {}
    for place in places(model):
        leaves[place.state.raw] = place.state.name
        if place.state.anchor is not None:
            leaves[place.state.anchor] = None
    if not leaves:
        return adapter
    plain = {}
    for key, value in adapter.items():
        module, dot, leaf = key.rpartition(".")
        name = leaves.get(leaf, leaf)
        if name is not None:
            plain[f"{module}{dot}{name}"] = value
    return plain


teach(PeftModel, "save_pretrained", writes_plain)
teach_function(save_and_load.get_peft_model_state_dict, works_plain)
teach_function(save_and_load.set_peft_model_state_dict, _loads_adapter)
for name in ("get_base_model_state_dict", "set_base_model_state_dict"):
    if hasattr(save_and_load, name):  # older versions of PEFT lack them
        teach_function(getattr(save_and_load, name), works_plain)
teach_function(hotswap.hotswap_adapter, works_plain)
teach_function(hotswap.hotswap_adapter_from_state_dict, works_plain)
teach(AdaLoraModel, "update_and_allocate", works_plain)  # it pairs matrices by their names
teach_function(hotswap.prepare_model_for_compiled_hotswap, resizes_plain)
