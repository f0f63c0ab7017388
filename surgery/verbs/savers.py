"""Teach the functions of a library that write or read a model to see the plain model.

A model is often part of a bigger one that surgery never saw (`apply_dropconnect(model.encoder, ...)`),
so it is the function that has to look, not the model. A function that was taught does nothing
different for a model without DropConnect.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import json
import os
import types
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import nn

from ..base.journal import at_once, content, restoring
from ..modules.keys import keys_made_plain, plain_keys, plain_state_dict, state_dict_taken
from ..modules.places import places
from ..modules.walk import unwrapped
from ..operating.surgeon import can_undo
from ..operating.suspend import reapplied, suspended
from ..torch_private.modules import hooks_after_saving
from .checkpoint import open_tensors, save_dropconnect, shares_anchors

Method = Callable[..., Any]
Result = TypeVar("Result")


taught: dict[str, None] = {}
"""The full names of what was taught in this process, in order."""
_reading: ContextVar[nn.Module | None] = ContextVar("_reading", default=None)
"""The model into which a loader that was taught reads a file now."""
_resuming: ContextVar[bool] = ContextVar("_resuming", default=False)
"""Whether the state of a run is read now."""


def teach(owner: type, name: str, how: Callable[[Method], Method]) -> None:
    """Replace the method `owner.name` by `how(method)`, once. A class method or a static one stays one,
    and `how` gets the function in it."""
    found = owner.__dict__[name]
    kind = type(found) if isinstance(found, (classmethod, staticmethod)) else None
    method: Any = found if kind is None else found.__func__
    if getattr(method, "taught_by_surgery", False):
        return
    better = functools.wraps(method)(how(method))
    better.taught_by_surgery = True  # type: ignore[attr-defined]
    setattr(owner, name, better if kind is None else kind(better))
    taught[f"{owner.__module__}.{owner.__qualname__}.{name}"] = None


def is_taught(thing: Any, name: str) -> bool:
    """Whether a method of `thing` is one that was taught."""
    return getattr(getattr(type(thing), name, None), "taught_by_surgery", False)


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
    better = how(original)

    def body(*args: Any, _taught: Method, **kwargs: Any) -> Any:
        return _taught(*args, **kwargs)

    function.__code__, function.__defaults__ = body.__code__, None
    function.__kwdefaults__ = {"_taught": better}
    function.__wrapped__ = original  # the signature that others see
    function.taught_by_surgery = True
    taught[f"{function.__module__}.{function.__qualname__}"] = None


def works_plain(function: Method) -> Method:
    """For `function(model, ...)` that finds weights by name, to write or to load them: it finds the
    plain names.

    A `state_dict` argument is renamed. Modules may be added or wrapped: the sites in place are found
    again by their modules.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def better(*args: Any, **kwargs: Any) -> Any:
        model = _argument(signature, 0, args, kwargs)
        if not is_operated(model):
            return function(*args, **kwargs)
        call = _renamed(signature.bind(*args, **kwargs), model)
        return with_plain_names(model, partial(function, *call.args, **call.kwargs))

    return better


def reads_file(load: Method, model_at: int = 0) -> Method:
    """For `load(model, path, ...)` that matches keys by itself: a file, an index of files or a folder
    with plain keys is read into the plain model, as by `works_plain`, and one with raw keys of its
    sites into the operated model as it is. Whatever it reads meanwhile by a function that
    `gives_keys_taken` has taught has the keys that the model has.

    Args:
        model_at: which argument is the model; the path comes next.
    """
    signature = inspect.signature(load)

    @functools.wraps(load)
    def better(*args: Any, **kwargs: Any) -> Any:
        model = _argument(signature, model_at, args, kwargs)

        def call() -> Any:
            token = _reading.set(None if _resuming.get() else model)
            try:
                return load(*args, **kwargs)
            finally:
                _reading.reset(token)

        if is_operated(model):
            path = _argument(signature, model_at + 1, args, kwargs)
            if plain_keys(model).keys().isdisjoint(stored_keys(path)):
                return with_plain_names(model, call)
        return call()

    return better


def resumes(load: Method) -> Method:
    """For a function that reads the state of a run: its keys are as they are, so that a strict loader
    refuses a model which does not drop what that run did."""

    @functools.wraps(load)
    def better(*args: Any, **kwargs: Any) -> Any:
        token = _resuming.set(True)
        try:
            return load(*args, **kwargs)
        finally:
            _resuming.reset(token)

    return better


def gives_keys_taken(read: Method) -> Method:
    """For `read(file, ...)` of a state dict: nothing, but while a function that `reads_file` has taught
    loads a model, for which the state dict has the keys of that model."""

    @functools.wraps(read)
    def better(*args: Any, **kwargs: Any) -> Any:
        state, model = read(*args, **kwargs), _reading.get()
        if model is None or not (
            isinstance(state, Mapping) and all(isinstance(key, str) for key in state)
        ):
            return state
        return state_dict_taken(model, state, state.keys() | _keys_with(next(iter(args), None)))

    return better


def _keys_with(file: Any) -> set[str]:
    """The keys of the checkpoint of which a file is a part, if an index beside it says so: an anchor
    can be in another part than its weight."""
    with contextlib.suppress(Exception):
        path = Path(file)
        for index in path.parent.glob("*.index.json"):
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            if path.name in files.values():
                return set(files)
    return set()


def writes_plain(save: Method, model_at: int = 0) -> Method:
    """For `save(model, directory, ...)`: plain keys and classes in what it writes, and beside it the
    files of `save_dropconnect`.

    A `state_dict` argument is renamed. Processes that are not the main one, as an argument or the
    object that saves says, write nothing of ours.

    Args:
        model_at: which argument is the model; the directory comes next.
    """
    signature = inspect.signature(save)

    @functools.wraps(save)
    def better(*args: Any, **kwargs: Any) -> Any:
        model = _argument(signature, model_at, args, kwargs)
        if not is_operated(model):
            return save(*args, **kwargs)
        call = _renamed(signature.bind(*args, **kwargs), model)
        directory = _argument(signature, model_at + 1, args, kwargs)
        saver = next(iter(call.arguments.values()))
        main = getattr(saver, "is_main_process", True) if model_at else True
        writes = call.arguments.get("is_main_process", main) or shares_anchors(model)
        if writes and not os.path.isfile(directory):
            save_dropconnect(unwrapped(model), directory)  # weights are never without their plan
        return with_plain_names(model, partial(save, *call.args, **call.kwargs))

    return better


def resizes_plain(resize: Method) -> Method:
    """For `resize(model, ...)`: the plain model is resized, and the same sites are operated again, also
    where a module was replaced."""
    signature = inspect.signature(resize)

    @functools.wraps(resize)
    def better(*args: Any, **kwargs: Any) -> Any:
        model = _argument(signature, 0, args, kwargs)
        if not is_operated(model):
            return resize(*args, **kwargs)
        return reapplied(model, partial(resize, *args, **kwargs))

    return better


def takes_raw(load: Method, model_at: int = 0) -> Method:
    """For `load(model, state_dict, ...)` that drops keys which the plain model does not have: raw keys
    are loaded under their plain names.

    Args:
        model_at: which argument is the model; the state dict comes next.
    """
    signature = inspect.signature(load)

    @functools.wraps(load)
    def better(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        model, state = [*call.signature.parameters][model_at : model_at + 2]
        given = call.arguments[state]
        plain = keys_made_plain(given, plain_state_dict(call.arguments[model]))
        call.arguments[state] = {
            plain.get(key, key): value
            for key, value in given.items()
            if plain.get(key, key) is not None
        }
        return load(*call.args, **call.kwargs)

    return better


def pairs_tensors(function: Method) -> Method:
    """For `update(average, model)`, which pairs the tensors of two models by their order: anchors are
    left out of both, since one of the two may not have them, and they are nothing to average."""

    @functools.wraps(function)
    def better(*args: Any, **kwargs: Any) -> Any:
        models = [one for one in (*args, *kwargs.values()) if isinstance(one, nn.Module)]
        return without_anchors(models, partial(function, *args, **kwargs))

    return better


def without_anchors(models: Iterable[nn.Module], call: Callable[[], Result]) -> Result:
    """What `call` returns, with no anchor among the buffers of these models meanwhile. No forward may
    run."""
    anchored = [
        (place.owner._buffers, place.state.anchor)
        for model in models
        for place in places(model)
        if place.state.anchor is not None
    ]
    if not anchored:
        return call()

    def while_without() -> Result:
        for buffers, name in anchored:
            buffers.pop(name, None)
        return call()

    before = [content(buffers) for buffers, _ in anchored]
    return restoring(at_once(itertools.chain.from_iterable(before)), while_without)


def _argument(signature: inspect.Signature, index: int, args: Any, kwargs: Any) -> Any:
    """One argument of a call, by place or by name; None if it is missing."""
    if index < len(args):
        return args[index]
    return kwargs.get(list(signature.parameters)[index])


def _renamed(call: inspect.BoundArguments, model: nn.Module) -> inspect.BoundArguments:
    """The call with plain keys in its `state_dict`, if it has one."""
    rest = [p.name for p in call.signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    for given in (call.arguments, *(call.arguments.get(name, {}) for name in rest)):
        if given.get("state_dict") is not None:
            given["state_dict"] = plain_state_dict(model, given["state_dict"])
    return call


def stored_keys(path: Any) -> set[str]:
    """The keys of a checkpoint; none if it cannot be read, which the loader will say."""
    keys: set[str] = set()
    with contextlib.suppress(Exception):
        folder = Path(path)
        files = [folder]
        if folder.is_dir():
            files = [*folder.glob("*.index.json")] or [*folder.glob("*.safetensors")]
            files = files or [*folder.glob("*.bin")]
        for file in files:
            keys |= _keys_of_file(file)
    return keys


def _keys_of_file(file: Path) -> set[str]:
    if file.suffix == ".json":
        return set(json.loads(file.read_text(encoding="utf-8"))["weight_map"])
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as stored:
            return set(stored.keys())
    return set(torch.load(file, map_location="meta", weights_only=True))


def with_plain_names(model: nn.Module, call: Callable[[], Any]) -> Any:
    """What `call` returns, with the model plain meanwhile. Where the classes cannot change now
    (`fully_shard`), only the keys of `state_dict()` are plain; plain keys load anyway, and plain names
    read."""
    if can_undo(model):
        return suspended(model, call)
    owners = {id(place.owner): place.owner for place in places(model)}

    def while_renamed() -> Any:
        for owner in owners.values():
            owner.register_state_dict_post_hook(_rename_own)
        return call()

    before = [content(hooks_after_saving(owner)) for owner in owners.values()]
    return restoring(at_once(itertools.chain.from_iterable(before)), while_renamed)


def _rename_own(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    """Make the keys of one operated module plain. It has been written last, so they end the dict."""
    names = {prefix + key: plain for key, plain in plain_keys(module).items()}
    last = [*itertools.takewhile(lambda key: key.startswith(prefix), reversed(state_dict))]
    for key in reversed(last):
        value, plain = state_dict.pop(key), names.get(key, key)
        if plain is not None:
            state_dict[prefix + plain if key in names else key] = value


def is_operated(model: Any) -> bool:
    """Whether there is DropConnect in a model."""
    return isinstance(model, nn.Module) and next(places(model), None) is not None


def holds(file: Path, tensors: Mapping[str, Any]) -> bool:
    """Whether a safetensors file is there and all that it holds is among `tensors`, bit for bit."""
    if not file.is_file():
        return False
    with open_tensors(file) as stored:
        return all(
            name in tensors and _is_equal(stored, name, tensors[name])
            for name in stored.keys()  # noqa: SIM118
        )


def _is_equal(stored: Any, name: str, tensor: Any) -> bool:
    if stored.get_slice(name).get_shape() != list(tensor.shape):
        return False
    return torch.equal(stored.get_tensor(name), tensor.cpu())
