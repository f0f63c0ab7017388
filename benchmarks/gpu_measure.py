"""How the rows of the GPU are measured: on a device, in a size, and in what takes turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from .layers import training_work
from .measure import Measured, Settings, Work, interleaved, synchronize
from .peers import available
from .rows import MILLI, Goal, Row, in_unit

SECTION = "gpu"
MEGA = 2**20


@dataclass(frozen=True)
class Bench:
    """Where rows are measured, and how much."""

    device: str
    """"cuda", or "cpu" where only the code of the rows is tried."""
    settings: Settings

    @property
    def small(self) -> bool:
        return self.settings.divide > 1

    def size(self, full: int) -> int:
        return self.settings.size(full)

    def randn(
        self, *shape: int, dtype: torch.dtype = torch.float32, grad: bool = False
    ) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(dtype).requires_grad_(grad)

    def times(self, works: Mapping[str, Work], unit: float = MILLI) -> dict[str, Measured]:
        """Time of a call of each, with the waiting."""
        return in_unit(interleaved(works, self.settings), unit)

    def peak(self, work: Work) -> float:
        """MB that a call needs beyond what is there before it; after a call that warms up. 0 on the
        CPU, whose allocator does not count."""
        work()
        if self.device != "cuda":
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MEGA

    def peaks(self, works: Mapping[str, Work]) -> dict[str, Measured]:
        return {name: Measured((self.peak(work),)) for name, work in works.items()}


QUICKLY = 20
"""Calls in a row, few enough that the queue of the device does not fill."""


def host_times(works: Mapping[str, Work], rounds: int, calls: int = QUICKLY) -> dict[str, Measured]:
    """Seconds that the host needs for a call of each, without waiting for the device."""
    samples: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(rounds):
        for name, work in works.items():
            work()
            synchronize()
            begun = time.perf_counter()
            for _ in range(calls):
                work()
            samples[name].append((time.perf_counter() - begun) / calls)
    synchronize()
    return {name: Measured(tuple(values)) for name, values in samples.items()}


def beyond(values: Mapping[str, Measured], plain: str) -> dict[str, Measured]:
    """What each needs beyond the plain one, round by round."""
    base = values[plain].samples
    return {
        name: Measured(tuple(a - b for a, b in zip(value.samples, base)))
        for name, value in values.items()
        if name != plain
    }


def row(
    work: str, unit: str, goal: Goal | None, values: dict[str, Measured], **rest: object
) -> Row:
    return Row(SECTION, work, unit, goal, values, **rest)  # type: ignore[arg-type]


def trained(
    models: Mapping[str, nn.Module], x: torch.Tensor, grad: torch.Tensor
) -> dict[str, Work]:
    """Forward and backward of each."""
    return {name: training_work(model, (x,), grad) for name, model in models.items()}


def usable(
    builders: Mapping[str, Callable[[], nn.Module]], tried: Callable[[nn.Module], object]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Of other people's code what works: that which can be imported, and survives `tried(model)`."""
    made, missing = available(dict(builders))
    for name, model in list(made.items()):
        try:
            tried(model)
        except Exception as error:
            missing[name] = (
                f"fails: {type(error).__name__}: {str(error).partition(chr(10))[0][:80]}"
            )
            del made[name]
    return made, missing


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def narrow(device: str, enabled: bool) -> Iterator[None]:
    """Autocast to bfloat16."""
    with torch.autocast(device, torch.bfloat16, enabled=enabled):
        yield
