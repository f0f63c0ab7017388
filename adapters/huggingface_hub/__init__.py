"""huggingface_hub: a `PyTorchModelHubMixin` that is operated on saves the plain model.

Loaded through the entry point `surgery.plugins` once the mixin can have been used.
"""

from huggingface_hub import ModelHubMixin

from surgery.verbs.savers import teach, writes_plain

teach(ModelHubMixin, "save_pretrained", writes_plain)
