"""Raw keys and plain keys of a state dict, and how to get from one to the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from ..spec.names import ANCHOR, RAW, raw_name
from ..spec.plan import join
from ..torch_private.modules import as_state_dict_of
from ..torch_private.wrappers import WRAPPED
from .places import Place, places
from .state import SiteState
from .walk import WRAPPERS

Value = TypeVar("Value")


def plain_keys(model: nn.Module) -> dict[str, str | None]:
    """The plain name of every key that DropConnect adds to `state_dict()`; None for anchors."""
    keys: dict[str, str | None] = {}
    for name, place in _named_places(model):
        keys[join(name, place.state.raw)] = join(name, place.state.name)
        if place.state.anchor is not None:
            keys[join(name, place.state.anchor)] = None
    return keys


def plain_state_dict(
    model: nn.Module, state_dict: Mapping[str, Value] | None = None
) -> dict[str, Tensor | Value]:
    """The state dict with the keys that the model has without DropConnect, in the same order.

    Args:
        model: operated or not; not changed.
        state_dict: a state dict of this model to rename, for example one that was gathered from
            shards; default `model.state_dict()`. Tensors are not copied.
    """
    source: Mapping[str, Any] = model.state_dict() if state_dict is None else state_dict
    keys = plain_keys(model)
    plain = {keys.get(key, key): value for key, value in source.items()}
    return as_state_dict_of(source, {key: v for key, v in plain.items() if key is not None})


def raw_state_dict(model: nn.Module, state_dict: Mapping[str, Value]) -> dict[str, Tensor | Value]:
    """The inverse of `plain_state_dict`: the keys that `model.state_dict()` has, for whatever matches
    keys by itself instead of calling `model.load_state_dict`, which takes plain keys too.

        own = model.state_dict()
        own.update(raw_state_dict(model, torch.load(path)))

    Anchors are not in a plain state dict: with a plain key comes the anchor that `model` has now.
    Keys that are raw already, and keys that belong to no site, stay as they are, and nothing is added
    for a weight that is absent.

    Args:
        model: operated or not; not changed.
        state_dict: a state dict of the model without DropConnect, whole or in part. Tensors are not
            copied.
    """
    known = {join(name, place.state.name): (name, place) for name, place in _named_places(model)}
    raw: dict[str, Any] = {}
    for key, value in state_dict.items():
        name, place = known.get(key, ("", None))
        if place is None or join(name, place.state.raw) in state_dict:
            raw[key] = value
            continue
        raw[join(name, place.state.raw)] = value
        if place.state.anchor is not None and join(name, place.state.anchor) not in state_dict:
            raw[join(name, place.state.anchor)] = place.anchor
    return as_state_dict_of(state_dict, raw)


def state_dict_taken(
    model: nn.Module, state_dict: Mapping[str, Value], keys: Iterable[str]
) -> Mapping[str, Tensor | Value]:
    """A state dict from a file with the keys that `model.state_dict()` has, for what matches keys by
    itself: raw keys of weights that the model does not drop become plain, as by `keys_made_plain`, and
    plain keys of those that it drops become raw, as by `raw_state_dict`.

    Args:
        model: operated or not; not changed. It has the prefixes of the file.
        state_dict: what was read.
        keys: of the whole checkpoint, of which the file may be a part.
    """
    own, there = plain_keys(model), set(keys)
    if not own and not any(key.endswith(RAW) for key in there):
        return state_dict
    made_plain = keys_made_plain(there, plain_state_dict(model))
    foreign = {key: plain for key, plain in made_plain.items() if key not in own}
    taken = {foreign.get(key, key): value for key, value in state_dict.items()}
    known = {key: value for key, value in taken.items() if key is not None}
    return raw_state_dict(model, as_state_dict_of(state_dict, known))


def keys_made_plain(keys: Iterable[str], own: Iterable[str]) -> dict[str, str | None]:
    """The plain name of every raw key of a checkpoint that goes into a plain model; None for anchors.

    Nobody knows which sites it was written of, so this is told by names: `weight_raw` is raw if the
    model has a `weight` somewhere and nothing that is called `weight_raw`.

    Args:
        keys: of the checkpoint. They may have another prefix than those of the model.
        own: the keys of the model.
    """
    there, ends = set(keys), {_end(key) for key in own}
    plain: dict[str, str | None] = {}
    for key in there:
        name = key.removesuffix(RAW)
        if name != key and name not in there and _end(name) in ends and _end(key) not in ends:
            plain[key] = name
    for key in there:
        name = key.removesuffix(ANCHOR)
        if name != key and raw_name(name) in plain and _end(key) not in ends:
            plain[key] = None
    return plain


def _end(key: str) -> str:
    return key.rpartition(".")[2]


def take_plain_keys(
    state_dict: dict[str, Any], prefix: str, states: Iterable[SiteState]
) -> list[SiteState]:
    """Rename, in a state dict that one module loads, the plain keys of its sites to raw ones.

    Args:
        state_dict: changed in place. A plain key beside its raw one is left as it is.
        prefix: of the names of the module's own tensors.
        states: of the module's sites.

    Returns:
        the states of those that were renamed. A plain checkpoint has no anchor for them.
    """
    renamed = []
    for state in states:
        plain, raw = prefix + state.name, prefix + state.raw
        if plain in state_dict and raw not in state_dict:
            state_dict[raw] = state_dict.pop(plain)
            renamed.append(state)
    return renamed


def _named_places(model: nn.Module) -> Iterator[tuple[str, Place]]:
    """Every place under each name that a state dict may give its module: with and without wrappers."""
    outside, inner = "", model
    while type(inner).__name__ in WRAPPERS:
        name, inner = next(iter(inner.named_children()))
        outside += f"{name}."
    for place in places(model, remove_duplicate=False):
        parts = place.name.split(".")
        names = {place.name: None}
        if outside or not WRAPPED.isdisjoint(parts):
            inside = place.name.removeprefix(outside).split(".")
            names |= {".".join(part for part in parts if part not in WRAPPED): None}
            names |= {".".join(part for part in inside if part not in WRAPPED): None}
        for name in names:
            yield name, place
