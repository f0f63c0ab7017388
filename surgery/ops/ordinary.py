"""Tensors whose values are what lies in memory: those that code below torch may read."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def _keys(tensor: Tensor) -> int:
    found: int = torch._C._dispatch_keys(tensor).raw_repr()
    return found


@functools.cache
def _plain_keys(kind: str) -> frozenset[int]:
    """The dispatch keys of a dense tensor on that type of device, made outside and inside of inference
    mode. All else has others: negated and conjugate views, zeros without memory, sparse, nested,
    quantised and mkldnn tensors, the batches of `vmap`, fake and functional tensors."""
    found = set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            found.add(_keys(torch.empty(1, device=kind)))
    return frozenset(found)


_PLAIN = _plain_keys("cpu")


def is_ordinary(tensor: Tensor) -> bool:
    """Whether it is a dense tensor on the CPU and nothing else, of any strides."""
    kind = type(tensor)
    return (kind is Tensor or kind is torch.nn.Parameter) and _keys(tensor) in _PLAIN


def is_ordinary_there(tensor: Tensor) -> bool:
    """The same on whatever device it is."""
    kind = type(tensor)
    if kind is not Tensor and kind is not torch.nn.Parameter:
        return False
    return _keys(tensor) in _plain_keys(tensor.device.type)


def is_dense(tensor: Tensor) -> bool:
    """Whether it has one value for each entry of one shape: no sparse and no nested tensor."""
    return tensor.layout is torch.strided and not tensor.is_nested


def is_batched(tensor: Tensor) -> bool:
    """Whether it is a batch of gradients, of `torch.autograd.grad(..., is_grads_batched=True)`: they do
    without `torch.func`, and run backward once with operations that each know of the batch."""
    if torch.compiler.is_compiling():  # there are none, and torch 2.9 does not trace the question
        return False
    batched: bool = torch._C._functorch.is_legacy_batchedtensor(tensor)
    return batched


def unviewed(tensor: Tensor) -> Tensor:
    """The tensor, if it is a view as one that is none: what an autograd Function returns must not be a
    view of what it made, because torch forbids to write into such a one."""
    if not tensor._is_view():
        return tensor
    own: Tensor = torch.ops.aten._unsafe_view.default(tensor, tensor.shape)
    return own
