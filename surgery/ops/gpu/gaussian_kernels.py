"""Gaussian pre-activations: see `surgery.ops.gaussian`. Each kernel does in one launch what stands
between two products."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .numbers_kernels import root, rounded


@triton.jit
def store(pointer, index, values, inside):
    tl.store(pointer + index, rounded(values, pointer.dtype.element_ty), mask=inside)


@triton.jit
def factors(
    x,
    weight,
    anchor,
    grad,
    slope,
    copy_x,
    copy_weight,
    square_x,
    square_weight,
    by_variance,
    ratio,
    size_x,
    size_weight,
    size_grad,
    HAS_ANCHOR: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    COPY: tl.constexpr,
    SCALED: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What the products of a mean and a variance multiply. The first programs square x, those after
    them the weight less its anchor, and the last multiply a gradient by the slope of the variance.
    With COPY, x and the weight in the dtype of the products too; with SCALED, the squares of the weight
    times the ratio."""
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    program = tl.program_id(0)
    of_x = (size_x + BLOCK - 1) // BLOCK
    of_weight = (size_weight + BLOCK - 1) // BLOCK
    entry = tl.arange(0, BLOCK)
    if program < of_x:
        index = program * BLOCK + entry
        inside = index < size_x
        values = tl.load(x + index, mask=inside).to(WIDE)
        if COPY:
            store(copy_x, index, values, inside)
        store(square_x, index, values * values, inside)
    elif program < of_x + of_weight:
        index = (program - of_x) * BLOCK + entry
        inside = index < size_weight
        values = tl.load(weight + index, mask=inside).to(WIDE)
        if COPY:
            store(copy_weight, index, values, inside)
        if HAS_ANCHOR:
            values = values - tl.load(anchor + index, mask=inside).to(WIDE)
        squares = values * values
        if SCALED:
            squares = squares * tl.load(ratio)
        store(square_weight, index, squares, inside)
    else:
        if HAS_GRAD:
            index = (program - of_x - of_weight) * BLOCK + entry
            inside = index < size_grad
            found = tl.load(grad + index, mask=inside).to(WIDE)
            found = found * tl.load(slope + index, mask=inside).to(WIDE)
            store(by_variance, index, found, inside)


@triton.jit
def draw(
    mean,
    var,
    noise,
    sample,
    slope,
    ratio,
    size,
    SCALED: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sample = mean + sd * noise with sd^2 = ratio * var, and its derivative by var, 0 where sd is 0.
    Not SCALED, the ratio is 1."""
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    sd = tl.load(var + index, mask=inside, other=0.0).to(WIDE)
    half = 0.5
    if SCALED:
        factor = tl.load(ratio).to(WIDE)
        sd = sd * factor
        half = 0.5 * factor
    sd = root(sd, DOUBLE)
    random = tl.load(noise + index, mask=inside, other=0.0).to(WIDE)
    center = tl.load(mean + index, mask=inside, other=0.0).to(WIDE)
    store(sample, index, center + sd * random, inside)
    found = random * half / tl.where(sd > 0, sd, 1.0)
    store(slope, index, tl.where(sd > 0, found, 0.0), inside)


@triton.jit
def add_twice(
    total_x,
    x,
    through_x,
    of_x,
    total_weight,
    weight,
    anchor,
    through_weight,
    of_weight,
    size_x,
    size_weight,
    HAS_ANCHOR: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """of_x = total + 2 * x * through, and the same for the weight less its anchor, by the programs
    after those of x. Either may have no entries."""
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    program = tl.program_id(0)
    programs_of_x = (size_x + BLOCK - 1) // BLOCK
    entry = tl.arange(0, BLOCK)
    if program < programs_of_x:
        index = program * BLOCK + entry
        inside = index < size_x
        values = tl.load(x + index, mask=inside).to(WIDE)
        values = 2 * values * tl.load(through_x + index, mask=inside).to(WIDE)
        store(of_x, index, tl.load(total_x + index, mask=inside).to(WIDE) + values, inside)
    else:
        index = (program - programs_of_x) * BLOCK + entry
        inside = index < size_weight
        values = tl.load(weight + index, mask=inside).to(WIDE)
        if HAS_ANCHOR:
            values = values - tl.load(anchor + index, mask=inside).to(WIDE)
        values = 2 * values * tl.load(through_weight + index, mask=inside).to(WIDE)
        total = tl.load(total_weight + index, mask=inside).to(WIDE)
        store(of_weight, index, total + values, inside)
