"""How the C++ of `kernels/` becomes functions: the machine's compiler, the cache, the loader.

Each library is compiled once (one to four seconds) and kept in a folder of the user's cache; where
there is none, it is compiled for the process that asks, and nothing stays on disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...base.files import unfinished_folder
from .cache import cache_folder, keep, kept, remove

SOURCES = Path(__file__).parent / "kernels"

FLAGS = (
    *("-std=c++17", "-O3", "-funroll-loops", "-shared", "-fPIC"),
    # The formula's own rounding: no product and sum in one step but where the source says so.
    "-ffp-contract=off",
    # Nobody asks for floating-point exceptions; with them, no loop with a condition is vectorised.
    *("-fno-trapping-math", "-fno-math-errno"),
)
EXTRAS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ())
"""The first of these that a compiler takes is used."""

PATIENCE = 120.0
"""Seconds after which a compiler that does not end counts as one that fails."""


Functions = Mapping[str, Sequence[Any]]
"""The functions of a library, with the types of their arguments."""


class NoCompiler(RuntimeError):
    """The kernels cannot be compiled or loaded here; the message says why."""


def load(name: str, functions: Functions) -> Any:
    """The functions of `kernels/<name>.cpp`, from the cache or compiled now.

    Raises:
        NoCompiler: there is no compiler, or it fails, or what it makes has not these functions.
    """
    compiler, program = find_compiler()
    try:
        fingerprint = _fingerprint(program, compiler)
        folder = cache_folder()
        loaded = None
        if folder is not None:
            loaded = _from_cache(folder, name, fingerprint, functions)
            loaded = loaded or _into_cache(folder, name, fingerprint, functions, compiler)
        if loaded is None:
            # Once loaded, a library needs its file no longer, nor do processes that are forked.
            with tempfile.TemporaryDirectory(prefix="dropconnect-surgery-") as private:
                loaded = open_library(_compile(compiler, name, Path(private)), functions)
    except OSError as error:
        raise NoCompiler(str(error)) from error
    return loaded


def _from_cache(folder: Path, name: str, fingerprint: str, functions: Functions) -> Any:
    for path in kept(folder, name, fingerprint):
        try:
            return open_library(path, functions)
        except NoCompiler:
            remove(path)
    return None


def _into_cache(
    folder: Path, name: str, fingerprint: str, functions: Functions, compiler: list[str]
) -> Any:
    """Compile in the cache; None where that fails, which may be for want of room or permission."""
    with contextlib.suppress(NoCompiler, OSError), unfinished_folder(folder) as scratch:
        library = _compile(compiler, name, scratch)
        loaded = open_library(library, functions)
        with contextlib.suppress(OSError):
            keep(folder, name, fingerprint, library)
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


def open_library(library: Path, functions: Functions) -> Any:
    try:
        loaded = ctypes.CDLL(str(library))
        for function, arguments in functions.items():
            getattr(loaded, function).argtypes = arguments
            getattr(loaded, function).restype = None
    except (OSError, AttributeError) as error:
        raise NoCompiler(f"{library.name} cannot be used: {error}") from error
    return loaded


def _fingerprint(program: str, compiler: list[str]) -> str:
    """Of all that a compiled kernel depends on: sources, flags, compiler and processor."""
    parts: list[Any] = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    stat = os.stat(program)
    parts += [FLAGS, EXTRAS, compiler, os.path.realpath(program), stat.st_size, stat.st_mtime_ns]
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


def _compile(compiler: list[str], name: str, folder: Path) -> Path:
    """The library that the compiler makes in `folder`."""
    library = folder / f"{name}.so"
    said = ""
    for command in commands(compiler, SOURCES / f"{name}.cpp", str(library)):
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


def commands(compiler: list[str], source: Path, output: str) -> Iterator[list[str]]:
    for extras in EXTRAS:
        yield [*compiler, *FLAGS, *extras, str(source), "-o", output]
