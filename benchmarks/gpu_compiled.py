"""Compiled rows of the GPU. Compiling takes minutes, so contenders do it at the same time, each in a
process of its own; then they take turns."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from . import peers
from .conditions import ROOT
from .gpu_child import MARK
from .gpu_measure import SECTION, Bench, row
from .gpu_models import LLAMA
from .measure import Measured
from .rows import MILLI, OURS, PLAIN, Goal, Row, in_unit


class Child:
    """A process of `gpu_child.py`, and what it says."""

    def __init__(self, bench: Bench, environment: dict[str, str] | None = None, **job: str) -> None:
        options = {**job, "device": bench.device, "divide": bench.settings.divide}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in `end`)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_child", json.dumps(options)],
            cwd=ROOT,
            env={**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "4", **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,  # with the processes that inductor starts
        )
        self._said: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                self._said.put(line.removeprefix(MARK))
        self._said.put(None)

    def answer(self, seconds: float) -> Any:
        """What it says next.

        Raises:
            TimeoutError: nothing in so many seconds.
            RuntimeError: it ended.
        """
        try:
            said = self._said.get(timeout=max(seconds, 0.01))
        except queue.Empty:
            raise TimeoutError from None
        if said is None:
            self._errors.seek(0)
            lines = self._errors.read().strip().splitlines() or ["without a word"]
            raise RuntimeError(f"ended: {lines[-1][:200]}")
        return json.loads(said)

    def steps(self, count: int, seconds: float) -> float:
        """Seconds of a step, on average over so many."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        return float(self.answer(seconds))

    def end(self) -> None:
        """With all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with suppress(OSError):
                assert stream is not None
                stream.close()


KINDS = {
    "bert": (PLAIN, OURS, peers.PARAMETRIZE),
    "llama": (PLAIN, OURS),
    "graphs": (PLAIN, OURS),
}
WORKS = {
    "bert": ("BERT-base step, 32x128, bfloat16 autocast, compiled", 1.0, 4),
    "llama": (f"{LLAMA}, training step, compiled", 1.01, 1),
    "graphs": ("transformer of 4 layers, CUDA graphs, training step", 1.02, 10),
}
"""Name, goal, and steps in a sample."""
ROUNDS = 15


def compiled(bench: Bench, models: Sequence[str], seconds: float) -> list[Row]:
    """The rows of these models, compiled together; what has not compiled after so many seconds is
    killed, and its row says so."""
    children: dict[tuple[str, str], Child] = {}
    try:
        for model in models:
            for kind in KINDS[model]:
                children[model, kind] = Child(bench, model=model, kind=kind)
        ready, missing = _ready(children, seconds)
        rows = []
        for model in models:
            try:
                rows += _rows(bench, model, children, ready, missing)
            except (RuntimeError, OSError) as error:  # the other models go on
                why = f"failed: {type(error).__name__}: {error}"
                rows.append(Row(SECTION, WORKS[model][0], "ms", skipped=why))
            for kind in KINDS[model]:  # memory for the next
                children[model, kind].end()
        return rows
    finally:
        for child in children.values():
            child.end()


def _ready(
    children: dict[tuple[str, str], Child], seconds: float
) -> tuple[dict[tuple[str, str], dict[str, float]], dict[tuple[str, str], str]]:
    """What those said that compiled, and why the others did not."""
    ready, missing = {}, {}
    end = time.monotonic() + seconds
    for name, child in children.items():
        try:
            ready[name] = child.answer(end - time.monotonic())
        except TimeoutError:
            missing[name] = f"did not finish compiling in {seconds:.0f} s"
        except RuntimeError as error:
            missing[name] = str(error)
        if name in missing:
            child.end()
    return ready, missing


def _rows(
    bench: Bench,
    model: str,
    children: dict[tuple[str, str], Child],
    ready: dict[tuple[str, str], dict[str, float]],
    missing: dict[tuple[str, str], str],
) -> list[Row]:
    work, goal, count = WORKS[model]
    kinds = [kind for kind in KINDS[model] if (model, kind) in ready]
    lacking = {kind: missing[model, kind] for kind in KINDS[model] if (model, kind) in missing}
    values = {kind: Measured(()) for kind in kinds}
    if kinds:
        values = _turns(bench, {kind: children[model, kind] for kind in kinds}, count)
    took = ", ".join(f"{kind} {ready[model, kind]['compiling']:.0f} s" for kind in kinds)
    note = f"first steps, all at once: {took}"
    time_row = row(work, "ms", Goal(goal), values, missing=lacking, note=note)
    if PLAIN not in kinds or OURS not in kinds:
        told = "; ".join(f"{kind}: {why}" for kind, why in lacking.items())
        medians = ", ".join(f"{kind} {value.median:.4g} ms" for kind, value in values.items())
        time_row.skipped = f"{told} ({medians or 'nothing measured'})"
        return [time_row]
    peaks = {kind: Measured((ready[model, kind]["peak"] or 1.0,)) for kind in kinds}
    return [time_row, row(f"{work}: peak memory, model included", "MB", None, peaks)]


def _turns(bench: Bench, children: dict[str, Child], count: int) -> dict[str, Measured]:
    samples: dict[str, list[float]] = {name: [] for name in children}
    end = time.monotonic() + bench.settings.seconds
    for done in range(ROUNDS):
        if done >= bench.settings.fewest and time.monotonic() > end:
            break
        for name, child in children.items():
            samples[name].append(child.steps(1 if bench.small else count, seconds=30.0))
    return in_unit({name: Measured(tuple(found)) for name, found in samples.items()}, MILLI)


def first_calls(bench: Bench) -> list[Row]:
    """The first call of each sampling in a process, with nothing in Triton's cache."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TRITON_CACHE_DIR": folder, "TORCHINDUCTOR_CACHE_DIR": folder}
        child = Child(bench, caches, model="first")
        try:
            found = child.answer(60.0)
        finally:
            child.end()
    values = {name: Measured((seconds,)) for name, seconds in found.items()}
    work = "first forward and backward of a Linear in a process, kernels compiled"
    return [row(work, "s", Goal(3.0, "value"), values)]
