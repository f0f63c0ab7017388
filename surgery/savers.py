"""Teach a library's method that writes a model to write the plain model.

A model is often part of a bigger one that surgery never saw (`apply_dropconnect(model.encoder, ...)`),
so it is the saving method that has to look, not the saved object. A method that was taught does
nothing different for a model without DropConnect.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from .checkpoint import plain_state_dict, save_dropconnect
from .modules.places import places
from .surgeon import can_undo, reapplied, suspended

Method = Callable[..., Any]


def teach(owner: type, name: str, how: Callable[[Method], Method]) -> None:
    """Replace the method `owner.name` by `how(method)`, once."""
    method = owner.__dict__[name]
    if getattr(method, "taught_by_surgery", False):
        return
    taught = functools.wraps(method)(how(method))
    taught.taught_by_surgery = True  # type: ignore[attr-defined]
    setattr(owner, name, taught)


def writes_plain(save: Method) -> Method:
    """For `save(model, directory, ...)`: plain keys and classes in what it writes, and beside it the
    files of `save_dropconnect`.

    A `state_dict` argument is renamed. `is_main_process=False` writes nothing of ours.
    """
    signature = inspect.signature(save)

    def taught(model: Any, directory: Any, *args: Any, **kwargs: Any) -> Any:
        if not _operated(model):
            return save(model, directory, *args, **kwargs)
        call = signature.bind(model, directory, *args, **kwargs)
        arguments = call.arguments
        named = "state_dict" in signature.parameters
        holder = arguments if named else arguments.setdefault("kwargs", {})
        given = holder.get("state_dict")
        if can_undo(model):
            if given is not None:
                holder["state_dict"] = plain_state_dict(model, given)
            with suspended(model):
                result = save(*call.args, **call.kwargs)
        else:  # sharded by fully_shard: the classes cannot change now, but the keys can
            holder["state_dict"] = plain_state_dict(model, given)
            result = save(*call.args, **call.kwargs)
        if arguments.get("is_main_process", True):
            save_dropconnect(model, directory)
        return result

    return taught


def resizes_plain(resize: Method) -> Method:
    """For `resize(model, ...)`: the plain model is resized, and the same sites are operated again, also
    where a module was replaced."""

    def taught(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not _operated(model):
            return resize(model, *args, **kwargs)
        with reapplied(model):
            return resize(model, *args, **kwargs)

    return taught


def _operated(model: Any) -> bool:
    return next(places(model), None) is not None
