"""Tensors of checkpoints of any form, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spec.errors import SurgeryError
from ..spec.forms import check_regular, read_json, shown, text
from ..stored.header import Header, TensorType
from ..stored.tensors import read_tensor, type_of
from .weights import (
    SAFETENSORS,
    Weights,
    WrongUse,
    check_links,
    find_weights,
    is_pickled_index,
    opened,
    read_weights,
)

_NESTED = ("state_dict", "model_state_dict", "model", "module")
"""Under which name a checkpoint of a whole run has the state dict of its model."""


class Stored(NamedTuple):
    """A tensor that can be read."""

    type: TensorType
    read: Callable[[], Tensor]

    @property
    def dtype(self) -> str:
        """As safetensors names it."""
        return self.type.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """As safetensors counts it."""
        return self.type.shape


def read_tensors(path: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint of any form, by key, in its order.

    Raises:
        WrongUse: there is no checkpoint, or several.
        SurgeryError: a file is damaged, or holds something else.
        OSError: one cannot be read.
    """
    if not path.exists():
        raise WrongUse(f"there is no {path}")
    main = find_weights(path)
    if SAFETENSORS in main.name:
        weights = read_weights(path)
        return stored_tensors(weights)
    files = [main]
    if is_pickled_index(main.name):
        form = read_json(main)
        named = form.get("weight_map") if isinstance(form, dict) else None
        if not isinstance(named, dict) or not all(_is_beside(name) for name in named.values()):
            raise SurgeryError(f"{main} is damaged: it must name files beside it")
        files = [main.parent / name for name in dict.fromkeys(named.values())]
    if path.is_dir():
        check_links(path, [file.name for file in files])
    tensors = {key: tensor for file in files for key, tensor in load_pickle(file).items()}
    return {text(key, "a key"): _stored(key, tensor) for key, tensor in tensors.items()}


def stored_tensors(weights: Weights) -> dict[str, Stored]:
    """The tensors of safetensors files, by key."""
    return {
        key: Stored(
            TensorType(entry.dtype, entry.shape), _reader(weights.folder / name, header, key)
        )
        for name, header in weights.headers.items()
        for key, entry in header.entries.items()
    }


def _is_beside(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and name not in ("", ".", "..")


def _reader(path: Path, header: Header, key: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with opened(path) as file:
            return read_tensor(file, header, key)

    return read


def _stored(key: str, tensor: Tensor) -> Stored:
    return Stored(type_of(key, tensor), lambda: tensor)


def load_pickle(path: Path) -> dict[str, Tensor]:
    """The state dict in a file that `torch.save` wrote; its tensors are read when they are used.

    Only tensors and plain containers are read (`weights_only=True`), so that no code in the file runs.

    Raises:
        SurgeryError: it holds something else, or several state dicts, or is damaged.
        OSError: it cannot be read.
    """
    check_regular(path)
    try:
        form = _load(path)
    except OSError:
        raise
    except Exception as error:  # whatever torch makes of such a file
        why = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
        raise SurgeryError(
            f"{path} is damaged, or holds more than tensors ({type(error).__name__}: {why}). A model "
            "that was saved whole has to be loaded by its own code: save its state_dict() there"
        ) from error
    if isinstance(form, Mapping) and not _is_state_dict(form):
        nested = [name for name in _NESTED if _is_state_dict(form.get(name))]
        form = form[nested[0]] if nested else form
    if not _is_state_dict(form):
        held = (
            f"the keys {shown([*form][:6])}" if isinstance(form, Mapping) else type(form).__name__
        )
        raise SurgeryError(f"{path} holds {held}, and no state dict")
    return {key: value for key, value in form.items() if isinstance(value, Tensor)}


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the form before torch 1.6, which cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True)


def _is_state_dict(form: Any) -> bool:
    """Whether it has tensors by name. `_extra_state` and numbers of versions may be among them."""
    if not isinstance(form, Mapping) or not all(isinstance(key, str) for key in form):
        return False
    nested = any(isinstance(value, Mapping) for value in form.values())
    return not nested and any(isinstance(value, Tensor) for value in form.values())
