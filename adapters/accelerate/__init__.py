"""HuggingFace accelerate: `save_model` writes a plain checkpoint, and plain and raw ones load into any
model.

Loaded through the entry point `surgery.plugins` once `accelerate` is imported. `save_state` and
`load_state` carry the state of a run from one process to the next, so they keep the raw keys.
`load_checkpoint_and_dispatch` loads by `load_checkpoint_in_model`.
"""

import functools

from accelerate.accelerator import Accelerator  # `accelerate` itself does not have it yet
from accelerate.utils.fsdp_utils import save_fsdp_model
from accelerate.utils.modeling import load_checkpoint_in_model, load_state_dict

from surgery.verbs.raw_files import keeps_raw
from surgery.verbs.savers import (
    gives_keys_taken,
    reads_file,
    resumes,
    teach,
    teach_function,
    writes_plain,
)

teach(Accelerator, "save_model", functools.partial(writes_plain, model_at=1))
teach(Accelerator, "save_state", keeps_raw)
teach(Accelerator, "load_state", resumes)
teach_function(save_fsdp_model, keeps_raw)  # Trainer calls it by itself
teach_function(load_checkpoint_in_model, reads_file)
teach_function(load_state_dict, gives_keys_taken)  # it also reads for several devices by itself
