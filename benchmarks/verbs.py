"""What surgery itself costs: apply and strip, a change of p, the first use."""

from __future__ import annotations

from collections import OrderedDict
from itertools import cycle
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from surgery import apply_dropconnect, set_p, strip_dropconnect

from . import peers
from .child import in_child
from .measure import Measured, Settings, interleaved
from .rows import MICRO, MILLI, OURS, PLAIN, Goal, Row, in_unit

P = 0.5


def many_linears(count: int, width: int = 8) -> nn.Sequential:
    return nn.Sequential(OrderedDict((f"fc{i}", nn.Linear(width, width)) for i in range(count)))


def apply_and_strip(settings: Settings) -> list[Row]:
    """Put DropConnect into 1,000 layers and take it out."""
    count = settings.count(1000)
    model, other = many_linears(count), many_linears(count)

    def ours() -> None:
        strip_dropconnect(apply_dropconnect(model, nn.Linear, p=P))

    def parametrized() -> None:
        for layer in other:
            parametrize.register_parametrization(layer, "weight", nn.Identity())
        for layer in other:
            parametrize.remove_parametrizations(layer, "weight")

    found = interleaved({OURS: ours, peers.PARAMETRIZE: parametrized}, settings)
    work = f"apply + strip, {count:,} linears"
    copied = {OURS: Measured((float(weights_made(model)),))}
    return [
        Row("verbs", work, "ms", Goal(50.0, "value"), in_unit(found, MILLI)),
        Row("verbs", f"{work}: tensors copied", "tensors", Goal(0.0, "value"), copied),
    ]


class _Results(TorchDispatchMode):
    """Counts the tensors of at least a size that operations return."""

    def __init__(self, numel: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = numel
        self.found: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            self.found += isinstance(value, Tensor) and value.numel() >= self.numel
        return result


def weights_made(model: nn.Sequential) -> int:
    """How many tensors of a weight's size apply and strip make, of parameters that are other ones."""
    before = {name: (id(value), value.data_ptr()) for name, value in model.named_parameters()}
    results = _Results(next(model.parameters()).numel())
    with results:
        strip_dropconnect(apply_dropconnect(model, nn.Linear, p=P))
    after = {name: (id(value), value.data_ptr()) for name, value in model.named_parameters()}
    return results.found + sum(after[name] != place for name, place in before.items())


def change_p(settings: Settings) -> list[Row]:
    """What a schedule does at every step."""
    count = settings.count(1000)
    model = apply_dropconnect(many_linears(count), nn.Linear, p=P)
    probabilities = cycle((0.1, 0.2, 0.3))
    found = interleaved({OURS: lambda: set_p(model, next(probabilities))}, settings)
    work = f"set_p, {count:,} sites"
    return [
        Row("verbs", work, "µs a site", Goal(1.0, "value"), in_unit(found, MICRO / count)),
        _recompiles(),
    ]


def _recompiles() -> Row:
    """Graphs that dynamo captures after the first step, while p changes at each."""
    from torch._dynamo.utils import counters

    model = apply_dropconnect(many_linears(4, width=16), nn.Linear, p=P)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 16)
    compiled(x).sum().backward()
    before = counters["stats"]["unique_graphs"]
    for p in (0.0, 0.1, 0.3, 0.9, 1.0):
        set_p(model, p)
        compiled(x).sum().backward()
    again = float(counters["stats"]["unique_graphs"] - before)
    work = "set_p each step under torch.compile: recompilations in 5 steps"
    return Row("verbs", work, "graphs", Goal(0.0, "value"), {OURS: Measured((again,))})


def compiling(settings: Settings) -> list[Row]:
    """What a site adds to the time that a model takes to compile, in fresh processes."""
    layers = 12
    work = f"first step of a transformer of {layers} layers, {4 * layers + 1} Linears, aot_eager"
    goal = Goal(1.5)
    if settings.quick or settings.divide > 1:
        return [Row("verbs", work, "s", goal, skipped="left out of the quick run")]
    times: dict[str, list[float]] = {kind: [] for kind in (PLAIN, OURS, peers.F_DROPOUT)}
    for _ in range(3):
        for kind, taken in times.items():
            taken.append(in_child("first_compiled", kind=kind, layers=layers))
    return [Row("verbs", work, "s", goal, {kind: Measured(tuple(t)) for kind, t in times.items()})]


def first_step(settings: Settings) -> list[Row]:
    """The first forward and backward in a process, with no kernels in the cache, and with them."""
    tokens, width = settings.size(32), settings.size(768)
    works = [
        f"first step of Linear {tokens} x {width} x {width}, kernels {state}"
        for state in ("to be compiled", "in the cache")
    ]
    goal = Goal(5.0, "value")
    if settings.quick:
        skipped = "left out of the quick run"
        return [Row("verbs", work, "s", goal, skipped=skipped) for work in works]
    repeats = 1 if settings.divide > 1 else 3
    cold: list[float] = []
    warm: list[float] = []
    plain: list[float] = []
    for _ in range(repeats):
        with TemporaryDirectory() as folder:
            place = {"DROPCONNECT_CACHE_DIR": folder}
            plain.append(in_child("first_use", place, kind=PLAIN, tokens=tokens, width=width))
            for times in (cold, warm):
                times.append(in_child("first_use", place, kind=OURS, tokens=tokens, width=width))
    base = Measured(tuple(plain))
    return [
        Row("verbs", work, "s", goal, {PLAIN: base, OURS: Measured(tuple(times))})
        for work, times in zip(works, (cold, warm))
    ]
