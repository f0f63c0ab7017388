"""A raw checkpoint made plain: headers are written anew, bytes are copied, and no model is made."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..base.files import only_writer
from ..spec.errors import NotOperatedError, SurgeryError
from ..spec.names import RAW
from ..stored.blocks import write_all
from ..stored.header import Entry, Header, TensorType, encoded, placed, read_header
from .copying import Progress, Range, copy, nobody
from .output import finish, in_place, new_checkpoint, remove_unnamed
from .roles import Roles
from .weights import Weights, find_weights, opened, read_weights

Total = Callable[[int], Progress]
"""Is told how many bytes there will be to do, and returns what is told of each part."""


@dataclass(frozen=True)
class Stripped:
    """What `strip_checkpoint` has done."""

    source: Path
    out: Path
    raw: int
    """Keys that have their plain names now."""
    anchors: int
    """Tensors that were left out."""
    files: tuple[str, ...]
    """Names of the files of weights that were written."""
    bytes: int
    """Of the tensors in them."""
    verified: bool
    """Whether every byte was read again and compared."""

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            **vars(self),
            "source": str(self.source),
            "out": str(self.out),
            "files": [*self.files],
        }


def strip_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    verify: bool = True,
    progress: Total = lambda total: nobody,
) -> Stripped:
    """Make a checkpoint with raw keys plain: `weight_raw` becomes `weight`, anchors are left out, and
    all else is as it was, bit for bit: what `strip_dropconnect` and a save would give.

    Takes a few megabytes of memory for a checkpoint of any size, and as much time as a copy of it.
    Whenever it is cut off, the old checkpoint or the new one is whole.

    Args:
        source: a safetensors file, an index of several, or a folder with one checkpoint.
        out: a new file `*.safetensors` or folder, as the source is one. What else lies in a folder
            (config, tokenizer) is copied. None puts the new files in the place of the old ones;
            `dropconnect.json` and its anchors stay there, for runs that are resumed.
        verify: read all that was written again, and compare it with the source.
        progress: called with the number of bytes that are to be done; what it returns is called with
            the number of each part.

    Raises:
        NotOperatedError: no key is raw.
        SurgeryError: there is no checkpoint, a file of it is damaged, both names of a weight are taken,
            `out` cannot be made, or what was written is not what was read.
        OSError: a file cannot be read or written. In all cases the source is as it was.
    """
    path = Path(source)
    with _alone(path, out is None):
        finished = out is None and path.exists() and finish(find_weights(path))
        weights = read_weights(path)
        if out is None and weights.index is not None:
            remove_unnamed(weights.folder)  # the checkpoint is whole without
        roles = Roles(weights.tensors(), weights.plan)
        if not roles.keys("raw") and not finished:
            raise NotOperatedError(f"{path} has no raw keys: it is plain already")
        roles.check()
        files = {name: plain_file(header, roles) for name, header in weights.headers.items()}
        if roles.keys("raw"):
            done = progress(sum(file.bytes for file in files.values()))
            with _target(weights, None if out is None else Path(out)) as (folder, index):
                _write(weights, files, folder, verify, done)
                change_index(index, roles, files)
    kept = {name: file for name, file in files.items() if file.entries}
    target = path if out is None else Path(out)
    return Stripped(
        source=path,
        out=target,
        raw=len(roles.keys("raw")),
        anchors=len(roles.keys("anchor")),
        files=tuple(kept) if out is None or target.is_dir() else (target.name,),
        bytes=sum(file.bytes for file in kept.values()),
        verified=verify,
    )


def _alone(path: Path, changes: bool) -> AbstractContextManager[None]:
    return only_writer(path if path.is_dir() else path.parent) if changes else nullcontext()


@dataclass(frozen=True)
class PlainFile:
    """A file to be written: its first bytes, and which of the old file follow."""

    head: bytes
    entries: Mapping[str, Entry]
    names: Mapping[str, str]
    """From the keys of the old file to plain ones."""
    ranges: list[Range]

    @property
    def bytes(self) -> int:
        """Of its tensors."""
        return sum(entry.bytes for entry in self.entries.values())


def plain_file(header: Header, roles: Roles) -> PlainFile:
    """The plain file in the place of one with this header."""
    names = {key: plain for key in header.entries if (plain := roles.plain(key)) is not None}
    metadata = None if header.metadata is None else _plain_metadata(header.metadata, roles)
    if len(names) == len(header.entries):
        entries = {names[key]: entry for key, entry in header.entries.items()}
        head = encoded(entries, metadata, header.data_at)
        if len(head) == header.data_at:  # the data stay where they are: blocks can be shared
            whole = Range(0, 0, header.data_at + header.bytes)
            return PlainFile(head, entries, names, [whole])
    else:
        old = {names[key]: header.entries[key] for key in names}
        entries = placed(
            {name: TensorType(entry.dtype, entry.shape) for name, entry in old.items()}
        )
        head = encoded(entries, metadata)
    moved = [
        Range(header.data_at + old.start, len(head) + entries[names[key]].start, old.bytes)
        for key, old in header.entries.items()
        if key in names
    ]
    moved.sort(key=lambda one: one.target)
    return PlainFile(head, entries, names, moved)


def _plain_metadata(metadata: Mapping[str, str], roles: Roles) -> dict[str, str]:
    """Metadata as they were, but for names of tied weights: safetensors writes down which key it left
    out, and by which it can be had."""
    plain = {}
    for key, value in metadata.items():
        kept = roles.plain(value)
        if kept is not None:  # else it was a tied anchor
            plain[key.removesuffix(RAW) if kept != value else key] = kept
    return plain


@contextmanager
def _target(weights: Weights, out: Path | None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder to write files into under their names, and the form of the index, to be changed."""
    if out is None:
        with in_place(weights) as found:
            yield found
    else:
        with new_checkpoint(weights, out) as found:
            yield found


def _write(
    weights: Weights,
    files: Mapping[str, PlainFile],
    folder: Path,
    verify: bool,
    progress: Progress,
) -> None:
    for name, file in files.items():
        if not file.entries and weights.index is not None:
            continue  # it held only anchors
        with opened(weights.folder / name) as old, open(folder / name, "wb+", buffering=0) as new:
            copy(old, new, file.ranges, progress, verify)
            new.seek(0)
            write_all(new, file.head)
            _check_header(new, file)


def _check_header(new: BinaryIO, file: PlainFile) -> None:
    """Raise `SurgeryError` unless a reader finds in a new file what should be there."""
    if read_header(new, "what was written").entries != file.entries:
        raise SurgeryError("the header that was written is read as another; nothing was changed")


def change_index(index: dict[str, Any], roles: Roles, files: Mapping[str, PlainFile]) -> None:
    """Let an index name what the new files hold; nothing if there is none."""
    if not index:
        return
    names = {key: roles.plain(key) for key in index["weight_map"]}
    index["weight_map"] = {
        plain: index["weight_map"][key] for key, plain in names.items() if plain is not None
    }
    if "total_size" in index.get("metadata", {}):
        total = sum(file.bytes for file in files.values())
        index["metadata"] = {**index["metadata"], "total_size": total}
