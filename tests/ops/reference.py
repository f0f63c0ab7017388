"""What the operations should give, written the obvious way: loops, and every mask that there is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from scipy.integrate import quad
from torch import Tensor

from surgery.ops import Law, keep_mask
from surgery.ops.hash import advance_key, mix, multipliers, spread

OWN = {"element": (0, 1), "input": (1,), "output": (0,), "tensor": ()}
"""The dimensions of a weight along which mask entries differ."""


def mask_shape(shape: tuple[int, ...], unit: str) -> tuple[int, ...]:
    """Of the mask of one weight; a convolution's kernel positions have their own elements."""
    own = range(len(shape)) if unit == "element" else OWN[unit]
    return tuple(size if dim in own else 1 for dim, size in enumerate(shape))


def example_weights(
    weight: Tensor, examples: int, key: Tensor, law: Law, unit: str, anchor: Tensor | None = None
) -> Tensor:
    """The masked weight of every example: (examples, out, in), all of them at once."""
    shape = mask_shape(tuple(weight.shape), unit)
    towards = torch.zeros_like(weight) if anchor is None else anchor
    used = []
    places = spread(torch.arange(math.prod(shape), dtype=torch.int32))
    for example, last in enumerate(multipliers(examples, key)):
        if unit == "element":
            keep = (mix(places, key, last) >= law.threshold).view(shape)
        else:  # masks of inputs and outputs lie one after the other
            keep = keep_mask(shape, advance_key(key, example * math.prod(shape)), law.threshold)
        used.append(torch.where(keep, weight * law.scale + towards * (1 - law.scale), towards))
    return torch.stack(used)


def every_mask(entries: int, p: float) -> Iterator[tuple[float, Tensor]]:
    """Every keep mask of so many entries, with its probability."""
    for bits in itertools.product([0.0, 1.0], repeat=entries):
        kept = int(sum(bits))
        yield (1 - p) ** kept * p ** (entries - kept), torch.tensor(bits, dtype=torch.float64)


def normal_expectation(f: Callable[[Tensor], Tensor], mean: float, sd: float) -> float:
    """E[f(u)] for u ~ N(mean, sd^2), by adaptive quadrature."""

    def integrand(z: float) -> float:
        u = torch.tensor(mean + sd * z, dtype=torch.float64)
        return float(f(u)) * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    kinks = [(kink - mean) / sd for kink in (-3.0, -1.0, 0.0, 1.0, 3.0, 6.0)]
    points = sorted(z for z in kinks if abs(z) < 12)
    return float(quad(integrand, -12, 12, points=points, epsabs=1e-13, epsrel=1e-12, limit=400)[0])
