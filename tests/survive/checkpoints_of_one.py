"""A checkpoint that one process writes, for processes that share the model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_saver import save

from surgery import apply_dropconnect, plain_state_dict, save_dropconnect
from surgery.adapters.distributed import get_plain_state_dict

from ..zoo.integers import net, step

TARGETS = ["words", "up", "down", "head"]


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    """An operated model after a step, as each process of the job trains it."""
    model = apply_dropconnect(net(), TARGETS, p=0.5, toward="pretrained", ranks="same")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    step(model)
    optimizer.step()
    return model, optimizer


def write(folder: Path) -> None:
    """What `trained` gives, in `folder`."""
    model, optimizer = trained()
    of_model, of_optimizer = get_plain_state_dict(model, optimizer)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that it is alone
        save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder, no_dist=True)
    save_dropconnect(model, folder)


def content(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, anchors and momenta, by plain names."""
    parameters: Any = plain_state_dict(model, dict(model.named_parameters()))
    momenta = {
        f"momentum.{name}": optimizer.state[one]["momentum_buffer"]
        for name, one in parameters.items()
    }
    return {**plain_state_dict(model), **dict(model.named_buffers()), **momenta}
