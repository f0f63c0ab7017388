"""huggingface_hub: its mixin and `save_torch_model` write the plain model of one that is operated on,
and `load_torch_model` reads plain and raw keys into any model.

Loaded through the entry point `surgery.plugins` once one of them can have been used. The mixin reads
safetensors by their own `load_model`.
"""

from functools import partial

from huggingface_hub import ModelHubMixin, PyTorchModelHubMixin, serialization

import surgery.adapters.safetensors
import surgery.adapters.torch  # noqa: F401  these read its files
from surgery.verbs.savers import reads_file, teach, teach_function, writes_plain

teach(ModelHubMixin, "save_pretrained", writes_plain)
teach(PyTorchModelHubMixin, "_load_as_pickle", partial(reads_file, model_at=1))
teach_function(serialization.save_torch_model, writes_plain)
teach_function(serialization.load_torch_model, reads_file)
