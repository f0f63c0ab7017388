"""The lists of weights that an `nn.RNNBase` keeps, and where cuDNN wants the weights.

Such a module hands a list of its weights to its kernel. torch makes the list when a parameter is set or
moved, and looks at weak references to the parameters to know whether it is still right. Without these
names RNNs could not be operated on at all.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

FLAT_WEIGHTS = "_flat_weights"
"""The attribute that the forward reads: the list of weights."""

KEEPERS = ("_update_flat_weights", "flatten_parameters")
"""Methods that look whether the weights are others now, or move them into one piece of memory."""


names_of: Callable[[Any], list[str]] = attrgetter("_flat_weights_names")
"""The names of the weights of an RNN, in the order of the list."""


def flat_lists(weights: list[Tensor | None]) -> dict[str, Any]:
    """The attributes that torch makes of the weights."""
    refs = [None if weight is None else weakref.ref(weight) for weight in weights]
    return {FLAT_WEIGHTS: weights, "_flat_weight_refs": refs}


def put_where_cudnn_wants(
    weights: list[Tensor], each: int, mode: str, input_size: int, *sizes: Any
) -> bool:
    """Move the weights of an RNN into one piece of memory, as `flatten_parameters` does, which does not
    do it for bfloat16. Without it, torch copies such weights at every call.

    Args:
        weights: on a GPU; each sees the piece afterwards.
        each: how many there are for each layer and direction.
        mode, input_size: of the module, as its attributes.
        sizes: `hidden_size`, `proj_size`, `num_layers`, `batch_first`, `bidirectional`.

    Returns:
        whether this torch can do it.
    """
    if not torch._use_cudnn_rnn_flatten_weight():
        return False
    from torch.backends.cudnn.rnn import get_cudnn_mode

    code = get_cudnn_mode(mode)
    with torch.no_grad(), torch.cuda.device(weights[0].device):
        torch._cudnn_rnn_flatten_weight(weights, each, input_size, code, *sizes)
    return True
