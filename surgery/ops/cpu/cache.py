"""Where compiled kernels are kept between processes, and when what lies there is loaded.

To load a library is to run it. So it has to belong to the user (or to root), and nobody else may write
it, or change what its path leads to. Its name ends in the hash of its content, so that a damaged one is
known before it is loaded: a truncated library ends the process that calls it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

from ...base.caching import cached
from ...base.files import publish


def cache_folder() -> Path | None:
    """`DROPCONNECT_CACHE_DIR`, else a folder of the user's cache; None where that cannot be had or is
    not safe. A folder that was asked for and one that is not safe is warned of, once."""
    given = os.environ.get("DROPCONNECT_CACHE_DIR")
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        folder = Path(given) if given else base.expanduser() / "dropconnect-surgery"
        problem = unsafe(folder)  # before anything is made in another user's home
        if problem is None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            problem = unsafe(folder)
    except (OSError, RuntimeError) as error:  # read-only, or no home
        if given:
            _warn(str(error))
        return None
    if problem is not None:
        _warn(problem)
        return None
    return folder


@cached
def _warn(problem: str) -> None:
    warnings.warn(
        "DropConnect's kernels are compiled for this process alone, which takes seconds, because the "
        f"folder that should keep them cannot be used: {problem}. Set DROPCONNECT_CACHE_DIR to a "
        "folder that only you can write.",
        RuntimeWarning,
        stacklevel=2,
    )


def unsafe(folder: Path) -> str | None:
    """Who else can change what lies in `folder`, or None. What is not there yet is safe."""
    if not hasattr(os, "geteuid"):
        return None
    named = Path(os.path.abspath(folder))
    real = Path(os.path.realpath(folder))
    for path in dict.fromkeys((named, *named.parents, real, *real.parents)):
        with contextlib.suppress(FileNotFoundError):
            problem = _others(path, os.lstat(path), is_parent=path not in (named, real))
            if problem is not None:
                return problem
    return None


def _others(path: Path, stat_of: os.stat_result, is_parent: bool = False) -> str | None:
    """Who besides the user and root can change a file, what is in a folder, or where a link leads."""
    if stat_of.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to user {stat_of.st_uid}"
    if stat.S_ISLNK(stat_of.st_mode):  # has no permissions of its own
        return None
    by_group, by_all = stat_of.st_mode & stat.S_IWGRP, stat_of.st_mode & stat.S_IWOTH
    if is_parent:
        if stat_of.st_mode & stat.S_ISVTX:  # as /tmp: each may rename only what is his
            return None
        if stat_of.st_gid == os.geteuid():  # a group of the user's own, by custom of most systems
            by_group = 0
    if by_group or by_all:
        return f"{path} can be written by {'everybody' if by_all else f'group {stat_of.st_gid}'}"
    return None


def kept(folder: Path, name: str, fingerprint: str) -> Iterator[Path]:
    """The libraries of that name that may be loaded; damaged ones are removed."""
    for path in sorted(folder.glob(f"{name}-{fingerprint}-*.so")):
        content = _read_own(path)
        if content is None:
            continue
        if path == _path(folder, name, fingerprint, content):
            yield path
        else:
            remove(path)


def keep(folder: Path, name: str, fingerprint: str, library: Path) -> None:
    """Keep a library, which lies in the same file system and moves."""
    os.chmod(library, 0o644)
    publish(library, _path(folder, name, fingerprint, library.read_bytes()))


def remove(path: Path) -> None:
    """Remove a library that is of no use."""
    with contextlib.suppress(OSError):
        path.unlink()


def _path(folder: Path, name: str, fingerprint: str, content: bytes) -> Path:
    return folder / f"{name}-{fingerprint}-{hashlib.sha256(content).hexdigest()[:20]}.so"


def _read_own(path: Path) -> bytes | None:
    """The content of a regular file that nobody else can write; None of anything else."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        with open(os.open(path, flags | getattr(os, "O_BINARY", 0)), "rb") as file:
            stat_of = os.fstat(file.fileno())
            if not stat.S_ISREG(stat_of.st_mode):
                return None
            if hasattr(os, "geteuid") and _others(path, stat_of) is not None:
                return None
            return file.read()
    except OSError:
        return None
