"""What `writes.py` cuts off: everything that writes files, with the content that a reader finds."""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import surgery.transforms
from surgery import (
    apply_dropconnect,
    bake_checkpoint,
    convert_checkpoint,
    dropconnect_sites,
    load_dropconnect,
    save_dropconnect,
    strip_checkpoint,
)
from surgery.cli.app import app
from surgery.verbs.checkpoint import anchors
from surgery.verbs.raw_files import quiet

from ..checkpoints import raw


@dataclass(frozen=True)
class Write:
    """Something that writes files into a folder."""

    prepare: Callable[[Path], Any]
    """Makes what is in the folder before."""
    work: Callable[[Path], Any]
    read: Callable[[Path], Any]
    """What a reader finds, to be compared; None if there is nothing. Raises if it is damaged."""


@cache
def _model(value: float, toward: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return apply_dropconnect(model, "*" if value > 1 else "0", p=value / 4, toward=toward)


def _saved(folder: Path) -> Any:
    model = load_dropconnect(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), folder)
    return dropconnect_sites(model), {name: one.tolist() for name, one in anchors(model).items()}


@cache
def _checkpoint(shards: int, toward: str) -> Path:
    """A raw checkpoint, made once."""
    return raw.write(raw.operated(toward), Path(tempfile.mkdtemp()) / "raw", shards)


def _copied(shards: int, toward: str) -> Callable[[Path], Any]:
    def copy(folder: Path) -> None:
        shutil.copytree(_checkpoint(shards, toward), folder / "in", dirs_exist_ok=True)

    return copy


def _tensors(path: Path) -> Any:
    if not path.exists():
        return None
    return {
        key: (str(one.dtype), tuple(one.shape), one.view(torch.uint8).numpy().tobytes())
        for key, one in raw.read(path).items()
    }


def _in_place(shards: int, toward: str) -> Write:
    return Write(
        _copied(shards, toward),
        lambda folder: strip_checkpoint(folder / "in"),
        lambda folder: _tensors(folder / "in"),
    )


def _to_out(work: Callable[[Path, Path], Any], shards: int = 2) -> Write:
    def anew(folder: Path) -> None:
        if (folder / "out").exists():
            shutil.rmtree(folder / "out")
        work(folder / "in", folder / "out")

    return Write(_copied(shards, "pretrained"), anew, lambda folder: _tensors(folder / "out"))


def _torch_file(folder: Path) -> None:
    with quiet():
        torch.save(raw.operated().state_dict(), folder / "model.pt")


def _convert(folder: Path) -> None:
    out = folder / "out.safetensors"
    out.unlink(missing_ok=True)
    convert_checkpoint(folder / "model.pt", out, "surgery")


def _command(*words: object) -> None:
    """A command of `surgery`, without what it prints."""
    out = contextlib.redirect_stdout(io.StringIO())
    err = contextlib.redirect_stderr(io.StringIO())
    with out, err:
        app([str(word) for word in words], standalone_mode=False)


def _hash(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


WRITES = {
    "save_dropconnect": Write(
        lambda folder: save_dropconnect(_model(1.0, "pretrained"), folder),
        lambda folder: save_dropconnect(_model(2.0, "pretrained"), folder),
        _saved,
    ),
    "save without anchors": Write(
        lambda folder: save_dropconnect(_model(1.0, "pretrained"), folder),
        lambda folder: save_dropconnect(_model(2.0, "zero"), folder),
        _saved,
    ),
    "strip in place": _in_place(1, "zero"),
    "strip shards in place": _in_place(2, "pretrained"),
    "surgery strip FOLDER": Write(
        _copied(2, "pretrained"),
        lambda folder: _command("strip", folder / "in"),
        lambda folder: _tensors(folder / "in"),
    ),
    "surgery bake FOLDER OUT": _to_out(
        lambda source, out: _command("bake", source, out, "--seed", 1)
    ),
    "strip to OUT": _to_out(strip_checkpoint),
    "bake": _to_out(lambda source, out: bake_checkpoint(source, out, 1)),
    "convert": Write(_torch_file, _convert, lambda folder: _tensors(folder / "out.safetensors")),
    "draw": Write(
        lambda folder: (folder / "model.svg").write_text("old"),
        lambda folder: surgery.transforms.draw(_model(1.0, "zero"), folder / "model.svg"),
        lambda folder: _hash(folder / "model.svg"),
    ),
}
