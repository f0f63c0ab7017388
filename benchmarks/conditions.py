"""Where and how numbers were measured."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
BUSY = 0.5
"""Load per core above which ratios are doubtful."""


def conditions() -> dict[str, Any]:
    """Machine and software, ready for JSON."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "system": platform.platform(),
        "compiler": _line(os.environ.get("CXX", "c++"), "--version"),
        "commit": _commit(),
        "peers": {name: _version(name) for name in PEER_PACKAGES},
    }


PEER_PACKAGES = ("pytorch-nlp", "fastai", "spikingjelly", "baal")


def now() -> dict[str, Any]:
    """What changes in a shared machine while it measures: its load, and what it gets done."""
    return {"load": load(), **speed()}


def load() -> list[float]:
    """Load averages over 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else []


def speed() -> dict[str, float]:
    """Medians, to judge absolute times by: a matrix product, a copy that leaves the caches, and what an
    interpreter does."""
    matrix, flat = torch.randn(1024, 1024), torch.randn(1 << 24)
    place = torch.empty_like(flat)
    product = median_time(lambda: matrix @ matrix)
    copy = median_time(lambda: place.copy_(flat))
    loop = median_time(lambda: sum(range(10**6)))
    return {
        "GFLOP/s": round(2 * 1024**3 / product / 1e9, 1),
        "GB/s": round(2 * flat.nbytes / copy / 1e9, 1),
        "Python additions per µs": round(1 / loop, 1),
    }


def median_time(work: Callable[[], object], repeats: int = 15) -> float:
    """Seconds for a call."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def busy(loads: list[float]) -> str | None:
    """A warning, if something else runs on this machine, for whoever reads the numbers."""
    cores = os.cpu_count() or 1
    if not loads or loads[0] <= BUSY * cores:
        return None
    return (
        f"the load was {loads[0]:g} on {cores} cores before the benchmark: something else ran here, "
        "and the numbers are doubtful"
    )


def wait_for_quiet(seconds: float = 120.0) -> None:
    """Let the load fall that setting up has caused."""
    end = time.monotonic() + seconds
    while busy(load()) is not None and time.monotonic() < end:
        time.sleep(1)


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
        return text.split("model name")[1].split(":")[1].split("\n")[0].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _line(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else None


def _commit() -> str | None:
    commit = _line("git", "rev-parse", "--short", "HEAD")
    if commit is None:
        return None
    return f"{commit} with changes" if _line("git", "status", "--porcelain") else commit


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
