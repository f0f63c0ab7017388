"""What the examples with several seeds share: means, paired differences, and files written whole."""

from __future__ import annotations

import math
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from scipy import stats


def estimate(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of at least two values."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def compare(
    name: str, own: Sequence[float], other: Sequence[float], unit: str, digits: int = 2
) -> str:
    """A line with the mean difference of values that belong together seed by seed, and whether it is
    noise: within the 95 % limits of Student's t."""
    mean, error = estimate([a - b for a, b in zip(own, other)])
    limit = error * float(stats.t.ppf(0.975, len(own) - 1))
    verdict = "more than noise" if abs(mean) > limit else "within noise"
    return f"  {name:<24}{mean:+.{digits}f} ± {error:.{digits}f} {unit}, {verdict}"


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write files in. At the end they move to `folder`; after an error none does."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
        yield Path(unfinished)
        for file in sorted(Path(unfinished).iterdir()):
            os.replace(file, folder / file.name)
