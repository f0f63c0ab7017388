"""Run a model and leave no trace: the plain model in evaluation mode, put back exactly."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from surgery.errors import SurgeryError
from surgery.modules.places import places
from surgery.surgeon import suspended

_TABLES = ("_parameters", "_buffers", "_modules")


@contextlib.contextmanager
def untouched(model: nn.Module, *, evaluate: bool = True) -> Iterator[None]:
    """Inside: no gradients, DropConnect out of the way and, if `evaluate`, evaluation mode (the flags
    only: no `train` method is called). Afterwards everything that a forward may have changed is as it
    was: attributes, buffers and their values, training flags, torch's random state. Warnings are not
    shown.

    Raises:
        SurgeryError: the model has uninitialised (lazy) parameters, or TorchScript modules.
    """
    _refuse(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=_devices(model)))
        stack.enter_context(plain(model))
        stack.enter_context(_restored(list(model.modules())))
        stack.enter_context(torch.no_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for module in model.modules() if evaluate else ():
            module.__dict__["training"] = False
        yield


def plain(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Inside, the model has no DropConnect."""
    operated = next(places(model), None) is not None
    return suspended(model) if operated else contextlib.nullcontext()


def _refuse(model: nn.Module) -> None:
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise SurgeryError("its parameters have no shapes yet; run it once on real inputs first")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise SurgeryError(
                f"{name or '(root)'} is a TorchScript module, which cannot be looked into; use the "
                "module that it was made from"
            )


def _devices(model: nn.Module) -> list[int]:
    """Indices of the accelerator devices on which the model may draw random numbers."""
    tensors = (*model.parameters(), *model.buffers())
    return sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})


@contextlib.contextmanager
def _restored(modules: list[nn.Module]) -> Iterator[None]:
    attributes = [dict(module.__dict__) for module in modules]
    tables = [[dict(module.__dict__[name]) for name in _TABLES] for module in modules]
    buffers = [(b, b._version, b.clone()) for m in modules for b in m.buffers(recurse=False)]
    try:
        yield
    finally:
        for module, kept, its_tables in zip(modules, attributes, tables):
            _put_back(module.__dict__, kept)
            for name, table in zip(_TABLES, its_tables):
                _put_back(module.__dict__[name], table)
        for buffer, version, value in buffers:
            _write_back(buffer, version, value)


def _put_back(table: dict[str, Any], kept: dict[str, Any]) -> None:
    """Make a dict what it was, in the same order, keeping the dict object."""
    same = list(table) == list(kept) and all(table[name] is kept[name] for name in kept)
    if not same:
        table.clear()
        table.update(kept)


def _write_back(buffer: Tensor, version: int, value: Tensor) -> None:
    if buffer._version != version:
        with torch.no_grad():
            buffer.copy_(value)
