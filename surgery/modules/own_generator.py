"""Masks from a generator of their own, which torch's do not see and are not seen by.

The state of such a site is of a class of its own, so that a forward of any other asks nothing more.
Activation checkpoints put torch's own generators back before they run a function again, and no other.
So the keys that are drawn inside of one are noted with it, and the second run takes them from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.hash import Key, draw_key_from, key_tensor
from ..spec.errors import SurgeryError
from ..torch_private.checkpoints import Around, around
from ..torch_private.compiler import constant_in_traces, is_exporting
from ..torch_private.tracing import backward_number, is_capturing, is_traced
from .places import places
from .state import SiteState


def as_generator(generator: Any) -> torch.Generator | None:
    """The generator that an argument means.

    Args:
        generator: a `torch.Generator`, a seed for a new one, or None.

    Raises:
        TypeError: it is something else.
        ValueError: no generator takes this seed.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    if isinstance(generator, bool) or not isinstance(generator, int):
        raise TypeError(f"generator must be a torch.Generator or a seed; got {generator!r}")
    try:
        return torch.Generator().manual_seed(generator)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"generator={generator} is no seed: {error}") from error


class OwnGeneratorState(SiteState):
    """The state of a site whose masks come from a generator of their own."""

    generator: torch.Generator

    def new_key(self, device: torch.device) -> Key:
        """The key of one forward call, from the site's generator.

        Raises:
            RuntimeError: a CUDA graph is captured, or a backward runs the forward again without an
                activation checkpoint of torch.
            SurgeryError: the model is exported, or torch makes no graph of a generator.
        """
        if torch.compiler.is_compiling():
            if is_exporting():
                raise SurgeryError(_not_here(self.site, "torch.export would make it a constant"))
            _prepare_outside()
            return _outside_of_the_graph(self, device)
        if is_capturing():
            raise RuntimeError(
                _not_here(self.site, "each replay of a CUDA graph would have it again")
            )
        if is_traced():  # vmap says itself what it does with random numbers
            try:
                return self._drawn(device)
            except NotImplementedError as error:  # of `make_fx` in torch 2.9
                raise SurgeryError(_not_here(self.site, _NO_GENERATOR)) from error
        found = around()
        key = self._drawn(device) if found.again is None else _again(self.site, found)
        if found.again is None and not found.first:
            if backward_number() != -1:
                raise RuntimeError(_not_here(self.site, _NO_CHECKPOINT))
            return key
        for one in found.first:
            one.__dict__.setdefault(_KEYS, []).append(key)
        return key

    def _drawn(self, device: torch.device) -> Key:
        return draw_key_from(self.generator, device, self.rank())


_KEYS, _TAKEN = "_dropconnect_keys", "_dropconnect_taken"


def _again(site: str, found: Around) -> Key:
    """The next key of those that were drawn when the function of a checkpoint ran first."""
    noted: dict[str, Any] = found.again.__dict__
    taken = noted.setdefault(_TAKEN, {})
    number: int = taken.get(found.run, 0)
    keys: list[Key] = noted.get(_KEYS, [])
    if number == len(keys):
        raise RuntimeError(_not_here(site, _NO_CHECKPOINT))
    taken[found.run] = number + 1
    return keys[number]


_NO_CHECKPOINT = "a backward runs its forward again, by no checkpoint of torch.utils.checkpoint"


_NO_GENERATOR = "this version of torch puts no generator into a graph"


def _not_here(site: str, why: str) -> str:
    return (
        f"{site} has masks from a generator of its own, and {why}. Use torch's generators there: "
        "apply_dropconnect without generator="
    )


def _drawn_eagerly(state: OwnGeneratorState, device: torch.device) -> Tensor:
    return key_tensor(state.new_key(device), device)


_outside_of_the_graph: Callable[[OwnGeneratorState, torch.device], Tensor] = _drawn_eagerly


@constant_in_traces
def _prepare_outside() -> None:
    """Let a compiled graph end where a key is drawn: dynamo traces no generator but torch's own."""
    global _outside_of_the_graph
    # Now, and not at import: this imports dynamo.
    _outside_of_the_graph = torch.compiler.disable(_drawn_eagerly, reason=_WHY)


_WHY = (
    "DropConnect with generator= draws its masks outside of the graph, since torch.compile traces "
    "torch's own generators only. Compile without fullgraph=True, or apply without generator="
)


def draw_from(states: Iterable[SiteState], generator: torch.Generator | None) -> None:
    """Let sites that are not in use yet draw their masks from a generator; None: from torch's own.

    Raises:
        SurgeryError: one draws noise, not masks; nothing is changed.
    """
    if generator is None:
        return
    given = list(states)
    for state in given:
        if state.sampling == "gaussian":
            raise SurgeryError(
                f"{state.site}: sampling='gaussian' draws noise, not masks, and that from torch's own "
                "generator; use sampling='example', or no generator"
            )
    for state in given:
        state.__class__ = OwnGeneratorState
        state.__dict__["generator"] = generator


def generator_of(state: SiteState) -> torch.Generator | None:
    """The generator of a site's own, if it has one."""
    return state.generator if isinstance(state, OwnGeneratorState) else None


def own_generators(model: nn.Module) -> list[torch.Generator]:
    """The generators that sites of a model draw from, beside torch's own: each once, in model order."""
    found = (generator_of(place.state) for place in places(model))
    return list({id(one): one for one in found if one is not None}.values())
