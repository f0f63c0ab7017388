"""Bytes: what autograd keeps for backward, and the peak of a training step."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from .child import KINDS, in_child
from .layers import P, linear_contenders, ours_of
from .measure import Measured, Settings
from .rows import OURS, PLAIN, Goal, Row


def kept(settings: Settings) -> list[Row]:
    """Bytes alive after the forward of one layer, beyond those of the plain layer."""
    rows = []
    for side in (256, 2048):
        width = settings.size(side)
        layer = nn.Linear(width, width)
        models, missing = linear_contenders(layer, P)
        models[f"{OURS}, toward pretrained"] = ours_of(layer, nn.Linear, P, toward="pretrained")
        x = torch.randn(8, width, requires_grad=True)
        alive = {name: bytes_after_forward(model, x) for name, model in models.items()}
        values = {
            name: Measured((float(value - alive[PLAIN]),))
            for name, value in alive.items()
            if name != PLAIN
        }
        work = f"kept for backward beyond the plain layer, Linear {width} x {width}"
        rows.append(Row("memory", work, "bytes", Goal(16, "value"), values, missing))
    return rows


def bytes_after_forward(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward allocates and does not free while its output lives."""
    model(x)  # compiles
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = model(x)
    total = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    del output
    return int(total)


def peaks(settings: Settings) -> list[Row]:
    """Rise of the resident memory in a step, each in a process of its own."""
    layers, width = 24, max(settings.size(2048), 64)
    weights = layers * width * width / 1e6
    deep = f"peak memory of a training step beyond plain, {weights:.0f}M weights in {layers} layers"
    examples, side = settings.size(128), max(settings.size(1024), 64)
    single = f"per example, {side}x{side}, {examples} examples: peak memory beyond plain"
    goals = Goal(1.0, "value"), Goal(30.0, "value")
    skipped = _reason(settings)
    if skipped is not None:
        return [
            Row("memory", deep, "largest weights", goals[0], skipped=skipped),
            Row("memory", single, "MB", goals[1], skipped=skipped),
        ]
    steps = {
        kind: in_child("peak_deep", TENSORS_ALONE, kind=kind, layers=layers, width=width, rows=32)
        for kind in KINDS
    }
    alone = {
        kind: in_child("peak_example", TENSORS_ALONE, kind=kind, examples=examples, width=side)
        for kind in (PLAIN, OURS)
    }
    return [
        Row("memory", deep, "largest weights", goals[0], _beyond(steps, 4.0 * width * width)),
        Row("memory", single, "MB", goals[1], _beyond(alone, 1e6)),
    ]


TENSORS_ALONE = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
"""For glibc: large tensors have pages of their own, which are given back when they are freed. Else what
is resident depends on how the heap was cut up before."""


def _reason(settings: Settings) -> str | None:
    if settings.quick:
        return "left out of the quick run"
    if not Path("/proc/self/clear_refs").exists():
        return "needs Linux's high-water mark of resident memory"
    return None


def _beyond(found: dict[str, float], unit: float) -> dict[str, Measured]:
    return {
        name: Measured(((value - found[PLAIN]) / unit,))
        for name, value in found.items()
        if name != PLAIN
    }
