"""Which files a checkpoint has: one, or a folder with one, or a folder with several and an index of
them, as transformers, diffusers and others write them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ..spec.errors import SurgeryError
from ..spec.forms import check_links, check_regular, fields, file_name, read_json, shown, text
from ..spec.plan import Plan
from ..spec.saved import PLAN_FILE, are_anchors, read_saved
from ..stored.header import Entry, Header, read_header

SAFETENSORS = ".safetensors"
_INDEX = re.compile(r".*\.safetensors\.index(\.[\w-]+)?\.json", re.DOTALL)
"""An index, also of a variant (`model.safetensors.index.fp16.json`)."""
_PICKLED_INDEX = re.compile(r".*\.bin\.index(\.[\w-]+)?\.json", re.DOTALL)
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""What `torch.save` writes."""
_OTHERS = (*PICKLES, SAFETENSORS, ".h5", ".msgpack", ".gguf", ".onnx", ".pkl")
"""How names of files end that hold weights, or states of a run."""


def is_index(name: str) -> bool:
    """Whether a file of this name says which safetensors files are a checkpoint."""
    return _INDEX.fullmatch(name) is not None


def is_pickled_index(name: str) -> bool:
    """The same of pickles."""
    return _PICKLED_INDEX.fullmatch(name) is not None


def is_of_weights(name: str) -> bool:
    """Whether a file of this name holds weights, or says where these are."""
    return name.endswith(_OTHERS) or is_index(name) or is_pickled_index(name)


class WrongUse(SurgeryError):
    """The call cannot be meant so: the files are not at fault."""


@dataclass(frozen=True)
class Weights:
    """A checkpoint of safetensors files; all their headers are read and checked."""

    path: Path
    """As it was given: a file or a folder."""
    headers: Mapping[str, Header]
    """By file name, in the order in which the index names them."""
    index: Mapping[str, Any] | None
    """The index of several files; None if one file is all."""
    index_name: str
    """The name of its file."""
    plan: Plan | None = field(repr=False)
    """What `dropconnect.json` beside them says; None if there is none."""
    anchors: Mapping[str, str] | None
    """The `"file"` of anchors that belongs to the plan, and its `"sha256"`."""

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self.path if self.path.is_dir() else self.path.parent

    def entries(self) -> Iterator[tuple[str, str, Entry]]:
        """(file name, key, entry) of every tensor."""
        for name, header in self.headers.items():
            for key, entry in header.entries.items():
                yield name, key, entry

    def tensors(self) -> dict[str, tuple[Any, ...]]:
        """Shape and dtype by key, over all files."""
        return {key: (entry.shape, entry.dtype) for _, key, entry in self.entries()}


def find_weights(path: Path) -> Path:
    """The one file that is a checkpoint, or says what its files are.

    Args:
        path: a file, or a folder with safetensors or else with pickles.

    Raises:
        WrongUse: there is none, or several.
        SurgeryError: it is a link that leads out of the folder.
    """
    if not path.is_dir():
        return path
    names = sorted(one.name for one in path.iterdir() if not are_anchors(one.name))
    kinds: tuple[Callable[[str], bool], ...] = (
        is_index,
        lambda name: name.endswith(SAFETENSORS),
        is_pickled_index,
        lambda name: name.endswith(PICKLES) and name not in _OF_TRAINERS,
    )
    for is_one in kinds:
        found = [name for name in names if is_one(name)]
        if len(found) == 1:
            check_links(path, found)
            return path / found[0]
        if found:
            raise WrongUse(
                f"{path} holds {len(found)} checkpoints ({', '.join(found[:4])}, ...) and no index of "
                "them; name one"
            )
    raise WrongUse(f"{path} holds no file of weights")


_OF_TRAINERS = ("optimizer.pt", "scheduler.pt", "scaler.pt", "training_args.bin", "optimizer.bin")
"""Pickles that lie beside weights and are none."""


def read_weights(path: Path) -> Weights:
    """The headers of a checkpoint of safetensors files.

    Raises:
        WrongUse: there is no checkpoint, or several, or it is no safetensors file.
        SurgeryError: a file is damaged, or they do not go together, or a name leads out of the folder.
        OSError: one cannot be read.
    """
    if not path.exists():
        raise WrongUse(f"there is no {path}")
    main = find_weights(path)
    if main.name.endswith(PICKLES) or is_pickled_index(main.name):
        raise WrongUse(
            f"{main} is no safetensors file; `surgery convert` makes one of it (--from surgery, if "
            "surgery was used)"
        )
    index = read_index(main) if is_index(main.name) else None
    names = [main.name] if index is None else list(dict.fromkeys(index["weight_map"].values()))
    check_links(main.parent, [name for name in names if name != main.name])
    headers = {name: _header_of(main.parent / name) for name in names}
    if index is not None:
        _check_index(main, index["weight_map"], headers)
    plan_file = main.parent / PLAN_FILE
    saved = read_saved(plan_file) if plan_file.is_file() else {"plan": None, "anchors": None}
    return Weights(path, headers, index, main.name, saved["plan"], saved["anchors"])


def read_index(path: Path) -> dict[str, Any]:
    """What an index says, its names checked.

    Raises:
        SurgeryError: it is damaged, or names a file that is not beside it.
    """
    form = read_json(path)
    where = str(path)
    if not isinstance(form, dict) or not isinstance(form.get("weight_map"), dict):
        raise SurgeryError(f"{where} is damaged: it has no weight_map")
    for key, name in form["weight_map"].items():
        text(key, f"{where}: a key")
        file_name(name, f"{where}: weight_map[{shown(key)}]")
    if "metadata" in form:
        fields({"metadata": form["metadata"]}, where, {"metadata": _object})
    index_text(form, where)
    return form


def index_text(form: Mapping[str, Any], where: str) -> bytes:
    """An index as it is written. Raises `SurgeryError` if it holds what cannot be."""
    try:
        return (json.dumps(form, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (ValueError, RecursionError) as error:
        raise SurgeryError(f"{where} is damaged: {type(error).__name__}: {error}") from None


def other_indexes(folder: Path, main: str = "") -> Iterator[tuple[Path, dict[str, Any]]]:
    """The indexes in a folder, but for that of a name, and what they say.

    Raises:
        SurgeryError: one is damaged, or a link that leads out of the folder.
    """
    for name in sorted(os.listdir(folder)):
        if is_index(name) and name != main:
            check_links(folder, [name])
            yield folder / name, read_index(folder / name)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SurgeryError(f"{where} must be an object; got {shown(value)}")
    return value


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open to read; never waits for one that is none.

    Raises:
        OSError: it cannot be read.
        SurgeryError: it is not a regular file.
    """
    check_regular(path)
    with open(path, "rb", buffering=0) as file:
        yield file


def _header_of(path: Path) -> Header:
    with opened(path) as file:
        return read_header(file, str(path))


def _check_index(path: Path, weight_map: Mapping[str, str], headers: Mapping[str, Header]) -> None:
    for key, name in weight_map.items():
        if key not in headers[name].entries:
            raise SurgeryError(f"{path} is damaged: {name} does not hold {shown(key)}")
    for name, header in headers.items():
        for key in header.entries:
            if weight_map.get(key) != name:
                raise SurgeryError(
                    f"{path} is damaged: it does not say that {name} holds {shown(key)}"
                )
