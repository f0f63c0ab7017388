"""What follows the calling code: a compiler, a graph, a transform, a CUDA graph, a backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import compiler
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace as fx

from .modes import dispatch_modes


def _read_global_flag() -> bool:
    return fx._is_fx_tracing_flag


_is_fx_tracing: Callable[[], bool] = getattr(fx, "_get_is_fx_tracing", _read_global_flag)
"""Whether a tracer of torch.fx runs: a global name before torch 2.14, and then one of each thread. The
public `is_fx_tracing` warns."""


def is_traced() -> bool:
    """Whether the calling code must be plain tensor operations, because something follows each of them:
    what makes a graph (see `is_graphed`), a `torch.func` transform, or forward-mode AD.

    torch has no public question for the last two. Without an answer, the kernels, and functions that
    keep a key instead of a tensor, would give a transform values that it does not know.
    """
    if torch.compiler.is_dynamo_compiling() or compiler._is_compiling_flag:
        return True
    if forward_ad._current_level >= 0 or _is_fx_tracing() or is_transformed():
        return True
    return dispatch_modes() > 0 and _has_graphing_mode()


def is_graphed() -> bool:
    """Whether operations become nodes of a graph instead of being done, or are done on fake tensors:
    `torch.compile`, `torch.export`, `make_fx`, AOTAutograd, `FakeTensorMode`.

    The public `torch.compiler.is_compiling` asks for the first two, by two calls of Python functions.
    The flag of torch.fx, that a tracer runs, is all that tells of `make_fx(..., pre_dispatch=True)`.
    Without these, a graph would have tensors that nothing fills, or masks that never change.
    """
    if torch.compiler.is_dynamo_compiling() or compiler._is_compiling_flag or _is_fx_tracing():
        return True
    return dispatch_modes() > 0 and _has_graphing_mode()


_mode_of = torch._C._get_dispatch_mode
_GRAPHING = tuple(
    getattr(torch._C._TorchDispatchModeKey, k) for k in ("PROXY", "FUNCTIONAL", "FAKE")
)


def _has_graphing_mode() -> bool:
    """Whether one of torch's own modes is on that stand for a graph. Modes of others only look on."""
    return any(_mode_of(key) is not None for key in _GRAPHING)


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
