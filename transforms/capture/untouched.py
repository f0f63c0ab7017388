"""Run a model and leave it as it was: it runs plain, in evaluation mode, and is put back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from surgery.base.journal import Result, Step, at_once, restoring
from surgery.modules.places import places
from surgery.operating.suspend import suspended
from surgery.ops.random import default_generators
from surgery.spec.errors import SurgeryError
from surgery.torch_private.modes import switches_back
from surgery.torch_private.tensors import version_of

_TABLES = ("_parameters", "_buffers", "_modules")


def untouched(model: nn.Module, call: Callable[[], Result], *, evaluate: bool = True) -> Result:
    """What `call` returns; it runs without gradients, with DropConnect out of the way and, if
    `evaluate`, in evaluation mode (the flags only: no `train` method is called). Afterwards everything
    that a forward may have changed is as it was: attributes, buffers and their values, training flags,
    torch's random state. Warnings are not shown.

    Raises:
        SurgeryError: the model has uninitialised (lazy) parameters, or TorchScript modules.
    """
    _refuse(model)
    surroundings = at_once(_surroundings(model))

    def run() -> Result:
        return restoring(
            surroundings, lambda: plain(model, lambda: _restored(model, call, evaluate))
        )

    return restoring(switches_back(), run)


def plain(model: nn.Module, call: Callable[[], Result]) -> Result:
    """What `call` returns, with no DropConnect in the model meanwhile."""
    operated = next(places(model), None) is not None
    return suspended(model, call) if operated else call()


def _refuse(model: nn.Module) -> None:
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise SurgeryError("its parameters have no shapes yet; run it once on real inputs first")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise SurgeryError(
                f"{name or '(root)'} is a TorchScript module, which cannot be looked into; use the "
                "module that it was made from"
            )


def _surroundings(model: nn.Module) -> list[Step]:
    """Steps that put back what is not the model's: random states, warnings."""
    generators = default_generators([*model.parameters(), *model.buffers()])
    return [
        *(partial(generator.set_state, generator.get_state()) for generator in generators),
        partial(setattr, warnings, "filters", warnings.filters),
    ]


def _restored(model: nn.Module, call: Callable[[], Result], evaluate: bool) -> Result:
    modules = list(model.modules())
    attributes = [dict(module.__dict__) for module in modules]
    tables = [[dict(module.__dict__[name]) for name in _TABLES] for module in modules]
    buffers = [(b, version_of(b), b.clone()) for m in modules for b in m.buffers(recurse=False)]

    def put_back() -> None:
        for module, kept, its_tables in zip(modules, attributes, tables):
            _put_back(module.__dict__, kept)
            for name, table in zip(_TABLES, its_tables):
                _put_back(module.__dict__[name], table)
        for buffer, version, value in buffers:
            _write_back(buffer, version, value)

    def run() -> Result:
        for module in modules if evaluate else ():
            module.__dict__["training"] = False
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()

    return restoring(put_back, run)


def _put_back(table: dict[str, Any], kept: dict[str, Any]) -> None:
    """Make a dict what it was, in the same order, keeping the dict object."""
    same = list(table) == list(kept) and all(table[name] is kept[name] for name in kept)
    if not same:
        at_once([partial(table.clear), partial(table.update, kept)])()


def _write_back(buffer: Tensor, version: int, value: Tensor) -> None:
    if buffer.is_inference() or version_of(buffer) != version:
        with torch.inference_mode(buffer.is_inference()), torch.no_grad():
            buffer.copy_(value)
