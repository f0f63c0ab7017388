"""A model from a folder, as the command line takes it."""

from __future__ import annotations

from pathlib import Path

import transformers
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.utils import logging

_WEIGHTS = (".safetensors", ".bin", ".index.json")


def model_in(folder: Path) -> nn.Module:
    """The model that a folder holds, in `eval()`: of the class that its config names, with its weights
    if there are any. Nothing is downloaded, and no code in the folder runs.

    Raises:
        OSError, ValueError: transformers cannot load it.
    """
    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    names = getattr(config, "architectures", None) or [""]
    cls = getattr(transformers, names[0], AutoModel)
    if any(path.name.endswith(_WEIGHTS) for path in folder.iterdir()):
        model: nn.Module = cls.from_pretrained(folder, local_files_only=True, dtype="auto")
        return model
    model = cls.from_config(config) if cls is AutoModel else cls(config)
    return model.eval()
