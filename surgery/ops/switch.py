"""Whether anything is compiled: switched off by the user, or found not to work on this machine."""

from __future__ import annotations

import os
import warnings
from typing import Literal

from ..base.journal import Lock

_lock = Lock()
Kind = Literal["cpu", "gpu"]

_enabled = os.environ.get("DROPCONNECT_COMPILE", "1") != "0"
_broken: set[Kind] = set()


def compile_enabled(kind: Kind) -> bool:
    """Whether kernels are compiled for a kind of device: not switched off by `DROPCONNECT_COMPILE=0`,
    nor found not to work on this machine."""
    return _enabled and kind not in _broken


def set_compile_enabled(enabled: bool) -> bool:
    """Switch compiling on or off; returns what it was. At the start, the environment variable
    `DROPCONNECT_COMPILE` tells."""
    global _enabled
    before, _enabled = _enabled, enabled
    return before


def give_up(kind: Kind, error: BaseException) -> None:
    """Compile nothing for that kind any more, and warn of it once, with the error as the reason."""

    def is_first() -> bool:
        first = kind not in _broken
        _broken.add(kind)
        return first

    if not _lock.holding(is_first):
        return
    reason = " ".join(str(error).split("\n")[:2]).strip() or type(error).__name__
    warnings.warn(
        f"No kernels can be compiled here for the {kind.upper()}, so DropConnect masks are computed "
        "by the slower plain formula (the results are the same). Install a C++ compiler to speed it "
        f"up{' (Triton needs one too)' * (kind == 'gpu')}, or set "
        f"DROPCONNECT_COMPILE=0 to silence this. Reason: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )
