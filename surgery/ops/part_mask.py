"""The masked weight of a part of a weight, or of a sharded one (a DTensor): the bits of the whole."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from . import gpu
from .cpu import native
from .engine import CHUNK, has_kernels
from .formula import apply_mask
from .hash import advance_key, key_tensor, mix, spread
from .law import Layout, Mask
from .part import Part, part_of


def is_sharded(weight: Any) -> bool:
    """Whether it is a DTensor; told by the name because importing that class is slow."""
    return type(weight).__name__ == "DTensor"


def local_part(weight: Any) -> Tensor:
    """What this process holds of a DTensor."""
    local: Tensor = weight.to_local()
    return local


def local_mask(weight: Any, mask: Mask) -> Mask:
    """The mask of what this process holds of a DTensor."""
    return Mask(mask.key, mask.law, mask.layout.of_part(part_of(weight)))


def local_anchor(anchor: Any, part: Part) -> Tensor | None:
    """What belongs to a part of an anchor, which may be a DTensor that is cut alike or not at all, or
    the whole tensor, or that part already."""
    if anchor is None:
        return None
    local = local_part(anchor) if is_sharded(anchor) else anchor
    if tuple(local.shape) == part.shape:
        return local
    for dim in range(local.ndim):
        if local.shape[dim] != part.shape[dim]:
            local = local.index_select(dim, part.indices(dim, local.device))
    return local


def whole(tensor: Any) -> Tensor:
    """All of a tensor. Of a DTensor, all processes of its mesh have to ask for it together."""
    found: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return found


def spread_as(weight: Any, value: Tensor) -> Tensor:
    """A copy of a whole tensor in the type of `weight`, which has its shape, and with its strides; if
    that is a DTensor, cut alike."""
    if not is_sharded(weight) or is_sharded(value):
        copied: Tensor = weight.detach().clone().copy_(value)
        return copied
    local = local_anchor(value, part_of(weight))
    assert local is not None
    return sharded_as(weight, local_part(weight.detach()).clone().copy_(local))


def sharded_as(weight: Any, local: Tensor) -> Tensor:
    """A DTensor cut as `weight` is, of what this process holds of it."""
    sharded: Tensor = type(weight).from_local(
        local,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )
    return sharded


def drop_part(weight: Tensor, anchor: Tensor | None, mask: Mask) -> Tensor:
    """`A + m * (W - A) / (1 - p)` for a part, in eager code.

    Args:
        weight, anchor: of the shape of the part.
        mask: its layout has the part.

    Returns:
        shape and dtype of the weight, contiguous.
    """
    layout, part = mask.layout, mask.layout.part
    assert part is not None
    rows = part.rows() if layout.mask == layout.view else None
    if rows is None or layout.entries > 1 << 32:
        return _by_formula(weight, anchor, mask)
    weight, anchor = weight.contiguous(), None if anchor is None else anchor.contiguous()
    if native.takes(weight, anchor) and has_kernels("parts"):
        used = torch.empty_like(weight)
        native.drop_rows(weight, anchor, None, used, None, mask, rows)
        return used
    if rows.stride == rows.width or weight.numel() == rows.width:
        moved = Mask(advance_key(mask.key, rows.start), mask.law, _elements(weight.numel()))
        done = gpu.masked(weight, anchor, None, moved)
        if done is not None:
            return done[0]
    return _by_formula(weight, anchor, mask)


_elements = functools.lru_cache(maxsize=4096)(Layout.elements)


def _by_formula(weight: Tensor, anchor: Tensor | None, mask: Mask) -> Tensor:
    """Some rows at a time, so that memory stays bounded."""
    key, law = key_tensor(mask.key, weight.device), mask.law
    places = part_places(mask.layout, weight.device)
    step = max(1, CHUNK * max(1, len(weight)) // max(1, weight.numel())) if weight.ndim else 1
    if weight.ndim == 0 or len(weight) <= step:
        return apply_mask(mix(places, key) >= law.threshold, weight, anchor, law.scale)
    used = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for at in range(0, len(weight), step):
        some = slice(at, at + step)
        keep = mix(places[some] if len(places) > 1 else places, key) >= law.threshold
        towards = None if anchor is None else anchor[some]
        used[some] = apply_mask(keep, weight[some], towards, law.scale)
    return used


def part_places(layout: Layout, device: torch.device) -> Tensor:
    """The spread indices of the mask entries of a part: int32, of as many dimensions as the part, and
    broadcasts with it.

    Raises:
        RuntimeError: the whole weight has over 2**32 entries, whose masks have keys of their own.
    """
    part = layout.part
    assert part is not None
    if layout.entries > 1 << 32:
        raise RuntimeError(
            f"a weight of {layout.entries} entries is too large for the mask of a part of it (at most "
            "2**32): exclude it, or do not shard it"
        )
    own = layout.mask
    if own == layout.view:
        own = part.whole
    elif layout.view != part.whole:  # a view that a few kinds have: small, or seldom
        index = torch.arange(layout.entries, dtype=torch.int64, device=device).view(own)
        index = index.expand(layout.view).reshape(part.whole)
        for dim in range(len(part.whole)):
            index = index.index_select(dim, part.indices(dim, device))
        return spread(index)
    places = torch.zeros((1,) * len(own), dtype=torch.int32, device=device)
    for dim, size in enumerate(own):
        if size > 1:  # `spread` is linear
            along = part.indices(dim, device) * math.prod(own[dim + 1 :])
            places = places + spread(along).view(-1, *(1,) * (len(own) - dim - 1))
    return places


def traced_part(
    weight: Tensor,
    anchor: Tensor | None,
    key: Tensor,
    threshold: Tensor,
    scale: Tensor,
    places: Tensor,
) -> Tensor:
    """The masked weight of a part as plain tensor operations, for a graph. `places`: `part_places`."""
    return apply_mask(mix(places, key) >= threshold, weight, anchor, scale)
