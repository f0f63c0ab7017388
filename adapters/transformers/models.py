"""What transformers models need: a kind for Conv1D, and to be plain while they are saved or resized
or read an adapter."""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

from transformers.core_model_loading import WeightRenaming, convert_and_load_state_dict_in_model
from transformers.integrations.accelerate import accelerate_disk_offload
from transformers.integrations.deepspeed import _load_state_dict_into_zero3_model
from transformers.integrations.peft import PeftAdapterMixin
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import load_sharded_checkpoint

import surgery.adapters.conventions  # it says what "all-linear" leaves out
import surgery.adapters.safetensors
import surgery.adapters.torch  # noqa: F401  these read its files
from surgery.kinds.kind import reads_of, register_kind
from surgery.kinds.product import COLUMN_PRODUCT, product_of
from surgery.kinds.torch_kinds import LINEAR, columns
from surgery.modules.keys import keys_made_plain
from surgery.verbs.savers import (
    Method,
    is_operated,
    reads_file,
    resizes_plain,
    stored_keys,
    takes_raw,
    teach,
    teach_function,
    works_plain,
    writes_plain,
)


def _finds_raw(offload: Method) -> Method:
    """For `accelerate_disk_offload`, which notes where in the files the weights are that stay on disk:
    those with raw keys are found by their plain names."""
    signature = inspect.signature(offload)

    @functools.wraps(offload)
    def better(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        given = call.arguments
        keys = [key for file in given["checkpoint_files"] or () for key in stored_keys(file)]
        names = keys_made_plain(keys, given["model"].state_dict())
        renamed = [
            WeightRenaming(f"^{re.escape(key)}$", plain)
            for key, plain in names.items()
            if plain is not None
        ]
        given["weight_mapping"] = [*renamed, *(given.get("weight_mapping") or ())]
        return offload(*call.args, **call.kwargs)

    return better


def _reads_parts(load: Method) -> Method:
    """For `load_sharded_checkpoint(model, folder, ...)`, which reports by the keys of an index what it
    has not loaded: without what a plain model has taken from raw keys."""
    signature, reading = inspect.signature(load), reads_file(load)

    @functools.wraps(load)
    def better(*args: Any, **kwargs: Any) -> Any:
        result = reading(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        if is_operated(given["model"]):
            return result
        own, unexpected = given["model"].state_dict(), result.unexpected_keys
        names = keys_made_plain({*own.keys() - result.missing_keys, *unexpected}, own)
        taken = set(names.values())
        return result._replace(
            missing_keys=[key for key in result.missing_keys if key not in taken],
            unexpected_keys=[key for key in unexpected if key not in names],
        )

    return better


teach(PreTrainedModel, "save_pretrained", writes_plain)
teach(PreTrainedModel, "resize_token_embeddings", resizes_plain)
teach(PeftAdapterMixin, "load_adapter", works_plain)
teach_function(load_sharded_checkpoint, _reads_parts)
# In `from_pretrained`:
teach_function(convert_and_load_state_dict_in_model, takes_raw)
teach_function(_load_state_dict_into_zero3_model, takes_raw)
teach_function(accelerate_disk_offload, _finds_raw)
product = product_of(Conv1D, product=COLUMN_PRODUCT)
reads = reads_of(Conv1D, names=("weight", "bias"))
conv1d = {"classes": (Conv1D,), "axes": columns, "product": product, "reads": reads}
register_kind(LINEAR.but(name="conv1d", **conv1d))
