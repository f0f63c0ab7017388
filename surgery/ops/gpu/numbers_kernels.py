"""Conversions of floating-point numbers, for Triton kernels."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether Triton's interpreter runs the kernels. It rounds to bfloat16 wrongly."""


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """Values in a dtype, rounded to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        narrow = values.to(tl.float32)
        bits = narrow.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(narrow == narrow, bits, 0x7FC0)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return values.to(dtype)


@triton.jit
def root(values, DOUBLE: tl.constexpr):
    """The square root, rounded to nearest."""
    return tl.sqrt(values) if DOUBLE else tl.sqrt_rn(values)


@triton.jit
def divided(values, by):
    """The quotient of float32, rounded to nearest: `/` has an error of two units there, which tails
    multiply by the square of how far out they are."""
    return tl.div_rn(values, by)
