"""Files that are never half-written.

What is not finished lies in a folder of its own beside the file that it becomes, whoever writes it and
whatever else that writer leaves there. The folder is locked while its process lives, so that what a
killed one has left is known, and removed by the next that writes there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a Unix: leftovers are told by their age
    fcntl = None  # type: ignore[assignment]

_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_MARK, _END = ".dropconnect-", ".unfinished"

ABANDONED = 24 * 3600.0
"""Seconds after which an unfinished file counts as left over, where no lock tells: on another host, or
on a file system without locks."""


@contextlib.contextmanager
def whole_file(path: Path, mode: int = 0o666) -> Iterator[str]:
    """A temporary path, which replaces `path` once it is written and on disk.

    Args:
        path: its folder exists.
        mode: the permissions that are asked for, of which the umask takes some, as for every file.
    """
    with unfinished_folder(path.parent) as folder:
        temporary = folder / path.name
        given = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
        granted = stat.S_IMODE(os.fstat(given).st_mode)
        os.close(given)
        yield str(temporary)
        if stat.S_IMODE(os.stat(temporary).st_mode) != granted:  # the writer made a file of its own
            os.chmod(temporary, granted)
        publish(temporary, path)


def publish(finished: Path, path: Path) -> None:
    """Move a file that is written to where it is wanted, durably: both are in one file system."""
    with open(finished, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(finished, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Let what was renamed in or removed from a folder be on disk, where the system can do that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def unfinished_folder(parent: Path) -> Iterator[Path]:
    """A folder inside `parent` for what is being written, gone on exit; first, those that killed
    processes have left are removed.

    Raises:
        OSError: there is no `parent`, or it cannot be written.
    """
    if not parent.is_dir():
        raise FileNotFoundError(no_folder(parent))
    sweep(parent)
    folder, lock = _locked_folder(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def no_folder(folder: Path) -> str:
    """What is said where a file was to be written and there is no folder for it."""
    return f"there is no folder {folder}; make it first, or name another"


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """While the block runs, no other process is in such a block for the same folder. Where the file
    system has no locks, nothing is held.

    Raises:
        BlockingIOError: another process is.
    """
    lock = None
    try:
        lock = _lock(folder)
    except BlockingIOError:
        raise BlockingIOError(f"another process is writing in {folder}") from None
    except OSError:
        pass
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _locked_folder(parent: Path) -> tuple[Path, int | None]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{_MARK}{_HOST}-", suffix=_END, dir=parent))
        try:
            lock = _lock(folder)
        except (BlockingIOError, FileNotFoundError):  # another's sweep came before the lock
            continue
        except OSError:  # a file system that has none
            return folder, None
        if folder.exists():
            return folder, lock
        os.close(lock)


def _lock(folder: Path) -> int:
    """A descriptor that keeps a folder locked until it is closed or its process ends.

    Raises:
        BlockingIOError: another has the lock.
        OSError: there are no locks here.
    """
    if fcntl is None:
        raise OSError("this system has no flock")
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def sweep(parent: Path) -> None:
    """Remove what killed processes have left in a folder."""
    with contextlib.suppress(OSError):
        for name in os.listdir(parent):
            if name.startswith(_MARK) and name.endswith(_END):
                with contextlib.suppress(OSError):
                    _remove_if_left_over(parent / name)


def _remove_if_left_over(folder: Path) -> None:
    """Remove an unfinished folder of this user that no process works in."""
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or (hasattr(os, "geteuid") and found.st_uid != os.geteuid()):
        return
    lock = None
    if folder.name.startswith(f"{_MARK}{_HOST}-"):
        try:
            lock = _lock(folder)
        except BlockingIOError:
            return
        except OSError:
            pass
    if lock is not None or time.time() - found.st_mtime > ABANDONED:
        shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)
