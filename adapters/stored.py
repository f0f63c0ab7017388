"""Whether a file holds the weights that a model has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from surgery.verbs.checkpoint import open_tensors


def holds(file: Path, tensors: Mapping[str, Any]) -> bool:
    """Whether a safetensors file is there and all that it holds is among `tensors`, bit for bit."""
    if not file.is_file():
        return False
    with open_tensors(file) as stored:
        return all(
            name in tensors and _is_equal(stored, name, tensors[name])
            for name in stored.keys()  # noqa: SIM118
        )


def _is_equal(stored: Any, name: str, tensor: Any) -> bool:
    if stored.get_slice(name).get_shape() != list(tensor.shape):
        return False
    return torch.equal(stored.get_tensor(name), tensor.cpu())
