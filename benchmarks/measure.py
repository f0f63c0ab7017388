"""Timing: contenders take turns, so that whatever else the machine does hits all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from surgery.ops.extension import loading

Work = Callable[[], object]


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    rounds: int = 41
    """Rounds at most; in each, every contender runs for one sample."""
    fewest: int = 15
    """Rounds at least, but for contenders that take seconds a call, for which `FEWEST` must do."""
    seconds: float = 12.0
    """Time for the rounds of one row, where there are more than the fewest."""
    sample: float = 0.004
    """A sample repeats the work for about this long."""
    quick: bool = False
    """Leave out what compiles whole models or starts processes."""
    divide: int = 1
    """Sizes are divided by this: tests run the benchmarks on tiny ones."""

    def size(self, full: int) -> int:
        """A size of the issue's table, or less in tests."""
        return max(full // self.divide, 4)

    def count(self, full: int) -> int:
        """A number of repetitions, or less in tests."""
        return max(full // self.divide, 2)


FULL = Settings()
FEWEST = 3
SLOW = 2.0
"""Seconds."""

QUICK = Settings(rounds=15, fewest=FEWEST, seconds=1.5, quick=True)
TINY = Settings(rounds=3, fewest=FEWEST, seconds=0.05, sample=0.0, divide=64)


@dataclass(frozen=True)
class Measured:
    """Samples of one quantity."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third."""
        if len(self.samples) == 1:
            return self.samples[0], self.samples[0]
        first, _, third = statistics.quantiles(self.samples, n=4, method="inclusive")
        return first, third

    def scaled(self, factor: float) -> Measured:
        """In another unit."""
        return Measured(tuple(factor * value for value in self.samples))

    def over(self, other: Measured) -> Measured:
        """The ratios round by round; they show the spread, the ratio of a table is that of medians."""
        return Measured(tuple(a / b for a, b in zip(self.samples, other.samples)))


def compile_extension() -> None:
    """Compile it now, or load it: else that happens once in the background, beside what is measured."""
    begun = time.perf_counter()
    there = loading.compile_now()
    print(f"[extension: {there}, {time.perf_counter() - begun:.1f} s]", flush=True)


def interleaved(contenders: Mapping[str, Work], settings: Settings) -> dict[str, Measured]:
    """Seconds for one call of each contender: A, B, C, A, B, C, …

    Each is warmed up first. Short work is repeated within a sample, which then follows an untimed
    call that brings its data back into the caches.
    """
    repeats = {name: _repeats(work, settings) for name, work in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + settings.seconds
        for done in range(settings.rounds):
            if done >= settings.fewest and time.perf_counter() > end:
                break
            for name, work in contenders.items():
                if done < FEWEST or samples[name][-1] < SLOW:
                    samples[name].append(_sample(work, repeats[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: Measured(tuple(values)) for name, values in samples.items()}


def _repeats(work: Work, settings: Settings) -> int:
    """How many calls a sample has. The first call compiles, and is not looked at."""
    work()
    once = _sample(work, 1)
    if once >= settings.sample:
        return 1
    once = min(once, _sample(work, 1), _sample(work, 1))
    return max(1, min(1000, round(settings.sample / max(once, 1e-9))))


def _sample(work: Work, repeats: int) -> float:
    """Seconds for one call, on average over `repeats`."""
    if repeats > 1:
        work()
    synchronize()
    begun = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize()
    return (time.perf_counter() - begun) / repeats


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clear_gradients(tensors: Sequence[torch.Tensor]) -> None:
    """Forget gradients: what is timed allocates them again, as after `zero_grad()`."""
    for tensor in tensors:
        tensor.grad = None
