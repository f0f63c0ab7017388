"""Checkpoints of other libraries that drop weights, made plain."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..stored.tensors import write_tensors
from .conventions import looks_raw, renaming
from .copying import nobody
from .output import copy_companions, is_file, new_file, new_folder
from .strip import Total
from .tensors import Stored, read_tensors


@dataclass(frozen=True)
class Converted:
    """What `convert_checkpoint` has done."""

    source: Path
    out: Path
    convention: str
    renamed: dict[str, str]
    """From old keys to new ones, where these differ."""
    left_out: dict[str, str]
    """Keys that the plain model does not have, and why."""
    unmatched: tuple[str, ...]
    """Keys that are as they were, although no plain module has such."""
    tensors: int
    """How many were written."""

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        own = {"source": str(self.source), "out": str(self.out), "unmatched": [*self.unmatched]}
        return {**vars(self), **own}


def convert_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    convention: str,
    *,
    progress: Total = lambda total: nobody,
) -> Converted:
    """Write a checkpoint of another library under the names that the plain modules of torch have.

    The weights are those that are stored. (`probly` trains without the factor 1 / (1 - p), and scales
    its weights by 1 - p in `eval()`; the plain model does not.)

    Args:
        source: a file that `torch.save` or safetensors wrote, an index of several, or a folder with one
            checkpoint. Pickles are read with `weights_only=True`.
        out: a new file `*.safetensors`; or a new folder, if `source` is one. What else lies in the
            folder is copied.
        convention: whose names they are: `"torchnlp"`, `"awd-lstm"`, `"fastai"`, `"parametrize"`,
            `"mixout"`, `"probly"`, or `"surgery"` for raw keys in a pickle.
        progress: see `strip_checkpoint`.

    Raises:
        ValueError: there is no such convention.
        SurgeryError: no key follows it, two keys would have one name, or a file is damaged or holds
            more than tensors.
        OSError: a file cannot be read or written.
    """
    path, target = Path(source), Path(out)
    stored = read_tensors(path)
    found = renaming(convention, {key: one.shape for key, one in stored.items()})
    copies = {
        key: f"the same as {other}"
        for key, other in found.copies.items()
        if torch.equal(stored[key].read(), stored[other].read())
    }
    left_out = {**found.left_out, **copies}
    kept = {found.names.get(key, key): one for key, one in stored.items() if key not in left_out}
    with _target(path, target) as file:
        _write(file, kept, progress)
    return Converted(
        source=path,
        out=target,
        convention=convention,
        renamed={key: new for key, new in found.names.items() if key != new},
        left_out=left_out,
        unmatched=tuple(key for key in kept if looks_raw(key)),
        tensors=len(kept),
    )


@contextmanager
def _target(source: Path, out: Path) -> Iterator[Path]:
    """The path of the file to write."""
    if is_file(out, source.is_dir()):
        with new_file(out) as folder:
            yield folder / out.name
    else:
        with new_folder(out) as folder:
            yield folder / "model.safetensors"
            copy_companions(source, folder)


def _write(path: Path, tensors: dict[str, Stored], progress: Total) -> None:
    types = {key: one.type for key, one in tensors.items()}
    done = progress(sum(one.bytes for one in types.values()))
    write_tensors(path, types, lambda key: tensors[key].read(), {"format": "pt"}, done)
