"""Fixtures for every test: a fixed seed, and checks of random quantities with a stated error."""

from __future__ import annotations

import gc
import math
import os
import shutil
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from filelock import FileLock
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

if not torch.cuda.is_available():  # before triton is imported: its interpreter runs the kernels
    os.environ["TRITON_INTERPRET"] = "1"

from surgery.ops.switch import set_compile_enabled

from . import internals
from .zoo.tiny import tiny as make_tiny


def has_compiler() -> bool:
    """Whether kernels can be compiled for the CPU, by `ops/cpu` and by inductor: C++ compilers, and
    the headers of Python."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++"]
    return all(map(shutil.which, compilers)) and header.is_file()


if not has_compiler():
    set_compile_enabled(False)  # the fallback warns, and here warnings are errors


def pytest_configure(config: pytest.Config) -> None:
    """While workers look for tests, the process that starts them compiles the extension."""
    workers = config.getoption("numprocesses", None)
    if workers and not hasattr(config, "workerinput"):
        threading.Thread(target=the_extension, daemon=True).start()


@pytest.fixture(scope="session", autouse=True)
def extension() -> bool:
    """Whether the extension in C++ is there: as in a training that has run for a while."""
    return the_extension()


def the_extension() -> bool:
    """Of processes that start together, one compiles it."""
    if not has_compiler():
        return False
    with FileLock(Path(tempfile.gettempdir()) / f"dropconnect-tests-{os.getuid()}.lock"):
        return internals.compile_extension()


def pytest_collection_finish() -> None:
    """Leave what tests are made of out of garbage collections: libraries ask for whole ones at each
    call, which took a third of the time of some files."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # or libraries tell at the end that they were not freed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is about compiled code where nothing can be compiled."""
    if not has_compiler():
        skip = pytest.mark.skip(reason="no C++ compiler, or no Python.h, on this machine")
        for item in items:
            if item.get_closest_marker("compiler"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def traced_experts() -> str:
    """How transformers shall compute experts that are to be compiled or exported: torch 2.9 runs
    `grouped_mm` in float32 and does not trace it, in a plain model neither."""
    with torch.device("meta"):
        rows, experts, offs = torch.empty(4, 8), torch.empty(2, 8, 8), torch.empty(2).int()
    try:
        torch._grouped_mm(rows, experts, offs=offs)
    except RuntimeError:
        return "batched_mm"
    return "grouped_mm"


@pytest.fixture
def gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels for the GPU run on the CPU, in Triton's interpreter; the names of those that ran."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton compiles here: see tests/gpu")
    launched: list[str] = []
    internals.note_launches(monkeypatch, lambda name, ran: launched.append(name))
    internals.set_constant(monkeypatch, "interpreted devices", {"cpu"})
    numpy = pytest.importorskip("numpy")
    with numpy.errstate(all="ignore"):  # a GPU does not warn of what overflows
        yield launched


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The C++ kernels that are called; "drop both" makes a masked weight and masks its gradient."""
    calls: list[str] = []

    def note(name: str, *args: Any) -> None:
        both = name == "drop" and args[3] is not None and args[4] is not None
        calls.append("drop both" if both else name)

    internals.without_extension(monkeypatch)
    internals.note_kernels(monkeypatch, note)
    return calls


@pytest.fixture
def switch_kernels() -> Iterator[Callable[[bool], bool]]:
    """Switches kernels on or off, as `DROPCONNECT_COMPILE` does; afterwards they are as they were."""
    before = set_compile_enabled(False)
    set_compile_enabled(before)
    yield set_compile_enabled
    set_compile_enabled(before)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """A fresh tiny transformers model by name, the same weights every time."""
    return make_tiny


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed torch's default generators before every test."""
    torch.manual_seed(1234)
    return 1234


class Estimate(NamedTuple):
    """A Monte Carlo estimate of a mean, entry by entry."""

    mean: Tensor
    error: Tensor
    """Standard error of `mean`."""
    count: int  # type: ignore[assignment]

    def z(self, expected: Tensor | float) -> Tensor:
        """How many standard errors the estimate lies from `expected`; 0 where both are exact."""
        gap = self.mean - expected
        return torch.where(gap == 0, torch.zeros_like(gap), gap / self.error)


def estimate(draw: Callable[[], Tensor], count: int) -> Estimate:
    """Mean and standard error of `count` independent draws, in float64."""
    draws = torch.stack([draw().detach().double() for _ in range(count)])
    return Estimate(draws.mean(0), draws.std(0) / math.sqrt(count), count)


def z_bound(comparisons: int, chance: float = 1e-6) -> float:
    """The |z| that none of so many independent standard normals exceeds, but with `chance`."""
    one_sided = torch.tensor(1 - chance / (2 * comparisons), dtype=torch.float64)
    return float(torch.special.ndtri(one_sided))


@pytest.fixture(scope="session")
def check_mean() -> Callable[..., Estimate]:
    """A function that fails unless the mean of random draws is `expected`, within standard errors.

    `check_mean(draw, expected, count)` calls `draw()` so often. Every entry must lie within the z-score
    that chance exceeds in one run of a million.
    """

    def check(draw: Callable[[], Tensor], expected: Any, count: int = 2000) -> Estimate:
        found = estimate(draw, count)
        worst, bound = float(found.z(expected).abs().max()), z_bound(found.mean.numel())
        assert worst < bound, f"mean is {worst:.1f} standard errors off (bound {bound:.1f})"
        return found

    return check


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every key drawn by a forward call, in order: how many masks there were, and which."""
    drawn: list[Tensor] = []

    def spy(*args: Any) -> Any:
        drawn.append(draw(*args))
        return drawn[-1]

    draw = internals.replace_draw_key(monkeypatch, spy)
    return drawn


@pytest.fixture
def masked_weights(monkeypatch: pytest.MonkeyPatch) -> list[StorageWeakRef]:
    """The memory of every masked weight that is made."""
    made: list[StorageWeakRef] = []
    internals.note_masked_weights(
        monkeypatch, lambda used: made.append(StorageWeakRef(used.untyped_storage()))
    )
    return made
