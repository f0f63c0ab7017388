"""The same on a GPU, and what matters only there. Rows are skipped where there is none."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from surgery import apply_dropconnect
from surgery.ops import Law, Layout, draw_key, drop_weight

from . import peers
from .layers import P, ours_of, timed_training
from .measure import Measured, Settings, Work, interleaved, synchronize
from .models import LanguageModel, step_of
from .rows import MICRO, MILLI, OURS, PLAIN, Goal, Row, in_unit

Filler = Callable[[Row, Settings], None]


def gpu(settings: Settings) -> list[Row]:
    """All rows of the GPU."""
    rows = []
    for row, fill in ROWS:
        row = copy.deepcopy(row)
        row.skipped = _reason(row, settings)
        if row.skipped is None:
            try:
                fill(row, settings)
            except Exception as error:  # the other rows go on
                reason = str(error).partition("\n")[0]
                row.skipped = f"failed: {type(error).__name__}: {reason}"
            torch.cuda.empty_cache()
        rows.append(row)
    return rows


def _reason(row: Row, settings: Settings) -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    heavy = "Llama" in row.work or "reduce-overhead" in row.work
    if heavy and settings.quick:
        return "left out of the quick run"
    if "Llama" in row.work and find_spec("transformers") is None:
        return "transformers not installed"
    return None


def _bandwidth(row: Row, settings: Settings) -> None:
    weight = torch.randn(settings.size(8192), settings.size(8192), device="cuda")
    law = Law.of(P, weight.device, weight.dtype)
    key, layout = draw_key(weight.device), Layout.elements(weight.numel())
    works: dict[str, Work] = {
        PLAIN: weight.clone,
        OURS: lambda: drop_weight(weight, key, law, layout),
        "F.dropout": lambda: torch.nn.functional.dropout(weight, P),
    }
    with torch.no_grad():
        row.values = in_unit(interleaved(works, settings), MICRO)


def _per_example(row: Row, settings: Settings) -> None:
    examples, width = settings.size(128), settings.size(1024)
    plain = nn.Linear(width, width, device="cuda")
    made, row.missing = peers.available(
        {peers.SPIKING: lambda: peers.spiking(plain, P, 1, None).cuda()}
    )
    models = {PLAIN: plain, OURS: ours_of(plain, nn.Linear, P, sampling="example"), **made}
    x = torch.randn(examples, width, device="cuda", requires_grad=True)
    row.values = timed_training(models, (x,), torch.randn_like(x), settings)


def _lstm(row: Row, settings: Settings) -> None:
    """With warnings as errors: cuDNN warns if the weights are not one contiguous chunk."""
    hidden = settings.size(512)
    plain = nn.LSTM(hidden, hidden, num_layers=2, device="cuda")
    models = {PLAIN: plain, OURS: ours_of(plain, nn.LSTM, P)}
    x = torch.randn(70, 20, hidden, device="cuda")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*chunk of memory.*")
        row.values = timed_training(models, (x,), torch.randn_like(x), settings)


def _transformer_steps(mode: str | None) -> dict[str, Work]:
    base = LanguageModel(1000, 256, 4, heads=4).cuda()
    tokens = torch.randint(1000, (16, 129), device="cuda")
    models = {PLAIN: base, OURS: ours_of(base, nn.Linear, P)}
    return {
        name: step_of(torch.compile(model, mode=mode), tokens)  # type: ignore[arg-type]
        for name, model in models.items()
    }


def _graphs(row: Row, settings: Settings) -> None:
    steps = _transformer_steps("reduce-overhead")
    row.values = in_unit(interleaved(steps, settings), MILLI)


def _synchronisations(row: Row, settings: Settings) -> None:
    """Calls that make the host wait for the GPU in a step, by the profiler."""
    base = LanguageModel(1000, 256, 4, heads=4).cuda()
    tokens = torch.randint(1000, (16, 129), device="cuda")
    for name, model in {PLAIN: base, OURS: ours_of(base, nn.Linear, P)}.items():
        step = step_of(model, tokens)
        for _ in range(3):
            step()
        synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            step()
        waits = sum(event.count for event in profiler.key_averages() if event.key in WAITS)
        row.values[name] = Measured((float(waits),))
    extra = row.values[OURS].median - row.values[PLAIN].median
    row.values = {OURS: Measured((extra,))}


WAITS = (
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "aten::_local_scalar_dense",
)
"""`cudaDeviceSynchronize` is the profiler's own, at its end."""


def _llama(row: Row, settings: Settings) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    tokens = torch.randint(32000, (4, 2048), device="cuda")
    medians: dict[str, list[float]] = {PLAIN: [], OURS: []}
    compiled = torch.compile(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)

    def step() -> None:
        compiled(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    _alternate(model, step, medians, settings)
    row.values = {name: Measured(tuple(values)).scaled(MILLI) for name, values in medians.items()}


def _alternate(model: Any, step: Work, found: dict[str, list[float]], settings: Settings) -> None:
    """One model, with and without: two of them would not fit beside each other everywhere. p = 0 is
    not the same as plain in a compiled graph, so surgery comes and goes; dynamo keeps both graphs."""
    from surgery import strip_dropconnect

    for _ in range(3 if settings.quick else 10):
        for name in (PLAIN, OURS):
            if name == OURS:
                apply_dropconnect(model, "all-linear", p=0.1)
            step()  # compiles, or warms up
            found[name].append(interleaved({name: step}, _one_round(settings))[name].median)
            if name == OURS:
                strip_dropconnect(model)


def _one_round(settings: Settings) -> Settings:
    return Settings(rounds=3, seconds=0.0, sample=settings.sample)


ROWS: tuple[tuple[Row, Filler], ...] = (
    (
        Row(
            "gpu",
            "mask and apply, 8192x8192, against a copy (80% of its bandwidth)",
            "µs",
            Goal(1 / 0.8),
        ),
        _bandwidth,
    ),
    (
        Row(
            "gpu",
            "per example, 1024x1024, 128 examples, forward + both gradients",
            "ms",
            Goal(0.8, "value"),
        ),
        _per_example,
    ),
    (Row("gpu", "LSTM 2 x 512, cuDNN, no warning about chunks", "ms", Goal(1.03)), _lstm),
    (
        Row(
            "gpu",
            'transformer of 4 layers, CUDA graphs (mode="reduce-overhead"), training step',
            "ms",
            Goal(1.02),
        ),
        _graphs,
    ),
    (
        Row(
            "gpu",
            "waits of the host for the GPU in a step, beyond plain",
            "calls",
            Goal(0.0, "value"),
        ),
        _synchronisations,
    ),
    (
        Row("gpu", "Llama-shaped 1B, bf16, 8192 tokens, compiled training step", "ms", Goal(1.02)),
        _llama,
    ),
)
