"""Kill a process again and again, each time a little later, and look at what it left.

The process is forked, so that one start of torch serves all; it dies by SIGKILL when Python comes to
the n-th event (a line, a call, a return) of the work, so that no moment between two steps is left out.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any


def killed_at(work: Callable[[], None], event: int) -> bool:
    """Do the work in a child that is killed at that event; whether it was, or had ended before."""
    child = os.fork()
    if child == 0:
        left = event

        def count(*args: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return count

        code = 1
        try:
            sys.settrace(count)
            work()
            sys.settrace(None)
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the work itself failed"
    return os.WIFSIGNALED(status)


def events(work: Callable[[], None]) -> int:
    """How many events the work has."""
    low, high = 0, 1
    while killed_at(work, high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if killed_at(work, middle) else (low, middle)
    return high


def kills(work: Callable[[], None], count: int) -> Iterator[int]:
    """Kill the work at so many events, spread over all of it; yields each."""
    total = events(work)
    for number in range(count):
        event = total * number // count
        killed_at(work, event)
        yield event
