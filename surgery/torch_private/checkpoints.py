"""Which activation checkpoints are around the calling code.

An activation checkpoint (`torch.utils.checkpoint`) runs its function twice: in the forward, and again
in the backward, with torch's own generators put back to where they were. Others are not put back. Who
draws from others has to know which checkpoints the first run is part of, and which the second. torch
tells nobody, so the frames of Python are searched for its functions. Without them, masks from a
generator of their own could not be drawn inside of a checkpoint.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, NamedTuple

from torch.utils import checkpoint

from .tracing import backward_number


class Around(NamedTuple):
    """The checkpoints around some code, as objects that live as long as their part of the graph of
    autograd, and that take attributes."""

    first: list[Any]
    """Those whose function runs for the first time."""
    again: Any
    """The one whose function runs again; None if none does."""
    run: int
    """A number for that run: a graph may be walked several times."""


def _nested(function: Callable[..., Any], name: str) -> CodeType:
    """The code of a function that is defined inside of another."""
    codes = (one for one in function.__code__.co_consts if isinstance(one, CodeType))
    return next(one for one in codes if one.co_name == name)


_RUNS_FIRST = getattr(checkpoint, "_checkpoint_impl", inspect.unwrap(checkpoint.checkpoint))
"""What runs a function without a reentrant backward; since torch 2.14 of a name of its own."""

_FIRST: dict[CodeType, Callable[[dict[str, Any]], Any]] = {
    checkpoint.CheckpointFunction.forward.__code__: lambda names: names["ctx"],
    _RUNS_FIRST.__code__: lambda names: (
        names["gen"].gi_frame.f_locals["new_frame"] if "gen" in names else None
    ),
}
"""By the code that runs a function for the first time: the checkpoint, from the names in its frame."""

_AGAIN = {
    checkpoint.CheckpointFunction.backward.__code__: "ctx",
    _nested(checkpoint._checkpoint_hook.__init__, "unpack_hook"): "frame",
}
"""By the code that runs it again: the name of the checkpoint in its frame."""


def around() -> Around:
    """The checkpoints around the caller."""
    first: list[Any] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = _AGAIN.get(frame.f_code)
        if name is not None:
            names = frame.f_locals
            return Around(first, names[name], names.get("gid", backward_number()))
        found = _FIRST.get(frame.f_code)
        one = None if found is None else found(frame.f_locals)
        if one is not None:
            first.append(one)
        frame = frame.f_back
    return Around(first, None, -1)
