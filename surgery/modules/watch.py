"""Notice a forward that reads a weight where nobody draws its mask.

Neither the source nor a run shows every reader. A forward that neither has shown gets the raw parameter
from the property of the weight, also in training: the weight is not dropped there, and the outputs do
not tell.
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from types import CodeType, FrameType
from typing import Any

from torch.utils import checkpoint

from ..kinds.source import line_uses_value
from ..torch_private.modules import CALL, forward_hooks
from ..torch_private.tracing import backward_number
from .state import SiteState

_INNER = {CALL, *(code for code in CALL.co_consts if isinstance(code, CodeType))}
"""What runs hooks and the forward when a module is called. Each knows it as `self`."""


def notice(state: SiteState) -> None:
    """Warn, once for a site, if a forward in training reads the value of the raw parameter.

    It must be called by the property, whose caller is the reader. Nothing is wrong with reads outside
    of any forward (a penalty on the weights), in hooks, and of a tensor's `dtype` or `shape`.

    Raises:
        RuntimeError: see `refuse_recomputation`.
    """
    if state.undropped_by is not None or state.mode(training=True) is None:
        return
    frame = sys._getframe(2)
    reader = _reader(frame)
    if reader is None or not line_uses_value(frame.f_code, frame.f_lineno, state.name):
        return
    refuse_recomputation(state)
    state.undropped_by = reader
    warnings.warn(
        f"{state.site} is read by {reader} where no mask is drawn for it, so that it is not dropped "
        "there: give apply_dropconnect example_inputs, which shows who reads a weight, or exclude it",
        stacklevel=3,
    )


def refuse_recomputation(state: SiteState) -> None:
    """Refuse a read in a backward pass that recomputes activations, if the forward had a mask that a
    module around the recomputed part drew: it is gone.

    Raises:
        RuntimeError: it is such a read.
    """
    if state.drawn_outside and backward_number() != -1:
        raise RuntimeError(
            f"activation checkpointing recomputes what reads {state.site}, and the forward that draws "
            "its mask is not part of that (drawn_by in dropconnect_sites): checkpoint the module that "
            "draws, as a whole, or exclude the site"
        )


def _reader(frame: FrameType | None) -> str | None:
    """Whose forward a frame is part of, for a message; None if it is part of none, or of a hook."""
    below: FrameType | None = None
    recomputed = False
    while frame is not None:
        if frame.f_code in _INNER:
            module: Any = frame.f_locals.get("self")
            if below is not None and below.f_code in map(_code, forward_hooks(module)):
                return None
            return f"the forward of {type(module).__name__}"
        recomputed = recomputed or frame.f_code.co_filename == checkpoint.__file__
        below, frame = frame, frame.f_back
    return "a recomputation of activations" if recomputed else None


def _code(hook: Any) -> Any:
    """The code that a hook around a forward runs; None if it is none of Python."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    call = hook if inspect.isfunction(hook) or inspect.ismethod(hook) else type(hook).__call__
    return getattr(call, "__code__", None)
