"""Whether anything is compiled: switched off by the user, or found not to work on this machine."""

from __future__ import annotations

import os
import warnings

from ..journal import Lock

_lock = Lock()
_enabled = os.environ.get("DROPCONNECT_COMPILE", "1") != "0"
_broken = False


def compile_enabled() -> bool:
    """Whether anything is compiled: not switched off by `DROPCONNECT_COMPILE=0`, nor found not to
    work on this machine."""
    return _enabled and not _broken


def set_compile_enabled(enabled: bool) -> bool:
    """Switch compiling on or off; returns what it was. At the start, the environment variable
    `DROPCONNECT_COMPILE` tells."""
    global _enabled
    before, _enabled = _enabled, enabled
    return before


def _is_first_failure() -> bool:
    global _broken
    first, _broken = not _broken, True
    return first


def give_up(error: BaseException) -> None:
    """Compile nothing any more, and warn of it once, with the error as the reason."""
    if not _lock.holding(_is_first_failure):
        return
    reason = " ".join(str(error).split("\n")[:2]).strip() or type(error).__name__
    warnings.warn(
        "No kernels can be compiled here, so DropConnect masks are computed by the slower plain "
        f"formula (the results are the same). Install a C++ compiler to speed it up, or set "
        f"DROPCONNECT_COMPILE=0 to silence this. Reason: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )
