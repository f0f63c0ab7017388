"""The state of generators that sites have of their own, in the file of the plan."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..modules.own_generator import draw_from, generator_of
from ..modules.places import places
from ..modules.state import SiteState
from ..spec.errors import SurgeryError
from ..spec.forms import each, fields, shown, text
from ..spec.plan import join
from ..stored.tensors import bytes_of

_MAX_STATE = 1 << 16
"""Longest state that is read, in bytes: that of the CPU has 5,056."""


class Kept(NamedTuple):
    """One generator that was saved, as it was then."""

    generator: torch.Generator
    sites: frozenset[str]
    """The names of those that draw from it, also of other users of a tied weight."""


def generators_form(model: nn.Module) -> list[dict[str, Any]]:
    """The generators of the sites of a model as JSON; empty if all draw from torch's own."""
    forms: dict[int, dict[str, Any]] = {}
    for place in places(model):
        generator = generator_of(place.state)
        if generator is not None:
            state = base64.b64encode(b"".join(map(bytes, bytes_of(generator.get_state())))).decode()
            new: dict[str, Any] = {"device": generator.device.type, "state": state, "sites": []}
            form = forms.setdefault(id(generator), new)
            form["sites"].append(join(place.name, place.state.name))
    return list(forms.values())


def _state(value: Any, where: str) -> bytes:
    if not isinstance(value, str) or len(value) > 2 * _MAX_STATE:
        raise SurgeryError(f"{where} must be the state of a generator; got {shown(value)}")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise SurgeryError(f"{where} is no base64: {error}") from None


def read_generator(form: Any, where: str) -> Kept:
    """One of `generators_form`.

    Raises:
        SurgeryError: it is damaged, or its device is not here.
    """
    read = fields(form, where, {"device": text, "state": _state, "sites": each(text)})
    try:
        generator = torch.Generator(read["device"])
        generator.set_state(torch.tensor(list(read["state"]), dtype=torch.uint8))
    except (RuntimeError, TypeError, ValueError) as error:
        device, why = shown(read["device"]), str(error)[:200]
        raise SurgeryError(f"{where} is no state of a generator on {device}: {why}") from error
    return Kept(generator, frozenset(read["sites"]))


def give_generators(states: Iterable[SiteState], kept: Iterable[Kept]) -> None:
    """Let sites that are not in use yet go on drawing as those that were saved.

    Raises:
        SurgeryError: one that was saved is not among them.
    """
    by_name = {state.site: state for state in states}
    for one in kept:
        missing = one.sites - by_name.keys()
        if missing:
            raise SurgeryError(f"the generator of {min(missing)!r} was saved, and it is no site")
        draw_from((by_name[name] for name in one.sites), one.generator)


def set_generators(model: nn.Module, kept: Iterable[Kept]) -> None:
    """Put the generators of the sites of a model into the state of those that were saved.

    Raises:
        SurgeryError: a site's generator was not saved.
    """
    saved = {name: one.generator for one in kept for name in one.sites}
    for place in places(model):
        generator, name = generator_of(place.state), join(place.name, place.state.name)
        if generator is None:
            continue
        if name not in saved or saved[name].device.type != generator.device.type:
            raise SurgeryError(f"no state was saved for the generator of {name!r}")
        generator.set_state(saved[name].get_state())
