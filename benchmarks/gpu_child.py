"""One contender of a compiled row, in a process of its own: all compile at the same time, one that
takes too long can be killed, and then they take turns as the parent asks.

    python -m benchmarks.gpu_child '{"model": "bert", "kind": "ours", "device": "cuda", "divide": 1}'

prints lines that begin with `MARK`: first how long compiling took, then, for each number that it reads,
the seconds of so many steps.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from surgery import apply_dropconnect

from . import peers
from .gpu_measure import MEGA, Bench
from .gpu_models import bert_model, bert_step, llama_model, llama_step
from .layers import ours_of, training_work
from .measure import FULL, TINY, Settings, Work, synchronize
from .models import LanguageModel, step_of

P = 0.1
MARK = "child: "
KINDS = ("plain", "ours", peers.PARAMETRIZE)


def changed(model: nn.Module, kind: str, targets: Any) -> nn.Module:
    if kind == "plain":
        return model
    if kind == "ours":
        return apply_dropconnect(model, targets, p=P)
    return peers.parametrized_linears(model, P)


def _compiled(bench: Bench, model: nn.Module, mode: str | None = None) -> Any:
    """On tiny models, where the code is tried and not the speed, dynamo alone."""
    return torch.compile(model, mode=mode, backend="eager" if bench.small else "inductor")


def bert(bench: Bench, kind: str) -> Work:
    model = changed(bert_model(bench.small).to(bench.device), kind, "all-linear")
    fused = bench.device == "cuda"
    return bert_step(bench, model, autocast=True, call=_compiled(bench, model), fused=fused)


def llama(bench: Bench, kind: str) -> Work:
    model = changed(llama_model(bench), kind, "all-linear")
    return llama_step(bench, model, _compiled(bench, model))


def graphs(bench: Bench, kind: str) -> Work:
    """CUDA graphs."""
    model = changed(LanguageModel(1000, 256, 4, heads=4).to(bench.device), kind, nn.Linear)
    tokens = torch.randint(1000, (2 if bench.small else 16, 129), device=bench.device)
    mode = None if bench.small else "reduce-overhead"
    return step_of(_compiled(bench, model, mode), tokens)


MODELS: dict[str, Callable[[Bench, str], Work]] = {"bert": bert, "llama": llama, "graphs": graphs}


def first_calls(bench: Bench) -> dict[str, float]:
    """Seconds of the first forward and backward of each sampling, after those of a plain layer."""
    plain = nn.Linear(256, 256, device=bench.device)
    x, grad = bench.randn(32, 256, grad=True), bench.randn(32, 256)

    def seconds(model: nn.Module) -> float:
        synchronize()
        begun = time.perf_counter()
        training_work(model, (x,), grad)()
        synchronize()
        return time.perf_counter() - begun

    seconds(plain)
    found = {"plain": seconds(plain)}
    for sampling in ("batch", "example", "gaussian"):
        name = "ours" if sampling == "batch" else f"ours, {sampling}"
        found[name] = seconds(ours_of(plain, nn.Linear, P, sampling=sampling))
    net = ours_of(nn.Sequential(plain, nn.ReLU()), nn.Linear, P, inference="moments").eval()
    synchronize()
    begun = time.perf_counter()
    with torch.no_grad():
        net(x)
    synchronize()
    found["ours, moments"] = time.perf_counter() - begun
    return found


def _bench(device: str, divide: int) -> Bench:
    settings: Settings = FULL if divide == 1 else TINY
    return Bench(device, settings)


def _say(answer: Any) -> None:
    print(f"{MARK}{json.dumps(answer)}", flush=True)


def main() -> None:
    options = json.loads(sys.argv[1])
    bench = _bench(options["device"], options["divide"])
    if options["model"] == "first":
        _say(first_calls(bench))
        return
    torch.manual_seed(0)
    step = MODELS[options["model"]](bench, options["kind"])
    begun = time.perf_counter()
    for _ in range(3):
        step()
    synchronize()
    compiling = time.perf_counter() - begun
    peak = 0.0
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        synchronize()
        peak = torch.cuda.max_memory_allocated() / MEGA
    _say({"compiling": compiling, "peak": peak})
    for line in sys.stdin:
        synchronize()
        begun = time.perf_counter()
        for _ in range(int(line)):
            step()
        synchronize()
        _say((time.perf_counter() - begun) / int(line))


if __name__ == "__main__":
    main()
