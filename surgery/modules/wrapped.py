"""Forwards that a library has put on the instance, around the one of the class.

transformers' tensor parallelism does so: `module.forward = tp_forward`, a function that keeps the bound
forward of the class in its closure. The class of an operated module comes too late for that one. So the
function is made again, with the same code, around whatever forward the class has when it is called.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import nn

_ORIGINAL = "_dropconnect_original"

Forward = Callable[..., Any]


def _of_class(module: Any, *args: Any, **kwargs: Any) -> Any:
    return type(module).forward(module, *args, **kwargs)


def rewired(module: nn.Module) -> Forward | None:
    """The function on the instance, made to call the forward of the class that the module has by then;
    None if it is none that keeps the forward of the class in its closure. Changes nothing."""
    forward = module.__dict__.get("forward")
    if hasattr(forward, _ORIGINAL):  # it is one already
        return forward
    cells, found = [], False
    for cell in getattr(forward, "__closure__", None) or ():
        is_forward = _keeps_forward(cell, module)
        cells.append(types.CellType(types.MethodType(_of_class, module)) if is_forward else cell)
        found |= is_forward
    if not found or not isinstance(forward, types.FunctionType):
        return None
    new = types.FunctionType(
        forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, tuple(cells)
    )
    new.__kwdefaults__ = forward.__kwdefaults__
    new.__dict__.update({**forward.__dict__, _ORIGINAL: forward})
    return new


def _keeps_forward(cell: Any, module: nn.Module) -> bool:
    try:
        kept = cell.cell_contents
    except ValueError:  # it is empty
        return False
    if not isinstance(kept, types.MethodType) or kept.__self__ is not module:
        return False
    return kept.__func__ is type(module).forward


def original(module: nn.Module) -> Forward | None:
    """The function that was on the instance before it was rewired; None if none was."""
    return getattr(module.__dict__.get("forward"), _ORIGINAL, None)
