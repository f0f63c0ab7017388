"""Statistics of keep masks: z-scores that are standard normal if the bits are independent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import scipy
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


def window(start: int, count: int) -> Tensor:
    """`count` indices from `start` on, modulo 2**32."""
    return (torch.arange(count, dtype=torch.int64) + start).to(torch.int32)


def centred(hash_of: Hash, key: Tensor, p: float, index: Tensor = INDEX) -> Tensor:
    """The keep mask minus its expectation, divided by its standard deviation."""
    threshold = round(p * 2**32) - 2**31
    parts = index.split(1 << 17)  # which stay in the cache
    kept = torch.cat([hash_of(part, key) >= threshold for part in parts])
    return (kept.float() - (1 - p)) / math.sqrt(p * (1 - p))


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


def every_lag(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """z-scores of the correlation of the second mask of each pair at i with the first at i + lag,
    summed over the pairs: for each lag from 0 to 15/16 of the length."""
    sums, count = None, 0
    for first, second in pairs:
        size, count = len(first), count + 1
        left = scipy.fft.rfft(first.numpy(), 2 * size)
        right = left if second is first else scipy.fft.rfft(second.numpy(), 2 * size)
        product = left * right.conj()
        sums = product if sums is None else sums + product
    correlations = torch.from_numpy(scipy.fft.irfft(sums, 2 * size))[: size - size // 16]
    return correlations / (count * (size - torch.arange(len(correlations)))).sqrt()


def products(masks_of: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """z-scores of the correlation of each pair of rows of masks. `masks_of` gives the centred masks,
    (rows, indices), of some indices."""
    total: Tensor | float = 0.0
    for index in window(0, size).split(1 << 14):
        masks = masks_of(index)
        total = total + masks @ masks.t()
    assert isinstance(total, Tensor)
    upper = torch.triu_indices(len(total), len(total), 1)
    return total[upper[0], upper[1]] / math.sqrt(size)


def block_score(kept: Tensor, p: float) -> float:
    """z-score of the chi-square of the patterns of 4 x 4 blocks of a mask. Patterns that are expected
    less than once count as one."""
    rows, columns = kept.shape
    blocks = kept.view(rows // 4, 4, columns // 4, 4).transpose(1, 2).reshape(-1, 16)
    codes = (blocks.int() << torch.arange(16, dtype=torch.int32)).sum(1)
    found = torch.bincount(codes, minlength=1 << 16).double()
    bits = (torch.arange(1 << 16)[:, None] >> torch.arange(16) & 1).sum(1).double()
    expected = len(codes) * (1 - p) ** bits * p ** (16 - bits)
    rare = expected < 1
    cells = [(found[~rare], expected[~rare]), (found[rare].sum()[None], expected[rare].sum()[None])]
    used = [(had, hoped) for had, hoped in cells if float(hoped.sum()) >= 8]
    chi = sum(float(((had - hoped) ** 2 / hoped).sum()) for had, hoped in used)
    freedom = sum(len(had) for had, _ in used) - 1
    return float(scipy.stats.norm.isf(scipy.stats.chi2.sf(chi, freedom)))


def verdict(what: str, scores: Tensor | Sequence[float], only_largest: bool = False) -> list[str]:
    """`faults` of z-scores, printed as a line of the table of `docs/masks.md`."""
    scores = torch.as_tensor(scores, dtype=torch.float64).flatten()
    largest, bound = float(scores.abs().max()), allowed(scores.numel())
    print(f"| {what} | {scores.numel():,} | {largest:.2f} | {bound:.2f} |")
    found = faults(scores)
    return [fault for fault in found if "largest" in fault] if only_largest else found


def allowed(count: int) -> float:
    """What the largest of so many standard normals exceeds in one set of a hundred thousand."""
    return float(torch.special.ndtri(torch.tensor(1 - 1e-5 / (2 * count), dtype=torch.float64)))


def faults(scores: Tensor) -> list[str]:
    """What is wrong with z-scores that should be independent standard normals.

    Their standard deviation about 0 may differ from 1 by 4 of its standard errors, and the largest
    may be what chance exceeds in one set of a hundred thousand.
    """
    count = scores.numel()
    spread = float(scores.pow(2).mean().sqrt())
    error = 4 / math.sqrt(2 * count)
    largest, bound = float(scores.abs().max()), allowed(count)
    found = []
    if abs(spread - 1) > error:
        found.append(f"standard deviation {spread:.3f}, not within 1 +- {error:.3f}")
    if not largest <= bound:  # also of what is not a number
        found.append(f"largest |z| {largest:.2f}, above {bound:.2f}")
    return found
