"""The JSON forms of configs, plans and files: their versions, and the one place that checks them.

A form may come from anywhere: a download, a disk that failed, an editor. Every value is checked for its
type and size here before anything is made of it, so a reader gets what it expects or a `SurgeryError`
that says where the form is wrong.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from .errors import SurgeryError

FORMAT_VERSION = 1
"""Version of the forms that `to_json` of configs and plans and `surgery.verbs.checkpoint` write."""

Form = Mapping[str, Any]
Migration = Callable[[Form], Form]

MIGRATIONS: dict[int, dict[str, Migration]] = {}
"""By version: what makes a `"config"`, `"plan"` or `"file"` of that version one of the next. Kinds that
did not change then are not listed. The configs in a plan and the plan in a file have versions of their
own."""

MAX_BYTES = 1 << 26
"""Longest file of JSON that is read: a plan has about 600 bytes for each site."""

_MAX_TEXT, _MAX_INT = 4096, 1 << 63

Value = TypeVar("Value")
Reader = Callable[[Any, str], Value]
"""Takes a value and says where it stands; returns it, checked. Raises `SurgeryError`."""


def read_regular(path: Path, most: int) -> bytes:
    """The content of a file; never waits for one that is none (a pipe, a device).

    Args:
        most: the number of bytes that may be read.

    Raises:
        OSError: there is no file, or it cannot be read.
        SurgeryError: it is not a regular file, or longer.
    """
    check_regular(path)
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(handle, "rb") as file:
        _check_regular(path, os.fstat(handle))  # it may have been replaced
        content = file.read(most + 1)
    if len(content) > most:
        raise SurgeryError(f"{path} is longer than the {most:,} bytes that are read")
    return content


def check_regular(path: Path) -> None:
    """Raise what `read_regular` raises for a path that does not lead to a regular file."""
    _check_regular(path, os.stat(path))


def _check_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise SurgeryError(f"{path} is not a regular file")


def check_links(folder: Path, names: Iterable[str]) -> None:
    """Raise `SurgeryError` if a file in a folder is a link that leads out of it: who gave the folder
    may not have meant that. Links in the cache of huggingface_hub lead to its blobs, as they should.

    Args:
        names: of files in the folder; those that a file tells have been read by `beside`.
    """
    for name in names:
        target = real(folder / name)
        if not target.is_relative_to(real(folder)) and not is_cached(folder / name):
            raise SurgeryError(
                f"{folder / name} is a link that leads out of its folder, to {target}: copy that"
            )


def is_cached(path: Path) -> bool:
    """Whether a file is a link of a snapshot in the cache of huggingface_hub, to a blob of it."""
    above = [folder.parent for folder in real(path.parent).parents if folder.name == "snapshots"]
    return any(real(path).parent == folder / "blobs" for folder in above[:1])


def real(path: Path) -> Path:
    """Where a path leads, through all links; those that lead to themselves stay as they are."""
    return Path(os.path.realpath(path))


def read_json(path: Path) -> Any:
    """What a file of JSON holds.

    Raises:
        OSError: there is no file, or it cannot be read.
        SurgeryError: it is not regular, too long, no UTF-8 or no JSON, nested too deeply, or names a
            key twice.
    """
    return load_json(read_regular(path, MAX_BYTES), path)


def load_json(content: bytes, where: object) -> Any:
    """What a text of JSON holds; `where` is what errors call it.

    Raises:
        SurgeryError: it is no UTF-8 or no JSON, nested too deeply, or names a key twice.
    """
    try:
        return json.loads(
            content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number
        )
    except RecursionError:
        raise SurgeryError(f"cannot read {where}: it is nested too deeply") from None
    except ValueError as error:
        raise SurgeryError(f"cannot read {where}: {type(error).__name__}: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    form = dict(pairs)
    if len(form) < len(pairs):
        raise ValueError("an object names a key twice")
    return form


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def migrated(form: Any, kind: str, where: str) -> dict[str, Any]:
    """A form, of a kind that `MIGRATIONS` knows, in today's version, without its number."""
    if not isinstance(form, Mapping):
        raise SurgeryError(f"{where} must be an object; got {shown(form)}")
    version = form.get("version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise SurgeryError(
            f"{where} was saved in format {shown(version)}; this release reads format {FORMAT_VERSION}"
            " and older ones"
        )
    for older in range(version, FORMAT_VERSION):
        step = MIGRATIONS.get(older, {}).get(kind)
        form = form if step is None else step(form)
    return {name: value for name, value in form.items() if name != "version"}


def fields(
    form: Any,
    where: str,
    needed: Mapping[str, Reader[Any]],
    optional: Mapping[str, Reader[Any]] | None = None,
) -> dict[str, Any]:
    """The fields of an object, each checked by its reader."""
    if not isinstance(form, Mapping):
        raise SurgeryError(f"{where} must be an object; got {shown(form)}")
    readers = {**needed, **(optional or {})}
    unknown = sorted(str(name)[:_SHOWN] for name in form if name not in readers)
    if unknown:
        raise SurgeryError(f"{where} has unknown fields {unknown[:8]}")
    missing = [name for name in needed if name not in form]
    if missing:
        raise SurgeryError(f"{where} lacks {', '.join(map(repr, missing))}")
    return {name: readers[name](value, f"{where}.{name}") for name, value in form.items()}


def each(reader: Reader[Value]) -> Reader[tuple[Value, ...]]:
    """A reader of lists of what `reader` reads."""

    def read(value: Any, where: str) -> tuple[Value, ...]:
        if not isinstance(value, (list, tuple)):
            raise SurgeryError(f"{where} must be a list; got {shown(value)}")
        return tuple(reader(one, f"{where}[{number}]") for number, one in enumerate(value))

    return read


def maybe(reader: Reader[Value]) -> Reader[Value | None]:
    """A reader of what `reader` reads, or null."""
    return lambda value, where: None if value is None else reader(value, where)


def text(value: Any, where: str) -> str:
    """A string that can be printed, of reasonable length."""
    if not isinstance(value, str):
        raise SurgeryError(f"{where} must be a text; got {shown(value)}")
    if len(value) > _MAX_TEXT or any("\ud800" <= char <= "\udfff" for char in value):
        raise SurgeryError(f"{where} is no name: too long, or not Unicode; got {shown(value)}")
    return value


def flag(value: Any, where: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise SurgeryError(f"{where} must be true or false; got {shown(value)}")
    return value


def integer(value: Any, where: str) -> int:
    """A number without a fraction, of 64 bits."""
    if type(value) is not int or not -_MAX_INT <= value < _MAX_INT:
        raise SurgeryError(f"{where} must be an integer of 64 bits; got {shown(value)}")
    return value


def size(value: Any, where: str) -> int:
    """The size of a dimension, or how often something happens."""
    if integer(value, where) < 0:
        raise SurgeryError(f"{where} must not be negative; got {shown(value)}")
    return int(value)


def number(value: Any, where: str) -> float:
    """A finite number."""
    if type(value) is float and math.isfinite(value):
        return value
    return integer(value, where) if type(value) is int else _not_a_number(value, where)


def _not_a_number(value: Any, where: str) -> float:
    raise SurgeryError(f"{where} must be a finite number; got {shown(value)}")


def beside(value: Any, where: str) -> str:
    """The name of a file that lies beside the one that is read, and nowhere else."""
    name = text(value, where)
    if not name.isprintable() or name in ("", "..") or Path(name).name != name:
        raise SurgeryError(f"{where} must name a file in the same folder; got {shown(name)}")
    return name


def file_name(value: Any, where: str) -> str:
    """The same of a safetensors file."""
    name = text(value, where)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors", name):
        raise SurgeryError(
            f"{where} must name a safetensors file in the same folder; got {shown(name)}"
        )
    return name


_SHOWN = 60


def shown(value: Any) -> str:
    """A value in a message: short, whatever it is."""
    if isinstance(value, (dict, list, tuple)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and abs(value) >= _MAX_INT:
        return "an integer of more than 64 bits"
    form = repr(value)
    return form if len(form) <= _SHOWN else f"{form[:_SHOWN]}..."


def counted(count: int, noun: str) -> str:
    """How many of something there are, in a message: `1 site`, `2,000 sites`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
