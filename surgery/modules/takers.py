"""Functions of torch and others that replace a weight: quantisers, pruning, norms.

They find a layer by its class or in its `_parameters`. They would skip an operated layer without a
word, or fail on it when the work is half done. The first thing that each of them does is noticed here,
and refused.
"""

from __future__ import annotations

import sys
from inspect import getattr_static, unwrap
from types import CodeType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.weight_norm import WeightNorm

from ..kinds import derived
from ..spec.errors import SurgeryError
from .state import SiteState

_TAKES: dict[CodeType, str] = {
    unwrap(function).__code__: what
    for function, what in (
        (getattr_static(BasePruningMethod, "apply").__func__, "pruning"),
        (WeightNorm.apply, "weight_norm"),
    )
}
"""Functions that read a weight in order to replace it, and what they do."""


def refuse_taking(reader: CodeType, state: SiteState) -> None:
    """Raise `SurgeryError` if the function that reads a weight would replace it."""
    what = _TAKES.get(reader)
    if what is not None:
        _refuse(state.site, what)


def refuse_quantised(state: SiteState, parameter: Any) -> None:
    """Raise `SurgeryError` if the parameter that a weight is to be replaced by cannot be dropped."""
    if not isinstance(parameter, Tensor):
        return
    if not parameter.is_floating_point() or _is_packed(parameter):
        _refuse(state.site, f"replacing it by a {type(parameter).__name__} of {parameter.dtype}")


def _is_packed(parameter: Tensor) -> bool:
    """Whether a parameter is a tensor of another library that keeps its values in others, as torchao's
    are. Torch's own (sharded, or of a trace) are somebody else's matter."""
    cls = type(parameter)
    return hasattr(cls, "__tensor_flatten__") and not cls.__module__.startswith("torch.")


class Qconfig:
    """The attribute that torch's quantisation sets first, on every module. It would then look for the
    classes that it knows."""

    def __get__(self, module: nn.Module | None, owner: type) -> Any:
        if module is None or "qconfig" not in module.__dict__:
            raise AttributeError("qconfig")
        return module.__dict__["qconfig"]

    def __set__(self, module: Any, value: Any) -> None:
        for state in module._dropconnect.values():
            _refuse(state.site, "quantisation")
        module.__dict__["qconfig"] = value

    def __delete__(self, module: nn.Module) -> None:
        if module.__dict__.pop("qconfig", self) is self:
            raise AttributeError("qconfig")


class Parametrizations:
    """What `register_parametrization` asks for first, before it looks for the weight. A module's own is
    among its children, where `nn.Module` finds it."""

    def __get__(self, module: Any, owner: type) -> Any:
        if module is not None and not torch.compiler.is_compiling():
            caller = sys._getframe(1).f_back
            if caller is not None and caller.f_code is _PARAMETRIZE:
                state = module._dropconnect.get(caller.f_locals.get("tensor_name"))
                if state is not None:
                    _refuse(state.site, "a parametrization")
        raise AttributeError("parametrizations")


_PARAMETRIZE = parametrize.register_parametrization.__code__


def taken(module: nn.Module, state: SiteState) -> str:
    """Who has taken the raw parameter of a site that is not there any more, and what to do."""
    if getattr(module, state.raw, None) is None:
        return f"{state.site}: {state.raw!r} was deleted after apply; put it back first"
    return f"{state.site}: {state.raw!r} is computed from others; {derived.fix(module, state.raw)}"


def _refuse(site: str, what: str) -> NoReturn:
    raise SurgeryError(
        f"{site}: DropConnect is in place, and {what} would take its weight away; call "
        "strip_dropconnect first. The module is as it was"
    )
