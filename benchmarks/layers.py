"""One mask for each forward call: the mask itself, linear layers, an LSTM."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import apply_dropconnect
from surgery.ops import Law, Layout, draw_key, drop_weight, masked_formula
from surgery.ops.cpu.workspace import Block
from surgery.ops.law import Mask
from surgery.ops.mask import drop_both
from surgery.ops.switch import set_compile_enabled

from . import peers
from .measure import Settings, Work, clear_gradients, interleaved
from .rows import MILLI, NANO, OURS, PLAIN, Goal, Row, in_unit

P = 0.5


@contextmanager
def without_compiler() -> Iterator[None]:
    """Masks by the plain formula, as on a machine without a compiler."""
    before = set_compile_enabled(False)
    try:
        yield
    finally:
        set_compile_enabled(before)


def mask_and_apply(settings: Settings) -> list[Row]:
    """Nanoseconds a weight, for a weight that stays in cache and one that does not."""
    return [
        row
        for side in ((1024,) if settings.quick else (1024, 4096))
        for row in _mask_rows(settings.size(side), settings, device="cpu")
    ]


INDUCTOR = "ours, by inductor"
FALLBACK = "ours, no compiler"
FRESH = "ours, into fresh memory"


def _mask_rows(side: int, settings: Settings, device: str) -> list[Row]:
    weight = torch.randn(side, side, device=device)
    law, key = Law.of(P, weight.device, weight.dtype), draw_key(weight.device)
    layout, block = Layout.elements(weight.numel()), Block(weight)
    place = torch.empty_like(weight)

    def fallback() -> Tensor:
        with without_compiler():
            return drop_weight(weight, key, law, layout)

    contenders: dict[str, Work] = {
        PLAIN: lambda: torch.mul(weight, 2.0, out=place),
        OURS: lambda: drop_both(weight, None, None, Mask(key, law, layout), block),
        FRESH: lambda: drop_weight(weight, key, law, layout),
        "F.dropout": lambda: F.dropout(weight, P),
        FALLBACK: fallback,
    }
    if settings.divide == 1:  # tests do not compile
        assert isinstance(key, Tensor)  # as everywhere but on a GPU
        formula = torch.compile(masked_formula, dynamic=True, fullgraph=True)
        flat, tensors = weight.view(-1), (key, law.threshold, law.scale)
        contenders[INDUCTOR] = lambda: formula(flat, None, *tensors, None)
        dropout = torch.compile(F.dropout)
        contenders["F.dropout, compiled"] = lambda: dropout(weight, P)
    with torch.no_grad():
        values = in_unit(interleaved(contenders, settings), NANO / weight.numel())
    slow = values.pop(FALLBACK)
    work = f"mask and apply, a weight of {side}x{side}"
    note = "plain is `torch.mul`, both into memory that is there; time per weight"
    others = {name: value for name, value in values.items() if name not in (OURS, FRESH, INDUCTOR)}
    return [
        Row("mask", work, "ns", Goal(0.16, "value"), values, note=note),
        Row("mask", f"{work}: beside `torch.mul`", "ns", Goal(3.0), dict(values), note=note),
        Row(
            "mask",
            f"{work}: without a compiler",
            "ns",
            Goal(1.5, "value"),
            {**others, OURS: slow},
            note="time per weight",
        ),
    ]


SHAPES = (
    (32, 768, 768, 1.35),
    (128, 1024, 1024, 1.20),
    (512, 768, 3072, 1.06),
    (2048, 768, 768, 1.02),
    (2048, 768, 3072, 1.02),
)
"""Tokens, inputs, outputs, goal."""


def linear(settings: Settings) -> list[Row]:
    """Forward and backward of one layer in the midst of an eager model: its input has a gradient."""
    return [
        _linear_row(settings.size(tokens), settings.size(width), settings.size(out), goal, settings)
        for tokens, width, out, goal in (SHAPES[:4] if settings.quick else SHAPES)
    ]


def linear_contenders(layer: nn.Linear, p: float) -> tuple[dict[str, Any], dict[str, str]]:
    """The layer as it is, ours, and what every peer makes of it; and who is missing, and why."""
    made, missing = peers.available(
        {
            peers.WEIGHT_DROP: lambda: peers.weight_drop(layer, ["weight"], p),
            peers.FASTAI: lambda: peers.fastai(layer, ["weight"], p),
            peers.BAAL: lambda: peers.baal(layer, ["weight"], p),
            peers.PARAMETRIZE: lambda: peers.parametrized(layer, ["weight"], p),
            peers.F_DROPOUT: lambda: peers.f_dropout(layer, ["weight"], p),
        }
    )
    return {PLAIN: layer, OURS: ours_of(layer, nn.Linear, p), **made}, missing


def ours_of(model: nn.Module, targets: Any, p: float, **options: Any) -> nn.Module:
    return apply_dropconnect(copy.deepcopy(model), targets, p=p, **options)


def _linear_row(tokens: int, width: int, out: int, goal: float, settings: Settings) -> Row:
    models, missing = linear_contenders(nn.Linear(width, out), P)
    x = torch.randn(tokens, width, requires_grad=True)
    values = timed_training(models, (x,), torch.randn(tokens, out), settings)
    work = f"Linear, {tokens} tokens x {width} x {out}, forward + backward"
    return Row("linear", work, "ms", Goal(goal), values, missing)


def timed_training(
    models: dict[str, nn.Module], inputs: Sequence[Tensor], grad: Tensor, settings: Settings
) -> Any:
    """Milliseconds of forward and backward of each model."""
    works = {name: training_work(model, inputs, grad) for name, model in models.items()}
    return in_unit(interleaved(works, settings), MILLI)


def training_work(model: nn.Module, inputs: Sequence[Tensor], grad: Tensor) -> Work:
    leaves = [*model.parameters(), *inputs]

    def work() -> None:
        clear_gradients(leaves)
        output = model(*inputs)
        (output[0] if isinstance(output, tuple) else output).backward(grad)

    return work


def mixout(settings: Settings) -> list[Row]:
    """A dropped weight goes to its pretrained value."""
    tokens, width, out = (settings.size(size) for size in (128, 1024, 1024))
    layer = nn.Linear(width, out)
    models = {
        PLAIN: layer,
        OURS: ours_of(layer, nn.Linear, P, toward="pretrained"),
        peers.MIXOUT: peers.mixout(layer, P),
    }
    x = torch.randn(tokens, width, requires_grad=True)
    values = timed_training(models, (x,), torch.randn(tokens, out), settings)
    work = f'Linear, {tokens} x {width} x {out}, toward="pretrained", forward + backward'
    note = "mixout draws one mask for all rows of a weight; ours one for each entry"
    missing = {"mixout": peers.NOT_ON_INDEX}
    return [Row("linear", work, "ms", None, values, missing, note=note)]


def lstm(settings: Settings) -> list[Row]:
    """Two layers, the recurrent weights dropped."""
    hidden, steps, batch = settings.size(512), settings.count(70), settings.count(20)
    plain = nn.LSTM(hidden, hidden, num_layers=2)
    names = ["weight_hh_l0", "weight_hh_l1"]
    builders: dict[str, Callable[[], Any]] = {
        peers.WEIGHT_DROP: lambda: peers.weight_drop(plain, names, P),
        peers.FASTAI: lambda: peers.fastai(plain, names, P),
        peers.PARAMETRIZE: lambda: peers.parametrized(plain, names, P),
    }
    made, missing = peers.available(builders)
    models = {PLAIN: plain, OURS: ours_of(plain, nn.LSTM, P), **made}
    x = torch.randn(steps, batch, hidden)
    values = timed_training(models, (x,), torch.randn(steps, batch, hidden), settings)
    work = f"LSTM 2 x {hidden}, T={steps}, B={batch}, weight_hh, forward + backward"
    return [Row("lstm", work, "ms", Goal(1.02), values, missing)]
