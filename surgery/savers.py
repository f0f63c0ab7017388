"""Teach the functions of a library that write or read a model to see the plain model.

A model is often part of a bigger one that surgery never saw (`apply_dropconnect(model.encoder, ...)`),
so it is the function that has to look, not the model. A function that was taught does nothing
different for a model without DropConnect.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from .checkpoint import save_dropconnect
from .keys import plain_state_dict
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


def teach_function(function: Any, how: Callable[[Method], Method]) -> None:
    """Make a module's function do what `how(function)` does, once.

    Others hold the function itself (`from peft import set_peft_model_state_dict`, in a file that
    surgery never sees), so the object stays and gets another body.
    """
    if getattr(function, "taught_by_surgery", False):
        return
    original = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )
    original.__kwdefaults__ = function.__kwdefaults__
    original.__annotations__ = function.__annotations__
    taught = how(original)

    def body(*args: Any, _taught: Method, **kwargs: Any) -> Any:
        return _taught(*args, **kwargs)

    function.__code__, function.__defaults__ = body.__code__, None
    function.__kwdefaults__ = {"_taught": taught}
    function.__wrapped__ = original  # the signature that others see
    function.taught_by_surgery = True


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


def works_plain(function: Method) -> Method:
    """For `function(model, ...)` that finds weights by name, to read or to load them: it finds the
    plain names.

    A `state_dict` argument is renamed. Modules may be added or wrapped: the sites in place are found
    again by their modules.
    """
    signature = inspect.signature(function)
    first = next(iter(signature.parameters))

    def taught(*args: Any, **kwargs: Any) -> Any:
        model: Any = args[0] if args else kwargs.get(first)
        if not _operated(model):
            return function(*args, **kwargs)
        call = signature.bind(*args, **kwargs)
        if call.arguments.get("state_dict") is not None:
            call.arguments["state_dict"] = plain_state_dict(model, call.arguments["state_dict"])
        with _plain_names(model):
            return function(*call.args, **call.kwargs)

    return taught


def resizes_plain(resize: Method) -> Method:
    """For `resize(model, ...)`: the plain model is resized, and the same sites are operated again, also
    where a module was replaced."""
    first = next(iter(inspect.signature(resize).parameters))

    def taught(*args: Any, **kwargs: Any) -> Any:
        model: Any = args[0] if args else kwargs.get(first)
        if not _operated(model):
            return resize(*args, **kwargs)
        with reapplied(model):
            return resize(*args, **kwargs)

    return taught


@contextlib.contextmanager
def _plain_names(model: nn.Module) -> Iterator[None]:
    """The plain model for a while. Where the classes cannot change now (`fully_shard`), only the keys
    of `model.state_dict()` are plain; plain keys load anyway, and plain names read."""
    if can_undo(model):
        with suspended(model):
            yield
        return
    hook = model.register_state_dict_post_hook(_rename)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        hook.remove()


def _rename(model: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    if prefix:  # somebody's `state_dict` of a bigger model
        return
    renamed = plain_state_dict(model, state_dict)
    state_dict.clear()
    state_dict.update(renamed)


def _operated(model: Any) -> bool:
    return isinstance(model, nn.Module) and next(places(model), None) is not None
