"""`x_e @ W_e^T` with a masked weight for each example, and its gradients: see
`surgery.ops.example_product`.

Sums are kept in float32 (float64 for float64). All tensors are contiguous; `rows` are the rows of all
examples, of which each has `EACH`.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .hash_kernels import before_last, for_examples, multipliers, of_example, words_of
from .mask_kernels import HOST_NUMBERS, kept_and_dropped, law_of
from .numbers_kernels import rounded


@triton.jit(do_not_specialize=[*HOST_NUMBERS, "rows"])
def product(
    x,
    weight,
    anchor,
    bias,
    found,
    key_pointer,
    threshold_pointer,
    scale_pointer,
    k0,
    k1,
    key_is_there,
    threshold,
    scale,
    law_is_there,
    rows,
    outputs,
    inputs,
    EACH: tl.constexpr,
    HAS_ANCHOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
):
    """(rows, outputs): a program sums [ROWS, OUT, IN] tiles along the inputs, and adds the bias."""
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    k0, k1 = words_of(key_pointer, k0, k1, key_is_there)
    threshold, scale = law_of(threshold_pointer, scale_pointer, threshold, scale, law_is_there)
    parts = tl.cdiv(outputs, OUT)
    row = (tl.program_id(0) // parts) * ROWS + tl.arange(0, ROWS)
    out = (tl.program_id(0) % parts) * OUT + tl.arange(0, OUT)
    multiplier = multipliers(row // EACH, k0, k1)
    total = tl.zeros((ROWS, OUT, IN), WIDE)
    for start in range(0, inputs, IN):
        into = start + tl.arange(0, IN)
        index = out[:, None] * inputs + into[None, :]
        inside = (out[:, None] < outputs) & (into[None, :] < inputs)
        kept, dropped = kept_and_dropped(weight, anchor, index, inside, scale, HAS_ANCHOR, WIDE)
        there = (row[:, None] < rows) & (into[None, :] < inputs)
        factor = tl.load(x + row[:, None] * inputs + into[None, :], mask=there, other=0.0)
        z, other = for_examples(before_last(index, k0, k1))
        bits = of_example(z[None, :, :], other[None, :, :], multiplier[:, None, None])
        used = tl.where(bits >= threshold, kept[None, :, :], dropped[None, :, :])
        total += used * factor.to(WIDE)[:, None, :]
    summed = tl.sum(total, 2)
    if HAS_BIAS:
        summed += tl.load(bias + out, mask=out < outputs, other=0.0).to(WIDE)[None, :]
    there = (row[:, None] < rows) & (out[None, :] < outputs)
    at = found + row[:, None] * outputs + out[None, :]
    tl.store(at, rounded(summed, found.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=[*HOST_NUMBERS, "rows"])
def input_gradient(
    grad,
    weight,
    anchor,
    found,
    key_pointer,
    threshold_pointer,
    scale_pointer,
    k0,
    k1,
    key_is_there,
    threshold,
    scale,
    law_is_there,
    rows,
    outputs,
    inputs,
    EACH: tl.constexpr,
    HAS_ANCHOR: tl.constexpr,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
):
    """(rows, inputs), from the gradient of the product: the same along the outputs."""
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    k0, k1 = words_of(key_pointer, k0, k1, key_is_there)
    threshold, scale = law_of(threshold_pointer, scale_pointer, threshold, scale, law_is_there)
    parts = tl.cdiv(inputs, IN)
    row = (tl.program_id(0) // parts) * ROWS + tl.arange(0, ROWS)
    into = (tl.program_id(0) % parts) * IN + tl.arange(0, IN)
    multiplier = multipliers(row // EACH, k0, k1)
    total = tl.zeros((ROWS, OUT, IN), WIDE)
    for start in range(0, outputs, OUT):
        out = start + tl.arange(0, OUT)
        index = out[:, None] * inputs + into[None, :]
        inside = (out[:, None] < outputs) & (into[None, :] < inputs)
        kept, dropped = kept_and_dropped(weight, anchor, index, inside, scale, HAS_ANCHOR, WIDE)
        there = (row[:, None] < rows) & (out[None, :] < outputs)
        factor = tl.load(grad + row[:, None] * outputs + out[None, :], mask=there, other=0.0)
        z, other = for_examples(before_last(index, k0, k1))
        bits = of_example(z[None, :, :], other[None, :, :], multiplier[:, None, None])
        used = tl.where(bits >= threshold, kept[None, :, :], dropped[None, :, :])
        total += used * factor.to(WIDE)[:, :, None]
    there = (row[:, None] < rows) & (into[None, :] < inputs)
    at = found + row[:, None] * inputs + into[None, :]
    tl.store(at, rounded(tl.sum(total, 1), found.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=[*HOST_NUMBERS, "rows", "span"])
def weight_gradient(
    grad,
    x,
    found,
    key_pointer,
    threshold_pointer,
    scale_pointer,
    k0,
    k1,
    key_is_there,
    threshold,
    scale,
    law_is_there,
    rows,
    span,
    outputs,
    inputs,
    EACH: tl.constexpr,
    DOUBLE: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """(parts of the rows, outputs, inputs): the masked outer products of `span` rows each, summed."""
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    k0, k1 = words_of(key_pointer, k0, k1, key_is_there)
    threshold, scale = law_of(threshold_pointer, scale_pointer, threshold, scale, law_is_there)
    parts = tl.cdiv(inputs, IN)
    out = (tl.program_id(0) // parts) * OUT + tl.arange(0, OUT)
    into = (tl.program_id(0) % parts) * IN + tl.arange(0, IN)
    index = out[:, None] * inputs + into[None, :]
    z, other = for_examples(before_last(index, k0, k1))
    first = tl.program_id(1) * span
    total = tl.zeros((OUT, IN), WIDE)
    for start in range(0, span, UNROLL):
        for step in tl.static_range(UNROLL):
            row = first + start + step
            there = (row < rows).to(tl.int32)
            left = tl.load(grad + row * outputs + out, mask=out < outputs * there, other=0.0)
            right = tl.load(x + row * inputs + into, mask=into < inputs * there, other=0.0)
            keep = of_example(z, other, multipliers(row // EACH, k0, k1)) >= threshold
            outer = left.to(WIDE)[:, None] * right.to(WIDE)[None, :]
            total = tl.where(keep, total + outer, total)
    inside = (out[:, None] < outputs) & (into[None, :] < inputs)
    at = found + tl.program_id(1) * outputs * inputs + index
    tl.store(at, rounded(total * scale, found.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*HOST_NUMBERS, "first", "count"])
def masked_weights(
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
    first,
    count,
    size,
    HAS_ANCHOR: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(count, size): the masked weights of some examples, from number `first` on."""
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    k0, k1 = words_of(key_pointer, k0, k1, key_is_there)
    threshold, scale = law_of(threshold_pointer, scale_pointer, threshold, scale, law_is_there)
    kept, dropped = kept_and_dropped(weight, anchor, index, inside, scale, HAS_ANCHOR, WIDE)
    z, other = for_examples(before_last(index, k0, k1))
    at = used + index
    for step in range(0, count):
        keep = of_example(z, other, multipliers(first + step, k0, k1)) >= threshold
        values = tl.where(keep, kept, dropped)
        tl.store(at, rounded(values, used.dtype.element_ty), mask=inside)
        at += size


@triton.jit(do_not_specialize=[*HOST_NUMBERS, "first", "count"])
def masked_sum(
    outer,
    before,
    found,
    key_pointer,
    threshold_pointer,
    scale_pointer,
    k0,
    k1,
    key_is_there,
    threshold,
    scale,
    law_is_there,
    first,
    count,
    size,
    HAS_BEFORE: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(size,): gradients (count, size) of the masked weights of some examples, masked and summed, and
    added to what there was before."""
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    k0, k1 = words_of(key_pointer, k0, k1, key_is_there)
    threshold, scale = law_of(threshold_pointer, scale_pointer, threshold, scale, law_is_there)
    z, other = for_examples(before_last(index, k0, k1))
    total = tl.zeros((BLOCK,), WIDE)
    at = outer + index
    for step in range(0, count):
        values = tl.load(at, mask=inside, other=0.0).to(WIDE)
        keep = of_example(z, other, multipliers(first + step, k0, k1)) >= threshold
        total = tl.where(keep, total + values, total)
        at += size
    total *= scale
    if HAS_BEFORE:
        total += tl.load(before + index, mask=inside, other=0.0)
    tl.store(found + index, rounded(total, found.dtype.element_ty), mask=inside)
