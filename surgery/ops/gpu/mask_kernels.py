"""`A + m * (W - A) / (1 - p)`: see `surgery.ops.mask.masked_formula`."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .hash_kernels import before_last, of_batch, words_of
from .numbers_kernels import rounded

HOST_NUMBERS = ["k0", "k1", "key_is_there", "threshold", "law_is_there"]
"""Arguments that are other numbers at each launch: no kernel is compiled for one of them."""


@triton.jit
def kept_and_dropped(
    weight, anchor, index, inside, scale, HAS_ANCHOR: tl.constexpr, WIDE: tl.constexpr
):
    """What is used of entries if they are kept, and if they are dropped: `apply_mask`."""
    kept = tl.load(weight + index, mask=inside, other=0.0).to(WIDE) * scale
    if HAS_ANCHOR:
        dropped = tl.load(anchor + index, mask=inside, other=0.0).to(WIDE)
        return kept + dropped * (1 - scale), dropped
    return kept, tl.zeros_like(kept)


@triton.jit
def law_of(threshold_pointer, scale_pointer, threshold, scale, law_is_there):
    """Threshold and scale: from memory if they are there, else those that the host gave."""
    threshold = tl.load(threshold_pointer, mask=law_is_there != 0, other=threshold)
    if scale_pointer.dtype.element_ty == tl.float64:  # a number of the host would be rounded
        return threshold, tl.load(scale_pointer)
    return threshold, tl.load(scale_pointer, mask=law_is_there != 0, other=scale)


@triton.jit(do_not_specialize=HOST_NUMBERS)
def drop(
    weight,
    anchor,
    grad,
    used,
    of_weight,
    key_pointer,
    threshold_pointer,
    scale_pointer,
    row_pointer,
    k0,
    k1,
    key_is_there,
    threshold,
    scale,
    law_is_there,
    size,
    HAS_ANCHOR: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mask a weight, and a gradient by the same mask, entry by entry.

    Key, threshold and scale are numbers of the host, or in memory: the latter, if `law_is_there` is 2,
    in a table, at the row whose number is in memory.
    """
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    row = tl.load(row_pointer, mask=law_is_there == 2, other=0)
    threshold, scale = law_of(
        threshold_pointer + row, scale_pointer + row, threshold, scale, law_is_there
    )
    kept, dropped = kept_and_dropped(weight, anchor, index, inside, scale, HAS_ANCHOR, WIDE)
    if HAS_GRAD:
        slopes = tl.load(grad + index, mask=inside).to(WIDE)
    k0, k1 = words_of(key_pointer, k0, k1, key_is_there)
    keep = of_batch(before_last(index, k0, k1)) >= threshold
    found = tl.where(keep, kept, dropped)
    tl.store(used + index, rounded(found, used.dtype.element_ty), mask=inside)
    if HAS_GRAD:
        found = tl.where(keep, slopes * scale, 0.0)
        tl.store(of_weight + index, rounded(found, of_weight.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=HOST_NUMBERS)
def drop_shared(
    weight,
    anchor,
    used,
    key_pointer,
    threshold_pointer,
    scale_pointer,
    k0,
    k1,
    key_is_there,
    threshold,
    scale,
    law_is_there,
    size,
    size1,
    size2,
    size3,
    step0,
    step1,
    step2,
    step3,
    HAS_ANCHOR: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mask a weight of four dimensions whose entries share theirs: a step of 0 is shared along."""
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    threshold, scale = law_of(threshold_pointer, scale_pointer, threshold, scale, law_is_there)
    kept, dropped = kept_and_dropped(weight, anchor, index, inside, scale, HAS_ANCHOR, WIDE)
    k0, k1 = words_of(key_pointer, k0, k1, key_is_there)
    rest = index // size3
    entry = (index % size3) * step3 + (rest % size2) * step2
    rest = rest // size2
    entry += (rest % size1) * step1 + (rest // size1) * step0
    keep = of_batch(before_last(entry, k0, k1)) >= threshold
    found = tl.where(keep, kept, dropped)
    tl.store(used + index, rounded(found, used.dtype.element_ty), mask=inside)
