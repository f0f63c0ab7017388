"""The modes of torch: which are on, and how to step outside of them or switch them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .compiler import stance_back


def outside_of_inference() -> AbstractContextManager[Any]:
    """`torch.inference_mode(False)` where inference mode is on, and nothing elsewhere: an interrupt at
    its end could leave autograd for the thread as it is inside of a function, switched off."""
    on = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    return torch.inference_mode(False) if on else nullcontext()


@contextmanager
def lasting() -> Iterator[None]:
    """For making tensors that outlive the inference, the transform or the mode that is running. Give
    them a device: `with torch.device(...)` acts here too.

    Without `_DisableFuncTorch` and `_disable_current_modes`, what is made once and kept could be a
    wrapper of a transform, or a fake tensor, which is worth nothing when that has ended.
    """
    with outside_of_inference(), torch._C._DisableFuncTorch(), _disable_current_modes():
        yield


set_gradients: Callable[[bool], Any] = torch._C._set_grad_enabled
"""Switches the recording of autograd, as a step of `base/journal.py`. `torch.set_grad_enabled` does it
from Python code, in which an interrupt may come before it is done."""

any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""Whether autocast is on for some device. `torch.is_autocast_enabled(device.type)` answers for one, and
takes several times as long in each forward."""

dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
function_modes: Callable[[], int] = torch._C._len_torch_function_stack
"""How many modes see each operation, and each torch function. One of them could hold on to memory that
is lent for the length of a product only."""


_functions: Callable[[], Any] = torch._C._get_torch_function_state  # type: ignore[attr-defined]
_set_functions: Callable[[Any], Any] = torch._C._set_torch_function_state  # type: ignore[attr-defined]


def switches_back() -> Callable[[], None]:
    """A call that gives the thread the switches back that it has now: whether gradients are recorded,
    whether torch functions ask subclasses, which modes see them, and the stance of `torch.compile`.

    For `restoring` of `base/journal.py`: it may be called again. The contexts that turn these switches
    are left by an instruction of their own, of a `with` or of torch's Python code, and an interrupt can
    come before it.
    """
    gradients, functions = torch.is_grad_enabled(), _functions()
    modes, stance = function_modes(), stance_back()

    def put_back() -> None:
        while function_modes() > modes:
            torch._C._pop_torch_function_stack()
        _set_functions(functions)
        set_gradients(gradients)
        stance()

    return put_back
