"""Rows of the GPU: training steps of whole models in eager mode."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from surgery import apply_dropconnect, strip_dropconnect

from . import peers
from .gpu_measure import MEGA, Bench, host_times, narrow, row, usable
from .layers import ours_of
from .measure import FEWEST, Measured, Settings, Work, interleaved, synchronize
from .models import LanguageModel, step_of
from .rows import MILLI, OURS, PLAIN, Goal, Row, in_unit

P = 0.1
PRETRAINED = "ours, toward pretrained"


def bert_model(small: bool) -> Any:
    """BERT-base for classification, or a tiny one, with random weights."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes: dict[str, int] = {}
    if small:
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        sizes |= {"intermediate_size": 64, "vocab_size": 500}
    return BertForSequenceClassification(BertConfig(**sizes))


def bert_step(
    bench: Bench, model: Any, autocast: bool, call: Any = None, fused: bool = False
) -> Work:
    """Forward under autocast, backward and update."""
    batch, length = (2, 16) if bench.small else (32, 128)
    tokens = torch.randint(0, 400, (batch, length), device=bench.device)
    labels = torch.randint(0, 2, (batch,), device=bench.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=fused or None)
    call = model if call is None else call

    def step() -> None:
        with narrow(bench.device, autocast):
            loss = call(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bert(bench: Bench, autocast: bool, goal: float) -> list[Row]:
    """A step of 32 x 128 tokens: its time, its memory, and what the host does."""
    base = bert_model(bench.small).to(bench.device)
    builders = {peers.PARAMETRIZE: lambda: peers.parametrized_linears(base, P)}
    if autocast:
        builders[peers.BAAL] = lambda: _baal_inside(base).to(bench.device)
    made, missing = usable(builders, lambda model: bert_step(bench, model, autocast)())
    models = {PLAIN: base, OURS: apply_dropconnect(copy.deepcopy(base), "all-linear", p=P), **made}
    if autocast:
        models[PRETRAINED] = apply_dropconnect(
            copy.deepcopy(base), "all-linear", p=P, toward="pretrained"
        )
    works = {name: bert_step(bench, model, autocast) for name, model in models.items()}
    how = "bfloat16 autocast" if autocast else "float32"
    work = f"BERT-base step, 32x128, {how}, eager"
    values = bench.times(works)
    hosts = in_unit(host_times(works, rounds=5, calls=1), MILLI)
    return [
        row(work, "ms", Goal(goal), values, missing=missing),
        row(f"{work}: host time", "ms", None, hosts),
        row(f"{work}: memory", "MB", None, bench.peaks(works)),
    ]


def _baal_inside(base: nn.Module) -> nn.Module:
    """baal replaces children, so the model itself stays what it is."""
    patch = peers.load(peers.BAAL).patch_module
    model: nn.Module = patch(copy.deepcopy(base), ["Linear"], weight_dropout=P)
    return model


def llama_model(bench: Bench) -> nn.Module:
    """Shaped like a Llama of 1.1 billion weights, or a tiny one; bfloat16, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    }
    if bench.small:
        sizes |= {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48}
        sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(bench.device):  # where random numbers cost nothing
            model: nn.Module = LlamaForCausalLM(LlamaConfig(use_cache=False, **sizes))
    finally:
        torch.set_default_dtype(before)
    return model.to(torch.bfloat16)


def llama_step(bench: Bench, model: Any, call: Any = None) -> Work:
    """A step of 4 x 2048 tokens, with SGD."""
    batch, length = (2, 8) if bench.small else (4, 2048)
    tokens = torch.randint(0, 300, (batch, length), device=bench.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    call = model if call is None else call

    def step() -> None:
        call(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


LLAMA = "Llama-shaped 1B, bfloat16, 8,192 tokens"


def llama(bench: Bench) -> list[Row]:
    """One model, operated and stripped in turns: two would not fit on every GPU."""
    model = llama_model(bench)
    step = llama_step(bench, model)
    times: dict[str, list[float]] = {PLAIN: [], OURS: []}
    peaks: dict[str, float] = {}
    for turn in range(2 if bench.small else 4):
        for name in (PLAIN, OURS) if turn % 2 == 0 else (OURS, PLAIN):
            if name == OURS:
                apply_dropconnect(model, "all-linear", p=P)
            peaks[name] = max(_whole_peak(bench, step), peaks.get(name, 0.0))
            times[name] += _few(step)
            if name == OURS:
                strip_dropconnect(model)
    values = {name: Measured(tuple(found)).scaled(MILLI) for name, found in times.items()}
    memory = {name: Measured((peak,)) for name, peak in peaks.items()}
    work = f"{LLAMA}, training step, eager"
    return [
        row(work, "ms", Goal(1.02), values),
        row(f"{work}: peak memory, model included", "MB", Goal(1.0), memory),
    ]


def _few(step: Work) -> tuple[float, ...]:
    few = Settings(rounds=FEWEST, fewest=FEWEST, seconds=0.0, sample=0.0)
    return interleaved({"": step}, few)[""].samples


def _whole_peak(bench: Bench, step: Work) -> float:
    """MB at most in a step, all that is there included; after a step that warms up."""
    if bench.device != "cuda":
        step()
        return 1.0
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / MEGA


def waits(bench: Bench) -> list[Row]:
    """Calls that make the host wait for the GPU in a step, by the profiler."""
    base = LanguageModel(1000, 256, 4, heads=4).to(bench.device)
    tokens = torch.randint(1000, (2 if bench.small else 16, 129), device=bench.device)
    counts = {}
    for name, model in {PLAIN: base, OURS: ours_of(base, nn.Linear, P)}.items():
        step = step_of(model, tokens)
        for _ in range(3):
            step()
        synchronize()
        activities = [ProfilerActivity.CPU]
        if bench.device == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as profiler:
            step()
        counts[name] = sum(event.count for event in profiler.key_averages() if event.key in WAITS)
    extra = Measured((float(counts[OURS] - counts[PLAIN]),))
    work = "waits of the host for the GPU in a step of a transformer, beyond plain"
    return [row(work, "calls", Goal(0.0, "value"), {OURS: extra})]


WAITS = (
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "aten::_local_scalar_dense",
)
"""`cudaDeviceSynchronize` is the profiler's own, at its end."""
