"""Tensors from bytes and into bytes, one at a time.

The library writes only tensors that are all in memory, and needs numpy for it, which torch can do
without.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO

import torch
from torch import Tensor

from ..spec.errors import SurgeryError
from ..spec.forms import shown
from .blocks import BLOCK, read_into, write_all
from .header import DTYPES as _NAMED
from .header import Header, TensorType, encoded, placed

DTYPES: dict[str, torch.dtype] = {
    dtype: getattr(torch, name)
    for dtype, (_, name) in _NAMED.items()
    if name and hasattr(torch, name)
}
"""Those of the format that the installed torch has."""

_OF_TORCH = {dtype: name for name, dtype in DTYPES.items()}

_HALVES = "F4"
"""The format counts its entries, and torch counts bytes: pairs of them along the last dimension."""


def type_of(key: str, tensor: Tensor) -> TensorType:
    """Dtype and shape of a tensor, as a file says them.

    Args:
        key: for messages.

    Raises:
        SurgeryError: a file of this format cannot hold it.
    """
    kind = _unlike(tensor)
    if kind is not None:
        raise SurgeryError(f"{shown(key)} is {kind}, which safetensors does not hold")
    dtype, shape = _OF_TORCH[tensor.dtype], tuple(tensor.shape)
    if dtype == _HALVES:
        shape = (*shape[:-1], 2 * shape[-1]) if shape else (2,)
    return TensorType(dtype, shape)


def _unlike(tensor: Tensor) -> str | None:
    """What a tensor is besides values of one dtype in memory; None if it is nothing."""
    if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return f"a {type(tensor).__name__}"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return f"a tensor of layout {tensor.layout}"
    if tensor.is_quantized:
        return f"quantized ({tensor.dtype}; dequantize() it)"
    if tensor.is_meta:
        return "a meta tensor, of a shape and without values"
    return None if tensor.dtype in _OF_TORCH else str(tensor.dtype)


def read_tensor(file: BinaryIO, header: Header, key: str) -> Tensor:
    """One tensor of a safetensors file that is open; it has memory of its own.

    Raises:
        SurgeryError: torch has no such dtype.
    """
    entry = header.entries[key]
    if entry.dtype not in DTYPES:
        raise SurgeryError(f"{shown(key)} has dtype {entry.dtype}, which torch does not have")
    dtype, shape = DTYPES[entry.dtype], entry.shape
    if entry.dtype == _HALVES:
        if not shape or shape[-1] % 2:
            raise SurgeryError(
                f"{shown(key)} has an odd number of {entry.dtype} in its last dimension"
            )
        shape = (*shape[:-1], shape[-1] // 2)
    if not entry.bytes:
        return torch.empty(shape, dtype=dtype)
    memory = bytearray(entry.bytes)
    read_into(file, header.data_at + entry.start, memoryview(memory))
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


def write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    """Write the bytes of a tensor at the place where a file is."""
    for part in bytes_of(tensor):
        write_all(file, part)


def write_tensors(
    path: str | os.PathLike[str],
    types: Mapping[str, TensorType],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> None:
    """Write a safetensors file; one tensor at a time is asked for.

    Args:
        types: of the tensors, by key.
        read: gives the tensor of a key.
        progress: is told how many more bytes are written.

    Raises:
        SurgeryError: a key is the one that the format keeps for itself.
        OSError: it cannot be written.
    """
    entries = placed(types)
    head = encoded(entries, metadata)
    with open(path, "wb", buffering=0) as file:
        write_all(file, head)
        for key, entry in entries.items():
            write_tensor(file, read(key))
            progress(entry.bytes)


def bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, so many at a time."""
    whole = tensor.detach().resolve_conj().resolve_neg()
    if whole.element_size() == 1:
        whole = whole.view(torch.uint8)  # torch cannot copy all of them as what they are
    whole = whole.contiguous()
    flat = whole.as_strided((whole.numel(),), (1,)).view(
        torch.uint8
    )  # strides of one entry are any
    block = bytearray(BLOCK)
    as_tensor = torch.frombuffer(block, dtype=torch.uint8)
    for part in flat.split(BLOCK):
        as_tensor[: len(part)].copy_(part)
        yield memoryview(block)[: len(part)]


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes, dtypes and bytes: equal if and only if the tensors are."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        for part in bytes_of(tensor):
            total.update(part)
    return total.hexdigest()
