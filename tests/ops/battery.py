"""`make statistics`: what masks are tested by beside `test_randomness.py`.

    python -m tests.ops.battery [--psamples N] [--testu01 BATTERY] [--seed SEED]

Own tests, then those of TestU01 (P. L'Ecuyer and R. Simard) and of dieharder (R. G. Brown; Marsaglia's
Diehard and a part of NIST's STS), where they are installed, on three streams of masks. It prints a
table, and fails where a result is one that chance gives once in a hundred thousand sets.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import scipy
import torch
from torch import Tensor

from surgery.ops.hash import hash_bits, key_from_seed

from .statistics import Hash, allowed, verdict, window
from .streams import STREAMS, Masks, packed

RATES = (0.5, 0.1, 0.9)
DIEHARDER = {
    "birthdays": 0,
    "rank of 32 x 32": 2,
    "rank of 6 x 8": 3,
    "bitstream": 4,
    "count the ones, stream": 8,
    "count the ones, byte": 9,
    "parking lot": 10,
    "3d spheres": 12,
    "squeeze": 13,
    "runs of words": 15,
    "craps": 16,
    "STS monobit": 100,
    "STS runs": 101,
    "STS serial": 102,
    "lagged sums": 203,
    "bytes": 205,
    "discrete cosine": 206,
    "fill tree": 207,
    "monobit 2": 209,
}
"""Tests that its author calls good, and their numbers."""


def normal(chi: float, freedom: int) -> float:
    """z-score of a chi-square."""
    tail = float(scipy.stats.chi2.sf(chi, freedom))
    return float(scipy.stats.norm.isf(min(max(tail, 1e-300), 1 - 1e-16)))


def chi_square(found: Tensor, expected: Tensor) -> float:
    """z-score of counts beside what they should be. Cells that are expected below 10 count as one, with
    the smallest of the others if they are below 10 together."""
    order = expected.argsort(descending=True)
    had, hoped = found[order], expected[order]
    cells = max(1, int((hoped >= 10).sum()))
    if float(hoped[cells:].sum()) < 10:
        cells -= 1
    had, hoped = (torch.cat([one[:cells], one[cells:].sum()[None]]) for one in (had, hoped))
    return normal(float(((had - hoped) ** 2 / hoped).sum()), cells)


def runs(kept: Tensor, p: float) -> float:
    """z-score of the number of runs (Wald and Wolfowitz), given how many are kept."""
    count, ones = len(kept), int(kept.sum())
    zeros = count - ones
    mean = 1 + 2 * ones * zeros / count
    variance = (mean - 1) * (mean - 2) / (count - 1)
    found = 1 + int((kept[1:] != kept[:-1]).sum())
    return (found - mean) / math.sqrt(variance)


def gaps(kept: Tensor, p: float) -> float:
    """z-score of how many kept entries lie between two dropped ones: geometric."""
    places = (~kept).nonzero().flatten()
    lengths = places.diff() - 1
    counts = torch.bincount(lengths, minlength=512).double()
    length = torch.arange(len(counts), dtype=torch.float64)
    return chi_square(counts, len(lengths) * p * (1 - p) ** length)


def patterns(kept: Tensor, p: float) -> float:
    """z-score of the patterns of 8 neighbours."""
    rows = kept[: len(kept) // 8 * 8].view(-1, 8)
    codes = (rows.int() << torch.arange(8, dtype=torch.int32)).sum(1)
    found = torch.bincount(codes, minlength=1 << 8).double()
    ones = (torch.arange(1 << 8)[:, None] >> torch.arange(8) & 1).sum(1).double()
    return chi_square(found, len(rows) * (1 - p) ** ones * p ** (8 - ones))


def birthdays(kept: Tensor, p: float) -> float:
    """z-score of how many spacings of sorted words come twice (Marsaglia's), in groups of 64 words of
    18 bits: Poisson with mean 1/4. For p = 0.5."""
    words = (kept[: len(kept) // 18 * 18].view(-1, 18).long() << torch.arange(18)).sum(1)
    groups = words[: len(words) // 64 * 64].view(-1, 64).sort(1).values
    spacings = groups.diff(dim=1).sort(1).values
    twice = (spacings.diff(dim=1) == 0).sum(1)
    counts = torch.bincount(twice, minlength=8).double()[:8]
    chances = torch.tensor([float(scipy.stats.poisson.pmf(k, 0.25)) for k in range(8)])
    return chi_square(counts, len(groups) * chances.double())


def other_seeds(seed: int) -> list[Tensor]:
    """The keys of seeds that differ from this one in one bit of 64."""
    return [key_from_seed(seed ^ (1 << bit)) for bit in range(64)]


def one_bit_of(key: Tensor) -> list[Tensor]:
    """Keys that themselves differ from this one in one bit, as none do that the library draws."""
    bits = torch.eye(64, dtype=torch.int64).view(64, 2, 32) << torch.arange(32)
    return [*(key ^ bits.sum(2).to(torch.int32))]


def avalanche(hash_of: Hash, p: float, size: int, key: Tensor, others: list[Tensor]) -> Tensor:
    """z-scores of how many entries change when the key becomes another, or one of the lowest 20 bits of
    the index changes: a share of 2 p (1 - p)."""
    threshold, index = round(p * 2**32) - 2**31, window(0, size)
    kept, share = hash_of(index, key) >= threshold, 2 * p * (1 - p)
    scores = []
    for where, other, pairs in (
        *((index, other, size) for other in others),
        *((index ^ (1 << bit), key, size // 2) for bit in range(20)),  # each pair is seen twice
    ):
        found = float((kept != (hash_of(where, other) >= threshold)).double().mean())
        scores.append((found - share) / math.sqrt(share * (1 - share) / pairs))
    return torch.tensor(scores, dtype=torch.float64)


def own(size: int, keys: int, hash_of: Hash = hash_bits) -> list[str]:
    """Print the lines of the tests of ours; what is wrong."""
    found: list[str] = []
    for p in RATES:
        threshold = round(p * 2**32) - 2**31
        tests = [runs, gaps, patterns] + ([birthdays] if p == 0.5 else [])
        scores: dict[str, list[float]] = {test.__name__: [] for test in tests}
        for seed in range(keys):
            index, key = window(0, size), key_from_seed(1000 + seed)
            kept = torch.cat([hash_of(part, key) >= threshold for part in index.split(1 << 17)])
            for test in tests:
                scores[test.__name__].append(test(kept, p))
        for name, values in scores.items():
            found += verdict(f"{name}, p = {p}, {keys} masks of {size:,}", values)
        scores_of_bits = avalanche(hash_of, p, size, key_from_seed(77), other_seeds(77))
        found += verdict(f"one bit of the seed or index, p = {p}", scores_of_bits)
    return found


class Line(NamedTuple):
    """One result of TestU01 or dieharder."""

    name: str
    p_value: float


def fed(command: list[str], masks: Masks) -> list[str]:
    """What a command prints that reads a stream from its standard input, until it has enough."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # it has enough
        for block in packed(masks):
            process.stdin.write(block)
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    lines = process.stdout.read().decode().splitlines()
    process.stdout.close()
    process.wait()
    return lines


def dieharder(number: int, masks: Masks, psamples: int) -> list[Line]:
    """The results of one of its tests."""
    command = ["dieharder", "-g", "200", "-d", str(number), "-p", str(psamples)]
    return [*_results(fed(command, masks))]


def compiled(folder: str) -> str | None:
    """A program with TestU01's batteries, compiled into a folder; None if that is not installed."""
    program, source = f"{folder}/testu01", str(Path(__file__).with_name("testu01.c"))
    libraries = ("-ltestu01", "-ltestu01probdist", "-ltestu01mylib", "-lm")
    command = ["cc", "-O2", "-o", program, source, *libraries]
    with contextlib.suppress(FileNotFoundError):
        done = subprocess.run(command, capture_output=True, check=False)
        return None if done.returncode else program
    return None


def of_battery(program: str, battery: str, masks: Masks) -> list[Line]:
    """The results of one of its batteries."""
    cells = [line.split("|") for line in fed([program, battery], masks)]
    return [Line(name, float(p)) for name, p in (pair for pair in cells if len(pair) == 2)]


def _results(lines: list[str]) -> Iterator[Line]:
    for line in lines:
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 6 and cells[1].isdigit():
            yield Line(cells[0], float(cells[4]))


def judged(what: str, found: list[Line]) -> list[str]:
    """Print a line of the table; what is wrong."""
    # dieharder prints eight digits, so that 1 may be a little less.
    scores = [float(scipy.stats.norm.isf(min(max(p, 1e-8), 1 - 1e-8))) for _, p in found]
    largest, bound = max(map(abs, scores), default=math.nan), allowed(max(1, len(scores)))
    print(f"| {what} | {len(scores)} | {largest:.2f} | {bound:.2f} |", flush=True)
    return [] if largest <= bound else [what]


def by_testu01(battery: str, seed: int) -> list[str]:
    """Print a line for each stream; what is wrong."""
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        program = compiled(folder)
        if program is None:
            print(
                "TestU01 is not installed (libtestu01-0-dev of Debian's non-free)", file=sys.stderr
            )
            return []
        for stream, masks in STREAMS.items():
            torch.manual_seed(seed)
            wrong += judged(f"{stream}: {battery}", of_battery(program, battery, masks()))
    return wrong


def by_dieharder(psamples: int, seed: int) -> list[str]:
    """Print a line for each stream and test; what is wrong."""
    if not shutil.which("dieharder"):
        print("dieharder is not installed (apt-get install dieharder)", file=sys.stderr)
        return []
    wrong = []
    for stream, masks in STREAMS.items():
        for name, number in DIEHARDER.items():
            torch.manual_seed(seed + number)
            wrong += judged(f"{stream}: {name}", dieharder(number, masks(), psamples))
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--psamples", type=int, default=20, help="of dieharder; fewer skew it")
    parser.add_argument("--testu01", choices=("SmallCrush", "Crush"), default="SmallCrush")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("| what | scores | largest | bound |\n|---|---|---|---|")
    wrong = own(1 << 20, 16)
    wrong += by_testu01(options.testu01, options.seed)
    wrong += by_dieharder(options.psamples, options.seed)
    print(*wrong or ["nothing is wrong"], sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
