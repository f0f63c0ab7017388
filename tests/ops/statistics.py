"""Statistics of keep masks: z-scores that are standard normal if the bits are independent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Hash = Callable[[Tensor, Tensor], Tensor]

SIZE = 1 << 20
INDEX = torch.arange(SIZE, dtype=torch.int32)
LAGS = (
    *range(1, 17),
    *(24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1000, 1024, 1536, 2048, 3072, 4096, 5120),
    *(1 << bit for bit in range(13, 20)),
)
"""Along a row (small), along a column of the usual widths, and powers of two: 41 of them."""


def centred(hash_of: Hash, key: Tensor, p: float, index: Tensor = INDEX) -> Tensor:
    """The keep mask minus its expectation, divided by its standard deviation."""
    threshold = round(p * 2**32) - 2**31
    return ((hash_of(index, key) >= threshold).float() - (1 - p)) / math.sqrt(p * (1 - p))


def correlation(a: Tensor, b: Tensor) -> float:
    """z-score of the correlation between two centred masks."""
    return float(torch.dot(a, b)) / math.sqrt(len(a))


def lag_scores(hash_of: Hash, p: float, keys: Iterable[Tensor], lags=LAGS) -> Tensor:
    """z-scores of the correlation of a mask with itself, shifted by each lag: keys x lags."""
    rows = []
    for key in keys:
        mask = centred(hash_of, key, p)
        rows.append([correlation(mask[:-lag], mask[lag:]) for lag in lags])
    return torch.tensor(rows)


def faults(scores: Tensor) -> list[str]:
    """What is wrong with z-scores that should be independent standard normals.

    Their standard deviation about 0 may differ from 1 by 4 of its standard errors, and the largest
    may be what chance exceeds in one set of a hundred thousand.
    """
    count = scores.numel()
    spread = float(scores.pow(2).mean().sqrt())
    allowed = 4 / math.sqrt(2 * count)
    largest = float(scores.abs().max())
    bound = float(torch.special.ndtri(torch.tensor(1 - 1e-5 / (2 * count), dtype=torch.float64)))
    found = []
    if abs(spread - 1) > allowed:
        found.append(f"standard deviation {spread:.3f}, not within 1 +- {allowed:.3f}")
    if largest > bound:
        found.append(f"largest |z| {largest:.2f}, above {bound:.2f}")
    return found
