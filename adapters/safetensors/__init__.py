"""safetensors: `save_model` writes plain names, `load_model` reads plain and raw ones into any model.

Loaded through the entry point `surgery.plugins`. Others save and load through these two:
`PyTorchModelHubMixin`, the modules of sentence-transformers. `save_file` and `save` get a state dict
and no model: they warn of raw keys.
"""

from safetensors.torch import load_file, load_model, save, save_file, save_model

from surgery.verbs.raw_files import warns_of_raw
from surgery.verbs.savers import gives_keys_taken, reads_file, teach_function, works_plain

teach_function(save_model, works_plain)
teach_function(load_model, reads_file)
teach_function(load_file, gives_keys_taken)
teach_function(save_file, warns_of_raw)
teach_function(save, warns_of_raw)
