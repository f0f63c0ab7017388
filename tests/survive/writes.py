"""Cut off all that writes files, at random moments and by random faults, and look at what is left.

    python -m tests.survive.writes [--count N] [--seed SEED] [WRITE ...]

prints, for each write and each fault, how many trials there were and how many left something that is
neither the old content nor the new one. The faults: SIGKILL when a file is about to be touched;
SIGKILL at a random time; an error of the system at such a point (no space, no permission, a read-only
file system, a broken disk); and files that cannot grow beyond a size, which is what a full disk does.
Then the work is done once more without a fault: it has to end with the new content, and nothing left
beside it.

Each trial runs in a process that is forked, so that one start of torch serves all.
"""

from __future__ import annotations

import argparse
import errno
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from surgery import NotOperatedError

from .written import WRITES, Write

ERRNOS = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO, errno.EDQUOT)

EXPECTED, UNEXPECTED = 0, 3
"""How a child ends: the work was done or has raised `OSError`; or it has raised something else."""

Fault = Callable[[Path], None]
"""Arms a fault, in the child, for a work in a folder."""


def _touches(name: str, args: Any) -> bool:
    """Whether an audit event is about to do something to a file."""
    return name == "open" or name.startswith(("os.", "shutil.", "fcntl."))


def at_event(number: int, strike: Callable[[], None], inside: bool = False) -> Fault:
    """Strike when Python is about to touch files for the n-th time; `inside`: the folder, by name."""

    def arm(folder: Path) -> None:
        left = number

        def hook(name: str, args: Any) -> None:
            nonlocal left
            if left < 0 or not _touches(name, args):
                return
            if inside and not (args and str(args[0]).startswith(str(folder))):
                return
            left -= 1
            if left < 0:
                strike()

        sys.addaudithook(hook)

    return arm


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_larger_than(size: int) -> Fault:
    """Let no file grow beyond so many bytes."""

    def arm(folder: Path) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return arm


def run(write: Write, folder: Path, fault: Fault | None = None, seconds: float = 0.0) -> int | None:
    """Do the work in a child; its exit code, None if it was killed. `seconds`: kill it then."""
    child = os.fork()
    if child == 0:
        code = UNEXPECTED
        try:
            if fault is not None:
                fault(folder)
            write.work(folder)
            code = EXPECTED
        except (OSError, NotOperatedError, SystemExit):  # done already; told on the command line
            code = EXPECTED
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if seconds:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def events_of(work: Callable[[], Any]) -> int:
    """How often a work touches files; counted in a child, since an audit hook stays for ever."""
    seen, told = os.pipe()
    child = os.fork()
    if child == 0:
        events = 0

        def count(name: str, args: Any) -> None:
            nonlocal events
            events += _touches(name, args)

        try:
            sys.addaudithook(count)
            work()
        finally:
            os.write(told, str(events).encode())
            os._exit(0)
    os.close(told)
    os.waitpid(child, 0)
    with os.fdopen(seen) as answer:
        return int(answer.read())


@dataclass
class Known:
    """A write as it goes without a fault."""

    write: Write
    folder: Path
    old: Any
    new: Any
    names: list[str]
    """What lies in the folder afterwards."""
    events: int
    """How often it touches files."""
    bytes: int
    """Size of the largest file."""
    seconds: float

    @classmethod
    def of(cls, write: Write, folder: Path) -> Known:
        fresh(write, folder)
        old = write.read(folder)
        write.work(folder)  # what it imports is imported before anything is cut off
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        known = cls(write, folder, old, write.read(folder), listed(folder), 0, max(sizes), 0.0)
        fresh(write, folder)
        known.events = events_of(lambda: write.work(folder))
        fresh(write, folder)
        began = time.perf_counter()
        run(write, folder)
        known.seconds = time.perf_counter() - began
        return known

    def faults(self, rng: Random) -> tuple[str, Fault | None, float]:
        """A fault at random: its name, what arms it, and when to kill."""
        kind, number = rng.choice(["kill", "kill", "late kill", "error", "full"]), rng.random()
        if kind == "kill":
            return kind, at_event(int(number * self.events), kill), 0.0
        if kind == "late kill":
            return kind, None, number * self.seconds + 1e-4
        if kind == "full":
            return kind, no_larger_than(int(number * self.bytes)), 0.0
        code = rng.choice(ERRNOS)

        def fail() -> None:
            raise OSError(code, os.strerror(code))

        return kind, at_event(int(number * self.events), fail, inside=True), 0.0

    def trial(self, rng: Random) -> tuple[str, str | None]:
        """One fault: its name, and what was wrong after it, or None."""
        fresh(self.write, self.folder)
        kind, fault, seconds = self.faults(rng)
        code = run(self.write, self.folder, fault, seconds)
        if code == UNEXPECTED:
            return kind, "an error that is no OSError"
        try:
            if self.write.read(self.folder) not in (self.old, self.new):
                return kind, "neither the old nor the new"
            run(self.write, self.folder)
            if self.write.read(self.folder) != self.new:
                return kind, "the next one does not end with the new"
        except Exception as error:
            return kind, f"unreadable: {type(error).__name__}: {error}"
        if listed(self.folder) != self.names:
            return kind, f"left over: {set(listed(self.folder)) ^ set(self.names)}"
        return kind, None


def fresh(write: Write, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write.prepare(folder)


def listed(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def trials(write: Write, folder: Path, count: int, rng: Random) -> tuple[Counter, Counter]:
    """So many faults: how many of each kind, and what was wrong."""
    known, tried, wrong = Known.of(write, folder), Counter[str](), Counter[str]()
    for _ in range(count):
        kind, problem = known.trial(rng)
        tried[kind] += 1
        if problem is not None:
            wrong[f"{kind}: {problem}"] += 1
    return tried, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("writes", nargs="*")
    parser.add_argument("--count", type=int, default=1000, help="of all together")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.fsync = lambda fd: None  # a process dies here, and not the machine
    names = options.writes or list(WRITES)
    rng, tried, wrong = Random(options.seed), Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as home:
        for name in names:
            each = trials(WRITES[name], Path(home) / "work", options.count // len(names), rng)
            print(f"{name:24} {dict(each[0])} {dict(each[1]) or ''}", flush=True)
            tried, wrong = tried + each[0], wrong + each[1]
    print(f"cut off while files are written: {tried.total()} tried {dict(tried)},", end=" ")
    print(f"{wrong.total()} left neither the old nor the new")
    return int(wrong.total() > 0)


if __name__ == "__main__":
    sys.exit(main())
