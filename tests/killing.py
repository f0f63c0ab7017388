"""Kill a process again and again, each time a little later, and look at what it left.

The process is forked, so that one start of torch serves all; it dies by SIGKILL when Python is about to
do the n-th thing to a file (an audit event), so that no state of the disk between two of them is left
out.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any


def killed_at(work: Callable[[], Any], event: int) -> bool:
    """Do the work in a child that is killed at that event; whether it was, or had ended before."""
    child = os.fork()
    if child == 0:
        left, counts = event, True

        def count(name: str, args: Any) -> None:
            nonlocal left, counts
            if counts and (name == "open" or name.startswith(("os.", "shutil.", "fcntl."))):
                left -= 1
                if left < 0:
                    counts = False  # os.kill is an event too
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.addaudithook(count)
            work()
            counts, code = False, 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the work itself failed"
    return os.WIFSIGNALED(status)


def kills(work: Callable[[], Any], before: Callable[[], Any]) -> Iterator[int]:
    """Kill the work at every event; yields each. `before` makes the state of the disk in which it
    begins."""
    for event in itertools.count():
        before()
        if not killed_at(work, event):
            return
        yield event
