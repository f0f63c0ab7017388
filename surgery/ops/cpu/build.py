"""How C++ becomes a library: the machine's compiler, the cache, the loader.

Each library is compiled once and kept in a folder of the user's cache; where there is none, it is
compiled for the process that asks, and nothing stays on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ...base.files import unfinished_folder
from .cache import cache_folder, keep, kept, remove

Loaded = TypeVar("Loaded")

PATIENCE = 120.0
"""Seconds after which a compiler that does not end counts as one that fails."""


@dataclass(frozen=True)
class Source:
    """A file of C++, and how it is compiled."""

    path: Path
    flags: tuple[str, ...]
    extras: tuple[tuple[str, ...], ...] = ((),)
    """The first of these that a compiler takes is used."""
    links: tuple[str, ...] = ()
    """Flags that have to follow the source."""
    against: tuple[str, ...] = ()
    """What it is compiled against beside the machine: versions."""

    def commands(self, compiler: list[str], output: str) -> Iterator[list[str]]:
        """How it is compiled; the first of them that succeeds will do."""
        for extras in self.extras:
            source = [str(self.path), "-o", output]
            yield [*compiler, *self.flags, *extras, *source, *self.links]


class NoCompiler(RuntimeError):
    """The kernels cannot be compiled or loaded here; the message says why."""


def load(source: Source, opened: Callable[[Path], Loaded]) -> Loaded:
    """What `opened` makes of the library of a source, from the cache or compiled now.

    Args:
        opened: raises `NoCompiler` for a library that is of no use.

    Raises:
        NoCompiler: there is no compiler, or it fails, or what it makes cannot be opened.
    """
    compiler, program = find_compiler()
    try:
        fingerprint = _fingerprint(source, program, compiler)
        folder = cache_folder()
        loaded = None
        if folder is not None:
            loaded = _from_cache(folder, source, fingerprint, opened)
            loaded = loaded or _into_cache(folder, source, fingerprint, opened, compiler)
        if loaded is None:
            # Once loaded, a library needs its file no longer, nor do processes that are forked.
            with tempfile.TemporaryDirectory(prefix="dropconnect-surgery-") as private:
                loaded = opened(_compile(compiler, source, Path(private)))
    except OSError as error:
        raise NoCompiler(str(error)) from error
    return loaded


def load_kept(source: Source, opened: Callable[[Path], Loaded]) -> Loaded | None:
    """The same if it is in the cache; else None, and nothing is compiled."""
    with contextlib.suppress(NoCompiler, OSError):
        compiler, program = find_compiler()
        folder = cache_folder()
        if folder is not None:
            return _from_cache(folder, source, _fingerprint(source, program, compiler), opened)
    return None


def _from_cache(
    folder: Path, source: Source, fingerprint: str, opened: Callable[[Path], Loaded]
) -> Loaded | None:
    for path in kept(folder, source.path.stem, fingerprint):
        try:
            return opened(path)
        except NoCompiler:
            remove(path)
    return None


def _into_cache(
    folder: Path,
    source: Source,
    fingerprint: str,
    opened: Callable[[Path], Loaded],
    compiler: list[str],
) -> Loaded | None:
    """Compile in the cache; None where that fails, which may be for want of room or permission."""
    with contextlib.suppress(NoCompiler, OSError), unfinished_folder(folder) as scratch:
        library = _compile(compiler, source, scratch)
        loaded = opened(library)
        with contextlib.suppress(OSError):
            keep(folder, source.path.stem, fingerprint, library)
        return loaded
    return None


def find_compiler() -> tuple[list[str], str]:
    """The command that compiles, `CXX` or `c++`, and where its program lies."""
    given = os.environ.get("CXX", "").strip() or "c++"
    try:
        compiler = shlex.split(given)
    except ValueError as error:
        raise NoCompiler(f"CXX={given!r} is no command: {error}") from error
    program = shutil.which(compiler[0]) if compiler else None
    if program is None:
        raise NoCompiler(f"no C++ compiler ({compiler[0] if compiler else given}) on the path")
    return compiler, program


def _fingerprint(source: Source, program: str, compiler: list[str]) -> str:
    """Of all that a compiled library depends on: sources, flags, compiler and processor."""
    folder = source.path.parent
    files = (path for path in folder.iterdir() if path.suffix in (".cpp", ".h"))
    parts: list[Any] = [path.read_bytes() for path in sorted(files)]
    stat = os.stat(program)
    parts += [source.flags, source.extras, source.links, source.against, compiler]
    parts += [os.path.realpath(program), stat.st_size, stat.st_mtime_ns]
    parts += [platform.system(), platform.machine(), _processor()]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def _processor() -> str:
    """What `-march=native` looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    told = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(told)}))


def _compile(compiler: list[str], source: Source, folder: Path) -> Path:
    """The library that the compiler makes in `folder`."""
    library = folder / f"{source.path.stem}.so"
    said = ""
    for command in source.commands(compiler, str(library)):
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE
            )
        except subprocess.TimeoutExpired as error:
            raise NoCompiler(f"{shlex.join(compiler)} did not end in {PATIENCE:g} s") from error
        if done.returncode == 0 and library.is_file():
            return library
        lines = done.stderr.decode(errors="replace").splitlines()
        reason = next((line for line in lines if line.strip()), "no message")
        said = f"{shlex.join(compiler)} fails (exit {done.returncode}): {reason}"
    raise NoCompiler(said)
