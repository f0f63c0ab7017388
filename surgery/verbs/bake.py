"""One mask made permanent."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..modules.masking import check_anchor
from ..modules.places import Place, places
from ..operating.surgeon import undo
from ..ops import drop_weight, release
from ..ops.hash import key_from_seed
from ..ops.part_mask import is_sharded
from ..spec.errors import NotOperatedError, raise_all
from ..spec.plan import join
from ..torch_private.modes import outside_of_inference

Model = TypeVar("Model", bound=nn.Module)


def bake_dropconnect(
    model: Model, seed: int | None = None, *, generator: torch.Generator | None = None
) -> Model:
    """Draw one mask for each site, make it permanent in the weights, and take DropConnect out.

    Every weight becomes `A + m * (W - A) / (1 - p)` for one keep mask `m`: zeros where `toward="zero"`.
    With `toward="pretrained"` this is DARE, which drops a part of what fine-tuning changed and rescales
    the rest (Yu et al. 2023, arXiv 2311.03099, equation 1). The mask of a site depends on the seed and
    on the name of the site alone, so that processes with one seed bake alike, and a file
    (`surgery.bake_checkpoint`) as the model does.

    Args:
        model: operated; of `sampling="example"`, the mask of the first example is taken.
        seed: of the masks.
        generator: of torch, from which the seed is drawn instead; by default from the global one.

    Returns:
        the same model, plain, with the same `Parameter` objects in the memory of the new values.

    Raises:
        NotOperatedError: no DropConnect is in place.
        SurgeryError: a site has `sampling="gaussian"`, which draws no masks, or cannot be made plain
            now (see `strip_dropconnect`); the model is as it was.
        ValueError: both a seed and a generator are given.
        TypeError: the seed is no integer.
    """
    if seed is not None and generator is not None:
        raise ValueError("give a seed or a generator, not both")
    if seed is None:
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=_device(generator)))
    check_seed(seed)
    at = list(places(model))
    if not at:
        raise NotOperatedError(f"{type(model).__name__} has no DropConnect in place to bake")
    raise_all(_no_masks(at), "bake")
    with outside_of_inference():  # the model can be trained afterwards
        values = list(_baked(at, seed))
    undo(model, values=values)
    release()
    return model


def check_seed(seed: Any) -> int:
    """The seed, or a `TypeError`: of what is no integer another process would make other masks."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer; got {type(seed).__name__}")
    return seed


def baked_key(seed: int, name: str) -> Tensor:
    """The key of the mask that is baked into a site: int32, shape (2,).

    Args:
        name: of the site; of a bias that has the mask of its weight, that one's.
    """
    hashed = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return key_from_seed(int.from_bytes(hashed[:8], "little"))


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


def _no_masks(at: list[Place]) -> Iterator[str]:
    for place in at:
        state = place.state
        if state.sampling == "gaussian":
            yield f"{state.site}: sampling='gaussian' draws noise, which has no mask to bake"
        elif is_sharded(place.raw):
            yield f"{state.site}: it is sharded (a DTensor); gather it first"


def _baked(at: list[Place], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Each raw parameter once, and its new value. The first of its places names the site."""
    names: dict[int, str] = {}
    for place in at:
        names.setdefault(id(place.raw), join(place.name, place.state.name))
    weights: dict[Any, Tensor] = {(id(place.owner), place.state.name): place.raw for place in at}
    for place in at:
        raw, state = place.raw, place.state
        if names.get(id(raw)) != join(place.name, state.name):
            continue
        check_anchor(state, raw, place.anchor)
        of = weights.get((id(place.owner), state.follows), raw)
        law = state.law_for(raw, keep=False)
        key = baked_key(seed, names[id(of)])
        yield raw, drop_weight(raw.detach(), key, law, state.layout, place.anchor)
