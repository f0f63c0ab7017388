"""Tensors of checkpoints of any form, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..spec.errors import SurgeryError
from ..spec.forms import beside, check_links, read_json, shown
from ..stored.header import Header, TensorType
from ..stored.tensors import read_tensor, type_of
from .pickles import load_pickle
from .weights import (
    SAFETENSORS,
    Weights,
    WrongUse,
    find_weights,
    is_pickled_index,
    opened,
    read_weights,
)


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
        if not isinstance(named, dict):
            raise SurgeryError(f"{main} is damaged: it has no weight_map")
        where = f"{main}: weight_map"
        names = dict.fromkeys(beside(name, f"{where}[{shown(key)}]") for key, name in named.items())
        check_links(main.parent, names)
        files = [main.parent / name for name in names]
    tensors = {key: tensor for file in files for key, tensor in load_pickle(file).items()}
    return {key: _stored(key, tensor) for key, tensor in tensors.items()}


def stored_tensors(weights: Weights) -> dict[str, Stored]:
    """The tensors of safetensors files, by key."""
    return {
        key: Stored(
            TensorType(entry.dtype, entry.shape), _reader(weights.folder / name, header, key)
        )
        for name, header in weights.headers.items()
        for key, entry in header.entries.items()
    }


def _reader(path: Path, header: Header, key: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with opened(path) as file:
            return read_tensor(file, header, key)

    return read


def _stored(key: str, tensor: Tensor) -> Stored:
    return Stored(type_of(key, tensor), lambda: tensor)
