"""What follows the calling code: a compiler, a transform, a tracer, a CUDA graph, a backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import forward_ad


def is_traced() -> bool:
    """Whether the calling code must be plain tensor operations, because something follows each of them:
    `torch.compile`, a `torch.func` transform, or forward-mode AD.

    torch has no public question for the last two. Without an answer, the kernels, and functions that
    keep a key instead of a tensor, would give a transform values that it does not know.
    """
    if forward_ad._current_level >= 0 or torch.compiler.is_compiling():
        return True
    return is_transformed()


is_transformed: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""Whether a transform of `torch.func` is under way; compiled code can ask it, too."""


is_scripted: Callable[[], bool] = torch._C._is_tracing
"""Whether `torch.jit.trace` runs, in whose result a mask would be a constant: that is refused. The
public `torch.jit.is_tracing` asks this, by two more calls of Python functions in each forward."""


def is_capturing() -> bool:
    """Whether what is launched on CUDA becomes part of a graph, which runs it again and again: then no
    number of the host may be part of it."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


backward_number: Callable[[], int] = torch._C._current_graph_task_id
"""Which backward pass runs in this thread; -1 if none does. Without it, a forward that an activation
checkpoint runs again could not be told from a first one, and would read a weight without its mask."""
