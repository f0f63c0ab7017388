"""State dicts in files that `torch.save` wrote, which may come from anywhere."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from ..spec.errors import SurgeryError
from ..spec.forms import check_regular, shown, text

_NESTED = ("state_dict", "model_state_dict", "model", "module")
"""Under which name a checkpoint of a whole run has the state dict of its model."""

_LARGE = 1 << 28
"""Bytes of a view that a file may always hold: of longer ones, it must have the bytes."""


def load_pickle(path: Path) -> dict[str, Tensor]:
    """The state dict in a file that `torch.save` wrote; its tensors are read when they are used.

    Only tensors and plain containers are read (`weights_only=True`), so that no code in the file runs.

    Raises:
        SurgeryError: it holds something else, or several state dicts, or is damaged.
        OSError: it cannot be read.
    """
    check_regular(path)
    try:
        _check_archive(path)
        form = _load(path)
    except (OSError, SurgeryError):
        raise
    except Exception as error:  # whatever torch makes of such a file
        raise SurgeryError(
            f"{path} is damaged, or holds more than tensors ({type(error).__name__}: {_why(error)}). A "
            "model that was saved whole has to be loaded by its own code: save its state_dict() there"
        ) from error
    state = _state_dict(form, path)
    found = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    size = path.stat().st_size
    for key, tensor in found.items():
        text(key, f"{path}: a key")
        if tensor.layout == torch.strided and not tensor.is_nested:
            needed = tensor.numel() * tensor.element_size()
            if needed > max(size, _LARGE):
                raise SurgeryError(
                    f"{path}: {shown(key)} takes {needed:,} bytes, and the file has {size:,}"
                )
    return found


def _check_archive(path: Path) -> None:
    """Raise `SurgeryError` for an archive that is longer unpacked: torch packs nothing."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
        packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
        if packed or sum(record.file_size for record in records) > path.stat().st_size:
            raise SurgeryError(f"{path} is damaged: its records are packed, as torch packs none")


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the form before torch 1.6, which cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True)


def _why(error: Exception) -> str:
    """What torch says of a file, without the advice around it: to run the code in the file."""
    own = error.__context__ if isinstance(error, UnpicklingError) else None
    lines = [line.strip() for line in str(own or error).splitlines() if line.strip()]
    first = lines[0].partition(" was not an allowed global")[0] if lines else ""
    return first[:200].encode("unicode_escape").decode("ascii")


def _state_dict(form: Any, path: Path) -> Mapping[str, Any]:
    """The state dict that a file holds as it is, or under one of the usual names."""
    if _is_state_dict(form):
        return dict(form)
    if not isinstance(form, Mapping):
        raise SurgeryError(f"{path} holds {type(form).__name__}, and no state dict")
    nested = [name for name in _NESTED if _is_state_dict(form.get(name))]
    if len(nested) > 1:
        raise SurgeryError(
            f"{path} holds a state dict under each of {', '.join(nested)}: save the one that is meant"
        )
    if not nested:
        keys = ", ".join(map(shown, [*form][:6]))
        raise SurgeryError(f"{path} holds the keys {keys}, and no state dict")
    return dict(form[nested[0]])


def _is_state_dict(form: Any) -> bool:
    """Whether it has tensors by name. `_extra_state` and numbers of versions may be among them."""
    if not isinstance(form, Mapping) or not all(isinstance(key, str) for key in form):
        return False
    nested = any(isinstance(value, Mapping) for value in form.values())
    return not nested and any(isinstance(value, Tensor) for value in form.values())
