"""What masks and operations should give, written the obvious way: masks in memory, integrals.

The bits are those of `surgery.ops.hash`, which `ops/test_known_masks.py` compares with integers of
Python's own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from surgery.ops import hash_bits
from surgery.ops.hash import mix, multipliers, spread

OWN = {"element": (0, 1), "input": (1,), "output": (0,), "tensor": ()}
"""The dimensions of a weight along which mask entries differ."""


def mask_shape(shape: tuple[int, ...], unit: str) -> tuple[int, ...]:
    """Of the mask of one weight; a convolution's kernel positions have their own elements."""
    own = range(len(shape)) if unit == "element" else OWN[unit]
    return tuple(size if dim in own else 1 for dim, size in enumerate(shape))


def _threshold(p: float) -> int:
    """Of signed 32-bit numbers, those from here on are kept."""
    return min(round(p * 2**32), 2**32) - 2**31


def keep(key: Tensor, p: float, *shape: int) -> Tensor:
    """The keep mask of a key, row-major, as 0 and 1 in float64."""
    index = torch.arange(math.prod(shape), dtype=torch.int32)
    return (hash_bits(index, key).long() >= _threshold(p)).double().view(shape)


def keep_examples(
    key: Tensor, p: float, examples: int, *shape: int, unit: str = "element"
) -> Tensor:
    """The keep masks of a weight, one for each example: (examples, *mask), which broadcasts to it."""
    if unit != "element":  # masks of inputs and outputs lie one after the other
        return keep(key, p, examples, *mask_shape(shape, unit))
    index = spread(torch.arange(math.prod(shape), dtype=torch.int32))
    bits = mix(index, key, multipliers(examples, key)[:, None]).long()
    return (bits >= _threshold(p)).double().view(examples, *shape)


def masked(weight: Tensor, mask: Tensor, p: float, anchor: Tensor | None = None) -> Tensor:
    """`A + m (W - A) / (1 - p)` as the library rounds it; the mask and the weight broadcast."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    scale = torch.tensor(1 / (1 - round(p * 2**32) / 2**32) if p < 1 else 0.0, dtype=wide)
    kept = weight.to(wide) * scale
    if anchor is None:
        return torch.where(mask.bool(), kept, torch.zeros((), dtype=wide)).to(weight.dtype)
    towards = anchor.to(wide)
    return torch.where(mask.bool(), kept + towards * (1 - scale), towards).to(weight.dtype)


def example_weights(
    weight: Tensor, examples: int, key: Tensor, p: float, unit: str, anchor: Tensor | None = None
) -> Tensor:
    """The masked weight of every example: (examples, out, in), all of them at once."""
    return masked(weight, keep_examples(key, p, examples, *weight.shape, unit=unit), p, anchor)


def every_mask(entries: int, p: float) -> Iterator[tuple[float, Tensor]]:
    """Every keep mask of so many entries, with its probability."""
    for bits in itertools.product([0.0, 1.0], repeat=entries):
        kept = int(sum(bits))
        yield (1 - p) ** kept * p ** (entries - kept), torch.tensor(bits, dtype=torch.float64)


def normal_expectation(f: Callable[[Tensor], Tensor], mean: float, sd: float) -> float:
    """E[f(u)] for u ~ N(mean, sd^2), by adaptive quadrature."""
    from scipy.integrate import quad  # which takes long to import

    def integrand(z: float) -> float:
        u = torch.tensor(mean + sd * z, dtype=torch.float64)
        return float(f(u)) * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    kinks = [(kink - mean) / sd for kink in (-3.0, -1.0, 0.0, 1.0, 3.0, 6.0)]
    points = sorted(z for z in kinks if abs(z) < 12)
    return float(quad(integrand, -12, 12, points=points, epsabs=1e-13, epsrel=1e-12, limit=400)[0])
