"""A warning when somebody who was not taught writes raw keys into a file.

A state dict that is written for others should have plain keys, and who writes it by hand or with a
library that is not taught gets raw ones. Functions that write files see keys and no model, so a key
counts as raw if a model that was operated on in this process has a parameter of that name and shape.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..modules.places import places
from ..spec.names import RAW
from ..spec.plan import join

_operated: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_quiet: ContextVar[bool] = ContextVar("_quiet", default=False)


def remember(model: nn.Module) -> None:
    """Note a model that was operated on, for as long as it lives."""
    _operated.add(model)


def forget(model: nn.Module) -> None:
    """Forget one again: its raw keys are what files of it shall have."""
    _operated.discard(model)


def warns_of_raw(save: Callable[..., Any]) -> Callable[..., Any]:
    """For `save(state_dict, file, ...)`: a warning if keys of it are raw. What is no state dict, as the
    whole state of a run, is left alone."""
    signature = inspect.signature(save)

    @functools.wraps(save)
    def better(*args: Any, **kwargs: Any) -> Any:
        given = [*signature.bind(*args, **kwargs).arguments.values()]
        if isinstance(given[0], Mapping) and not _quiet.get():
            _warn(given[0], given[1] if len(given) > 1 else None)
        return save(*args, **kwargs)

    return better


def keeps_raw(save: Callable[..., Any]) -> Callable[..., Any]:
    """For a function that writes the state of a run, which goes on with raw keys: no warning."""

    @functools.wraps(save)
    def better(*args: Any, **kwargs: Any) -> Any:
        with quiet():
            return save(*args, **kwargs)

    return better


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warning meanwhile."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


def _warn(state_dict: Mapping[Any, Any], file: Any) -> None:
    like_raw = {key: value for key, value in state_dict.items() if _may_be_raw(key, value)}
    known = _raw_shapes() if like_raw else set()
    raw = [
        key
        for key, value in like_raw.items()
        if any(value.shape == shape and f".{key}".endswith(f".{name}") for name, shape in known)
    ]
    if raw:
        warnings.warn(
            f"{file if isinstance(file, str) else 'a file'} gets raw keys ({raw[0]!r}; {len(raw)} in "
            "all), which only a model with DropConnect in place loads: write plain_state_dict(model), "
            "or plain_state_dict(model, state_dict), which that model loads as well; "
            "save_dropconnect keeps anchors",
            stacklevel=4,
        )


def _may_be_raw(key: Any, value: Any) -> bool:
    if not (isinstance(key, str) and key.endswith(RAW) and isinstance(value, Tensor)):
        return False
    return not (value.is_nested or is_lazy(value))  # these have no shape


def _raw_shapes() -> set[tuple[str, torch.Size]]:
    """The raw keys of the models that are operated now, and shapes: with the last module of the name
    only, since what is written may be a part of a model, or have it in a part."""
    return {
        (join(place.name.rpartition(".")[2], place.state.raw), place.raw.shape)
        for model in list(_operated)
        for place in places(model)
    }
