"""safetensors: `save_model` writes plain names, `load_model` reads them into an operated model.

Loaded through the entry point `surgery.plugins`. Others save and load through these two:
`PyTorchModelHubMixin`, the modules of sentence-transformers.
"""

from safetensors.torch import load_model, save_model

from surgery.verbs.savers import reads_file, teach_function, works_plain

teach_function(save_model, works_plain)
teach_function(load_model, reads_file)
