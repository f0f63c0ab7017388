"""What a tensor is below its values: its version, memory, dispatch keys, and views."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

counter: Callable[[Tensor], int] = attrgetter("_version")
"""How often a tensor was changed in place. Autograd compares it; without it, a backward that computes
a masked weight again would not notice that the stored one is another by now. A tensor made in inference
mode has none, and raises `RuntimeError`."""


def version_of(tensor: Tensor) -> int:
    """How often it was changed in place; always 0 for a tensor made in inference mode, which does not
    count."""
    return 0 if tensor.is_inference() else tensor._version


identity: Callable[[Any], int] = attrgetter("_cdata")
"""Of an untyped storage: equal where two tensors see one piece of memory, also of fake tensors and on
the meta device, where `data_ptr()` raises or is 0. Without it, writes into a masked weight would be
missed in traces, and RNNs on cuDNN would not find that their weights lie in one piece."""


def memory_of(tensor: Tensor) -> int:
    """`identity` of the memory that a tensor sees; what transforms of `torch.func` put around it has
    none of its own, also in a trace."""
    while _is_wrapped(tensor):
        tensor = _inside(tensor)
    return int(identity(tensor.untyped_storage()))


_is_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor
_inside: Callable[[Tensor], Tensor] = torch._C._functorch.get_unwrapped


def dispatch_keys(tensor: Tensor) -> int:
    """A number that is the same for tensors that torch's dispatcher treats alike.

    Code below torch reads memory, and must know that the values are what lies there. Without this, it
    would take a question for each thing that a tensor can be beside dense.
    """
    found: int = torch._C._dispatch_keys(tensor).raw_repr()
    return found


is_unwritten_zero: Callable[[Tensor], bool] = Tensor._is_zerotensor
"""Whether it is zero and has no memory, as tangents and gradients may be: a kernel must not read it."""

is_batch: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor
"""Whether it is one of `torch.autograd.grad(..., is_grads_batched=True)`. Compiled code cannot ask."""


def is_batched(tensor: Tensor) -> bool:
    """Whether it is a batch of gradients, of `torch.autograd.grad(..., is_grads_batched=True)`: they do
    without `torch.func`, and run backward once with operations that each know of the batch."""
    if torch.compiler.is_compiling():  # there are none, and torch 2.9 does not trace the question
        return False
    return is_batch(tensor)


def unviewed(tensor: Tensor) -> Tensor:
    """The tensor, if it is a view as one that is none: what an autograd Function returns must not be a
    view of what it made, because torch forbids to write into such a one.

    A copy would do the same, and take the memory again.
    """
    if not tensor._is_view():
        return tensor
    own: Tensor = torch.ops.aten._unsafe_view.default(tensor, tensor.shape)
    return own


copy_all: Callable[[list[Tensor], list[Tensor]], None] = torch._foreach_copy_
"""Copies tensors into others by one launch; `copy_` does it one by one."""

no_torch_function: Any = torch._C._disabled_torch_function_impl
"""The `__torch_function__` of a subclass whose operations give plain tensors, as that of
`torch.nn.Parameter`. torch knows it by identity, and skips Python for it."""

without_torch_function: Any = torch._C.DisableTorchFunctionSubclass
"""A context in which torch functions read a subclass as the tensor that it is, and do not ask it.
Without it, a subclass could not ask for its own shape."""


def tensor_without_memory(cls: type[Tensor], like: Tensor) -> Any:
    """An object of a subclass with the shape, strides, dtype and device of a tensor, and no values.

    Without it, a subclass would have to compute its values when it is made.
    """
    with without_torch_function():
        return torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
