"""The outermost forward that a site is part of: what it is given, and what it returns.

A site may return something that is not a tensor yet (see `surgery.moments`), if a forward above settles
what leaves the model.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..spec.config import DropConnectConfig


class Deferred:
    """Taken for a tensor, but not computed yet."""

    stays = False
    """Whether it leaves the outermost forward as it is."""

    def expectation(self) -> Tensor:
        """The tensor."""
        raise NotImplementedError


def same(u: Tensor) -> Tensor:
    """The identity: what a value is of itself."""
    return u


def hashable(key: Any) -> Any:
    """A key of a dict for the arguments of a view, with slices as tuples; None if an argument (a
    tensor) cannot be part of a key."""
    if isinstance(key, slice):
        return ("slice", key.start, key.stop, key.step)
    if isinstance(key, (tuple, list)):
        parts = [hashable(part) for part in key]
        return None if any(part is None for part in parts) else tuple(parts)
    if key is None:
        return "None"
    return key if isinstance(key, (str, int, float, type(Ellipsis), torch.dtype)) else None


def settle(value: Any) -> Any:
    """`value` with every `Deferred` in it (in tuples, lists, dicts and dataclasses) replaced by its
    expectation. What holds none is returned as it is."""
    if isinstance(value, Deferred):
        return value if value.stays else value.expectation()
    if isinstance(value, dict):
        changed = _changed(value)
        if changed and type(value) is dict:
            return {**value, **changed}
        for key, new in changed.items():  # transformers' outputs keep items and attributes the same
            value[key] = new
        return value
    if isinstance(value, (tuple, list)):
        return _settled_sequence(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _settled_fields(value)
    return value


def _changed(given: dict[Any, Any]) -> dict[Any, Any]:
    """Those items that are others when settled."""
    settled = {key: settle(old) for key, old in given.items()}  # dynamo does not trace `:=` here
    return {key: new for key, new in settled.items() if new is not given[key]}


def _settled_fields(value: Any) -> Any:
    fields = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    changed = _changed(fields)
    if changed:
        value = copy.copy(value)
        for name, new in changed.items():
            object.__setattr__(value, name, new)
    return value


def _settled_sequence(value: Any) -> Any:
    new = [settle(item) for item in value]
    if all(settled is item for settled, item in zip(new, value)):
        return value
    return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)


class _Scope(threading.local):
    """Whether a forward that settles its outputs is running in this thread.

    Both attributes are set in `__init__`, which runs in every thread: compiled graphs have guards
    on the attributes that exist, and an attribute that is added by the first forward would make
    them fail.
    """

    def __init__(self) -> None:
        self.active = False
        self.shapes: tuple[tuple[int, ...], ...] = ()


_scope = _Scope()


def in_scope() -> bool:
    """Whether something above settles what a site returns."""
    return _scope.active


def scope_shapes() -> tuple[tuple[int, ...], ...]:
    """Shapes of the tensors given to the outermost forward; none outside of one."""
    return _scope.shapes


def run_in_scope(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the outermost forward of a model: what it returns is settled."""
    if _scope.active:
        return forward(*args, **kwargs)
    try:
        _scope.active = True
        if not torch.compiler.is_compiling():
            given = (*args, *kwargs.values())
            _scope.shapes = tuple(tuple(one.shape) for one in given if _has_shape(one))
        result = settle(forward(*args, **kwargs))
        _leave()
        return result
    except BaseException:  # not `finally`, which an interrupt can end before it has done anything
        _leave()
        raise


def _leave() -> None:
    _scope.active = False
    _scope.shapes = ()


def _has_shape(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_nested


def needs_scope(config: DropConnectConfig) -> bool:
    """Whether a site must know the outermost forward that it is part of."""
    return config.sampling == "example" or config.inference == "moments"
