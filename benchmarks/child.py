"""Jobs for a process of their own: its memory is that of the job, and it compiles for the first time.

    python -m benchmarks.child peak_deep '{"kind": "ours", ...}'

prints its answer as the last line, in JSON.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import peers
from .conditions import ROOT
from .layers import ours_of, training_work
from .measure import Work
from .models import LanguageModel

P = 0.5
KINDS = ("plain", "ours", "F.dropout(W)")


def in_child(job: str, environment: dict[str, str] | None = None, **options: Any) -> float:
    """The answer of a job, run in a fresh process.

    Raises:
        RuntimeError: it failed; the message is the end of what it printed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.child", job, json.dumps(options)],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{job} {options} failed: {done.stderr.strip()[-300:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def peak_deep(kind: str, layers: int, width: int, rows: int) -> float:
    """Bytes that a training step (with SGD) of a deep MLP needs beyond what is there before it."""
    stack = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.ReLU())]
    model = _variant(nn.Sequential(*stack), kind, {})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    work = training_work(model, (torch.randn(rows, width),), torch.randn(rows, width))

    def step() -> None:
        work()
        optimizer.step()
        optimizer.zero_grad()

    return _peak(step)


def peak_example(kind: str, examples: int, width: int) -> float:
    """Bytes that forward and backward of a layer with a mask for each example need."""
    model = _variant(nn.Linear(width, width), kind, {"sampling": "example"})
    x = torch.randn(examples, width, requires_grad=True)
    work = training_work(model, (x,), torch.randn(examples, width))

    def step() -> None:
        work()
        model.zero_grad()
        x.grad = None

    return _peak(step)


def first_use(kind: str, tokens: int, width: int) -> float:
    """Seconds of the first forward and backward of a linear layer in a process."""
    model = _variant(nn.Linear(width, width), kind, {})
    x = torch.randn(tokens, width, requires_grad=True)
    work = training_work(model, (x,), torch.randn(tokens, width))
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def first_compiled(kind: str, layers: int) -> float:
    """Seconds of the first step of a small transformer that is compiled, without those of inductor and
    the C++ compiler."""
    torch.compile(nn.ReLU(), backend="aot_eager")(
        torch.ones(1, requires_grad=True)
    ).sum().backward()
    model = _variant(LanguageModel(50, 16, layers, heads=2), kind, {})
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    tokens = torch.randint(50, (2, 9))
    begun = time.perf_counter()
    compiled(tokens).backward()
    return time.perf_counter() - begun


def _variant(model: nn.Module, kind: str, options: dict[str, Any]) -> nn.Module:
    if kind == "plain":
        return model
    return (
        ours_of(model, nn.Linear, P, **options) if kind == "ours" else peers.f_dropout(model, [], P)
    )


def _peak(step: Work) -> float:
    """Bytes by which the resident memory rises in a step, after steps that compiled and warmed up."""
    for _ in range(3):
        step()
    rises = []
    for _ in range(3):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
        before = _status("VmRSS")
        step()
        rises.append(_status("VmHWM") - before)
    return max(rises)


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(found.group(1)) * 1024


JOBS: dict[str, Callable[..., float]] = {
    "peak_deep": peak_deep,
    "peak_example": peak_example,
    "first_use": first_use,
    "first_compiled": first_compiled,
}

if __name__ == "__main__":
    print(json.dumps(JOBS[sys.argv[1]](**json.loads(sys.argv[2]))))
