"""Expectations of activations of a Gaussian: see `surgery.ops.expect`. In float32, one pass each."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .numbers_kernels import divided, root, rounded


@triton.jit
def density(t):
    """phi(t)."""
    return 0.3989422804014327 * tl.exp(-0.5 * t * t)


@triton.jit
def scaled_tail(t):
    """(1 + t^2) * (1 - t * M(t)) for t >= 0, where M is Mills' ratio (1 - Phi) / phi: the series of
    `cpu/kernels/activations.cpp`, with a relative error below 6e-8."""
    y = divided(t - 4, t + 4)
    twice = 2 * y
    b12 = 6.869403535e-08
    b11 = twice * b12 - 9.779440688e-07
    b10 = twice * b11 - b12 - 3.784210776e-07
    b9 = twice * b10 - b11 + 2.639518425e-05
    b8 = twice * b9 - b10 - 6.738337834e-05
    b7 = twice * b8 - b9 - 4.980695085e-04
    b6 = twice * b7 - b8 + 4.911893513e-03
    b5 = twice * b6 - b7 - 2.145192958e-02
    b4 = twice * b5 - b6 + 5.723431706e-02
    b3 = twice * b4 - b5 - 8.957011253e-02
    b2 = twice * b3 - b4 + 4.126950726e-02
    b1 = twice * b2 - b3 + 1.114946529e-01
    return y * b1 - b2 + 8.966519833e-01


@triton.jit
def probability(z):
    """Phi(z), with a small relative error on the left, too: where it is below 0.16, by Mills' ratio,
    which `erf` has lost there."""
    t = tl.minimum(tl.abs(z), 50.0)
    far = tl.maximum(t, 1.0)
    mills = divided(1 - divided(scaled_tail(far), 1 + far * far), far)
    tail = density(far) * mills
    near = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
    found = tl.where(t < 1, near, tl.where(z > 0, 1 - tail, tail))
    return tl.where(z == z, found, z)


@triton.jit
def expect(
    mean,
    var,
    out,
    size,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """FORM "excess": what a kink adds; "relu" and "gelu": the expectation."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    center = tl.load(mean + index, mask=inside, other=0.0).to(tl.float32)
    variance = tl.load(var + index, mask=inside, other=0.0).to(tl.float32)
    if FORM == "gelu":
        sd = root(1 + variance, False)
        z = divided(center, sd)
        found = center * probability(z) + divided(variance, sd) * density(z)
    else:
        sd = root(variance, False)
        ratio = divided(tl.abs(center), tl.where(sd > 0, sd, 1.0))
        t = tl.where(ratio >= 50, 50.0, ratio)  # NaN stays
        found = sd * density(t) * divided(scaled_tail(t), 1 + t * t)
        if FORM == "relu":
            found = tl.where(center > 0, center, 0.0) + found
    tl.store(out + index, rounded(found, out.dtype.element_ty), mask=inside)
