"""HuggingFace PEFT: adapter files of an operated model are plain, and plain adapters load into it.

Loaded through the entry point `surgery.plugins` once `peft` models can exist.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft.peft_model import PeftModel
from peft.tuners.adalora import AdaLoraModel
from peft.utils import hotswap, save_and_load
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME

import surgery.adapters.conventions  # noqa: F401  it says what "all-linear" leaves out
from surgery.modules.keys import plain_state_dict
from surgery.verbs.savers import (
    Method,
    holds,
    resizes_plain,
    takes_raw,
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


def _loads_adapter(load: Method) -> Method:
    """For `set_peft_model_state_dict`, whose keys lack the name of the adapter."""
    return takes_raw(works_plain(load))


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
