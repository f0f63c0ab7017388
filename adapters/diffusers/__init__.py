"""diffusers: models and LoRA adapters that are operated on save plain, and raw keys load.

Loaded through the entry point `surgery.plugins` once models of `diffusers` can exist. A pipeline saves
its models by their own `save_pretrained`.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.model_loading_utils import load_state_dict
from diffusers.models.modeling_utils import ModelMixin

from surgery.modules.keys import keys_made_plain
from surgery.verbs.savers import Method, takes_raw, teach, works_plain, writes_plain


def _reads_raw(load: Method) -> Method:
    """For `ModelMixin._load_pretrained_model`, which is given files and their keys. Files with raw keys
    are read here, and it is given what is in them."""
    signature, taking = inspect.signature(load), takes_raw(load, model_at=1)

    @functools.wraps(load)
    def better(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        given = call.arguments
        plain = keys_made_plain(given["loaded_keys"], given["model"].state_dict())
        if not plain:
            return load(*args, **kwargs)
        if given["state_dict"] is None:
            files = given["resolved_model_file"]
            read = [load_state_dict(file) for file in files]
            given["state_dict"] = {key: value for part in read for key, value in part.items()}
        names = (plain.get(key, key) for key in given["loaded_keys"])
        given["loaded_keys"] = [name for name in names if name is not None]
        return taking(*call.args, **call.kwargs)

    return better


teach(ModelMixin, "save_pretrained", writes_plain)
teach(ModelMixin, "_load_pretrained_model", _reads_raw)
teach(PeftAdapterMixin, "save_lora_adapter", writes_plain)
teach(PeftAdapterMixin, "load_lora_adapter", works_plain)
