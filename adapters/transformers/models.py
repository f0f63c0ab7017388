"""What transformers models need: a kind for Conv1D, and to be plain while they are saved or resized
or read an adapter."""

from __future__ import annotations

from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.integrations.peft import PeftAdapterMixin
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import load_sharded_checkpoint

import surgery.adapters.conventions  # noqa: F401  it says what "all-linear" leaves out
from surgery.kinds.kind import reads_of, register_kind
from surgery.kinds.product import COLUMN_PRODUCT, product_of
from surgery.kinds.torch_kinds import LINEAR, columns
from surgery.verbs.savers import (
    reads_file,
    resizes_plain,
    takes_raw,
    teach,
    teach_function,
    works_plain,
    writes_plain,
)

teach(PreTrainedModel, "save_pretrained", writes_plain)
teach(PreTrainedModel, "resize_token_embeddings", resizes_plain)
teach(PeftAdapterMixin, "load_adapter", works_plain)
teach_function(load_sharded_checkpoint, reads_file)
teach_function(convert_and_load_state_dict_in_model, takes_raw)  # in `from_pretrained`
product = product_of(Conv1D, product=COLUMN_PRODUCT)
reads = reads_of(Conv1D, names=("weight", "bias"))
conv1d = {"classes": (Conv1D,), "axes": columns, "product": product, "reads": reads}
register_kind(LINEAR.but(name="conv1d", **conv1d))
