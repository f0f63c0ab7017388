"""Everything on a GPU, in less than four minutes.

python -m benchmarks.gpu              # make bench-gpu: out/bench-gpu.md and out/bench-gpu.json
python -m benchmarks.gpu --small      # tiny sizes, on the CPU too: tries the code, measures nothing

Rows are ordered by importance, each has a budget of time, and what was measured is written after each:
a run that is cut off leaves what it had. On a machine without a GPU nothing is done.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import gpu_compiled, gpu_layers, gpu_models, report
from .conditions import conditions
from .gpu_measure import SECTION, Bench
from .measure import TINY, Settings, compile_extension
from .rows import Row

SETTINGS = Settings(rounds=41, fewest=5, seconds=2.5, sample=0.01)
SECONDS = 225.0
"""For all rows."""
COMPILING = 100.0
"""At most, for the models that are compiled."""
MEASURING = 25.0
"""What their rounds take, after that."""

F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Job:
    """Rows that are measured together."""

    name: str
    measure: Callable[[Bench], list[Row]]
    seconds: float = 20.0
    """It is given up after so many."""


JOBS: tuple[Job, ...] = (
    Job("mask float32", partial(gpu_layers.mask, dtype=F32)),
    Job("mask bfloat16", partial(gpu_layers.mask, dtype=BF16)),
    Job("mask float32 to bfloat16", gpu_layers.mask_cast),
    Job("host time of one mask", gpu_layers.mask_host),
    Job(
        "Linear 2048x768x768",
        partial(gpu_layers.linear, tokens=2048, width=768, out=768, goal=1.35, host=True),
    ),
    Job(
        "Linear 4096x4096x4096",
        partial(gpu_layers.linear, tokens=4096, width=4096, out=4096, goal=1.06),
    ),
    Job(
        "Linear 16384x4096x4096",
        partial(gpu_layers.linear, tokens=16384, width=4096, out=4096, goal=1.02),
    ),
    Job("BERT-base bfloat16", partial(gpu_models.bert, autocast=True, goal=1.06), 45.0),
    Job("BERT-base float32", partial(gpu_models.bert, autocast=False, goal=1.01), 30.0),
    Job("per example float32", partial(gpu_layers.per_example, dtype=F32)),
    Job("per example bfloat16", partial(gpu_layers.per_example, dtype=BF16)),
    Job("per sequence float32", partial(gpu_layers.per_sequence, dtype=F32)),
    Job("per sequence bfloat16", partial(gpu_layers.per_sequence, dtype=BF16)),
    Job("gaussian float32", partial(gpu_layers.gaussian, dtype=F32)),
    Job("gaussian bfloat16", partial(gpu_layers.gaussian, dtype=BF16)),
    Job("moments", gpu_layers.moments),
    Job("LSTM float32", partial(gpu_layers.lstm, dtype=F32)),
    Job("LSTM bfloat16", partial(gpu_layers.lstm, dtype=BF16)),
    Job("Llama-shaped 1B", gpu_models.llama, 40.0),
    Job("waits of the host", gpu_models.waits),
    Job("first calls", gpu_compiled.first_calls, 60.0),
)
COMPILED = ("bert", "graphs", "llama")
"""Compiled together in processes of their own, after all else."""


def every_job(seconds: Callable[[], float]) -> Iterator[Job]:
    """The jobs, and last the compiled ones, which get what is left of the time."""
    yield from JOBS
    compiling = min(COMPILING, seconds() - MEASURING)
    measure = partial(gpu_compiled.compiled, models=COMPILED, seconds=max(compiling, 10.0))
    yield Job("compiled", measure, compiling + MEASURING)


@contextmanager
def budget(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` in what takes longer, where the system has such alarms."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(job: Job, bench: Bench, left: float) -> list[Row]:
    """Its rows; of one that fails, a row that says why."""
    torch.manual_seed(0)
    try:
        if left < 2.0:
            raise TimeoutError("no time left")
        with budget(min(job.seconds, left)):
            rows = job.measure(bench)
    except Exception as error:
        if not isinstance(error, TimeoutError):
            traceback.print_exc()
        reason = f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"
        rows = [Row(SECTION, job.name, "", skipped=reason)]
    if bench.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def run(bench: Bench, output: Path, seconds: float, only: str = "") -> list[Row]:
    """Measure all jobs whose names contain `only`, and write after each."""
    begun = time.perf_counter()
    where = {**conditions(), **versions()}
    rows: list[Row] = []

    def left() -> float:
        return seconds - (time.perf_counter() - begun)

    for job in every_job(left):
        if only not in job.name:
            continue
        started = time.perf_counter()
        found = measure(job, bench, left())
        rows += found
        spent = time.perf_counter()
        print(f"[{job.name}: {spent - started:.1f} s, {spent - begun:.0f} s in all]", flush=True)
        for row in found:
            print(f"  {told(row)}", flush=True)
        write(output, rows, where, spent - begun)
    return rows


def told(row: Row) -> str:
    """A row in a line."""
    if row.skipped is not None:
        return f"{row.work}: skipped, {row.skipped}"
    medians = ", ".join(
        f"{name} {report.number(value.median)}" for name, value in row.values.items()
    )
    reached, goal = row.reached(), "" if row.goal is None else row.goal.text(row.unit)
    verdict = {True: "met", False: "MISSED", None: ""}[row.met()]
    shown = "" if reached is None else f" -> {report.number(reached)} (goal {goal}) {verdict}"
    return f"{row.work}: {medians} {row.unit}{shown}"


def versions() -> dict[str, Any]:
    """What the numbers depend on, beside what `conditions` has."""

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    found: dict[str, Any] = {name: version(name) for name in ("triton", "transformers")}
    found["date"] = datetime.now(timezone.utc).date().isoformat()
    if torch.cuda.is_available():
        found["cudnn"] = torch.backends.cudnn.version()
    return found


def write(folder: Path, rows: Sequence[Row], where: dict[str, Any], seconds: float) -> None:
    """`bench-gpu.md` and `bench-gpu.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {"conditions": where, "seconds": seconds, "rows": [row.to_json() for row in rows]}
    known = [f"- {name}: {report.shown(value)}" for name, value in where.items() if value]
    text = [
        "Medians of one run in which the contenders take turns; a ratio is one of medians, its",
        "quartiles are those of the ratios round by round.",
        "",
        report.table(rows),
        "",
        "Not measured:",
        "",
        report.skipped(rows),
        "",
        "Conditions:",
        "",
        *known,
        f"- duration: {seconds:.0f} s",
    ]
    report.replace(folder / "bench-gpu.json", json.dumps(numbers, indent=1, allow_nan=False) + "\n")
    report.replace(folder / "bench-gpu.md", "\n".join(text) + "\n")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the code")
    parser.add_argument("--only", default="", metavar="PART", help="jobs with this in their names")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all rows")
    parser.add_argument("--output", type=Path, default=Path("out"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if not torch.cuda.is_available() and not options.small:
        print("This machine has no GPU that torch can use, so nothing was measured.")
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = replace(TINY, seconds=0.01) if options.small else SETTINGS
    warnings.simplefilter("ignore")  # torch's hints would hide the table
    compile_extension()
    rows = run(Bench(device, settings), options.output, options.seconds, options.only)
    print(f"\n{(options.output / 'bench-gpu.md').read_text()}\nWritten to {options.output}")
    return int(any((row.skipped or "").startswith("failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
