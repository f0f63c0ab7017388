"""Tensors from files and into files, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..spec.errors import SurgeryError
from ..spec.forms import check_regular, read_json, shown
from .copying import BLOCK, read_into, write_all
from .header import Header
from .weights import (
    SAFETENSORS,
    Weights,
    WrongUse,
    check_links,
    find_weights,
    opened,
    read_weights,
)

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    **{"BOOL": torch.bool, "C64": torch.complex64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{"F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz},
}
"""Those of `header.BITS` that torch has."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_NESTED = ("state_dict", "model_state_dict", "model", "module")
"""Under which name a checkpoint of a whole run has the state dict of its model."""


class Stored(NamedTuple):
    """A tensor that can be read."""

    dtype: str
    """A key of `header.BITS`."""
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


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
    if main.name.endswith(".index.json"):
        form = read_json(main)
        named = form.get("weight_map") if isinstance(form, dict) else None
        if not isinstance(named, dict) or not all(_is_beside(name) for name in named.values()):
            raise SurgeryError(f"{main} is damaged: it must name files beside it")
        files = [main.parent / name for name in dict.fromkeys(named.values())]
    if path.is_dir():
        check_links(path, [file.name for file in files])
    tensors = {key: tensor for file in files for key, tensor in load_pickle(file).items()}
    return {key: _stored(key, tensor) for key, tensor in tensors.items()}


def stored_tensors(weights: Weights) -> dict[str, Stored]:
    """The tensors of safetensors files, by key."""
    return {
        key: Stored(entry.dtype, entry.shape, _reader(weights.folder / name, header, key))
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
    if tensor.dtype not in _NAMES or tensor.layout != torch.strided:
        kind = f"{tensor.dtype}, {tensor.layout}"
        raise SurgeryError(f"{shown(key)} is {kind}, which safetensors does not hold")
    return Stored(_NAMES[tensor.dtype], tuple(tensor.shape), lambda: tensor)


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


def read_tensor(file: BinaryIO, header: Header, key: str) -> Tensor:
    """One tensor of a safetensors file that is open; it has memory of its own.

    Raises:
        SurgeryError: torch has no such dtype.
    """
    entry = header.entries[key]
    if entry.dtype not in DTYPES:
        raise SurgeryError(f"{shown(key)} has dtype {entry.dtype}, which torch does not have")
    if not entry.bytes:
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    memory = bytearray(entry.bytes)
    read_into(file, header.data_at + entry.start, memoryview(memory))
    return torch.frombuffer(memory, dtype=DTYPES[entry.dtype]).view(entry.shape)


def write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    """Write the bytes of a tensor at the place where a file is."""
    for part in _parts(tensor):
        write_all(file, part)


def _parts(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, so many at a time. numpy may not be there."""
    whole = tensor.detach().resolve_conj().resolve_neg().contiguous()
    flat = whole.as_strided((whole.numel(),), (1,)).view(
        torch.uint8
    )  # strides of one entry are any
    block = bytearray(BLOCK)
    as_tensor = torch.frombuffer(block, dtype=torch.uint8)
    for part in flat.split(BLOCK):
        as_tensor[: len(part)].copy_(part)
        yield memoryview(block)[: len(part)]
