"""Tensors whose values are what lies in memory: those that code below torch may read."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..torch_private.tensors import dispatch_keys


@functools.cache
def _plain_keys(kind: str) -> frozenset[int]:
    """The dispatch keys of a dense tensor on that type of device, made outside and inside of inference
    mode. All else has others: negated and conjugate views, zeros without memory, sparse, nested,
    quantised and mkldnn tensors, the batches of `vmap`, fake and functional tensors."""
    found = set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            found.add(dispatch_keys(torch.empty(1, device=kind)))
    return frozenset(found)


_PLAIN = _plain_keys("cpu")


def is_ordinary(tensor: Tensor) -> bool:
    """Whether it is a dense tensor on the CPU and nothing else, of any strides."""
    kind = type(tensor)
    return (kind is Tensor or kind is torch.nn.Parameter) and dispatch_keys(tensor) in _PLAIN


def is_ordinary_there(tensor: Tensor) -> bool:
    """The same on whatever device it is."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return plain and dispatch_keys(tensor) in _plain_keys(tensor.device.type)


def is_dense(tensor: Tensor) -> bool:
    """Whether it has one value for each entry of one shape: no sparse and no nested tensor."""
    return tensor.layout is torch.strided and not tensor.is_nested
