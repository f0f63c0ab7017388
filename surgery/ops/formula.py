"""The definition of every masked weight here, in plain tensor operations:

    W_used = A + m * (W - A) / (1 - p)

W is the weight, A its anchor (zero, or the pretrained weight), m the keep mask, and p the probability
that an entry is dropped. The mask is the hash of `hash.py`, compared with the threshold of a `Law`.
These functions are what is traced and exported. All kernels give the same bits; tests compare them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .hash import mix, spread


def keep_mask(
    shape: tuple[int, ...], key: Tensor, threshold: Tensor, places: Tensor | None = None
) -> Tensor:
    """The keep mask: bool, of that shape, True where kept. Entry i (row-major) has index i.

    Args:
        shape: of the mask.
        key: int32, shape (2,).
        threshold: int32, 0-d, see `Law`.
        places: the spread indices of all entries, if the caller has them already: int32, 1-D.
    """
    if places is None:
        places = spread_indices(math.prod(shape), key.device)
    return (mix(places, key) >= threshold).view(shape)


def spread_indices(entries: int, device: torch.device) -> Tensor:
    """`spread` of the indices 0 to entries - 1: int32, shape (entries,)."""
    return spread(torch.arange(entries, dtype=torch.int32, device=device))


def keep_masks(
    rows: Tensor, columns: Tensor, key: Tensor, threshold: Tensor, multipliers: Tensor
) -> Tensor:
    """The keep masks of some examples: bool, (examples, rows, columns).

    Args:
        rows, columns: the spread indices of the first entry of each row, and of the entries of row 0:
            int32, 1-D. Those of an entry are their sum, since `spread` is linear.
        key: int32, shape (2,).
        threshold: int32, 0-d.
        multipliers: of each example in round 3 of the hash: int32, shape (examples,).
    """
    bits = mix(rows[:, None] + columns, key, multipliers[:, None, None])
    return bits >= threshold


def masked_formula(
    weight: Tensor,
    anchor: Tensor | None,
    key: Tensor,
    threshold: Tensor,
    scale: Tensor,
    mask: tuple[int, ...] | None,
    places: Tensor | None = None,
) -> Tensor:
    """`A + m * (W - A) / (1 - p)`: the definition.

    Args:
        weight: floating point, the shape of a layout's view.
        anchor: the same shape, or None for zero.
        key: int32, shape (2,).
        threshold, scale: 0-d, see `Law`.
        mask: shape of the mask (see `Layout`), or None if it is the weight's own, which has one
            dimension.
        places: see `keep_mask`.

    Returns:
        the weight that is used: shape and dtype of `weight`.
    """
    keep = keep_mask(tuple(weight.shape) if mask is None else mask, key, threshold, places)
    return apply_mask(keep, weight, anchor, scale)


def apply_mask(keep: Tensor, weight: Tensor, anchor: Tensor | None, scale: Tensor) -> Tensor:
    """The formula for a keep mask that exists and broadcasts with the weight. Narrow floats are
    computed in float32 and rounded once."""
    wide = weight.to(scale.dtype) * scale
    if anchor is None:
        return torch.where(keep, wide, torch.zeros_like(scale)).to(weight.dtype)
    towards = anchor.to(scale.dtype)
    return torch.where(keep, wide + towards * (1 - scale), towards).to(weight.dtype)
