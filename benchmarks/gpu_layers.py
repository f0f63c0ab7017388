"""Rows of the GPU: a mask, one layer, the paper's modes, an LSTM."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from surgery.ops import Law, Layout, draw_key, drop_weight

from . import peers
from .gpu_measure import Bench, beyond, host_times, name_of, row, trained, usable
from .layers import ours_of, training_work
from .measure import Work
from .paper import Formula
from .paper import P as HALF
from .rows import MICRO, OURS, PLAIN, Goal, Row, in_unit

P = 0.1
DROPOUT = "F.dropout"
OWN_KEY = "ours, the key alone"


def mask(bench: Bench, dtype: torch.dtype) -> list[Row]:
    """A pass over a weight, against a copy into memory that is there."""
    side = bench.size(8192)
    weight = bench.randn(side, side, dtype=dtype)
    law, key = Law.of(0.3, weight.device, dtype), draw_key(weight.device)
    layout, place = Layout.elements(weight.numel()), torch.empty_like(weight)
    works: dict[str, Work] = {
        PLAIN: lambda: place.copy_(weight),
        OURS: lambda: drop_weight(weight, key, law, layout),
        DROPOUT: lambda: F.dropout(weight, 0.3),
    }
    with torch.no_grad():
        values = bench.times(works, MICRO)
    work = f"mask and apply, {side}x{side}, {name_of(dtype)}, against `copy_`"
    return [row(work, "µs", Goal(1.05), values)]


def mask_cast(bench: Bench) -> list[Row]:
    """What autocast needs: the masked weight in bfloat16, against the cast alone."""
    side = bench.size(8192)
    weight = bench.randn(side, side)
    law, key = Law.of(0.3, weight.device, weight.dtype), draw_key(weight.device)
    layout = Layout.elements(weight.numel())
    works: dict[str, Work] = {
        PLAIN: lambda: weight.to(torch.bfloat16),
        OURS: lambda: drop_weight(weight, key, law, layout, dtype=torch.bfloat16),
        DROPOUT: lambda: F.dropout(weight, 0.3).to(torch.bfloat16),
    }
    with torch.no_grad():
        values = bench.times(works, MICRO)
    work = f"float32 weight to masked bfloat16, {side}x{side}, against the cast"
    return [row(work, "µs", Goal(1.05), values)]


def mask_host(bench: Bench) -> list[Row]:
    """What the host needs for one small mask."""
    weight = bench.randn(64, 64)
    law, key = Law.of(0.3, weight.device, weight.dtype), draw_key(weight.device)
    layout = Layout.elements(weight.numel())
    works: dict[str, Work] = {
        PLAIN: weight.clone,
        OURS: lambda: drop_weight(weight, key, law, layout),
        OWN_KEY: lambda: draw_key(weight.device),
        DROPOUT: lambda: F.dropout(weight, 0.3),
    }
    with torch.no_grad():
        values = in_unit(host_times(works, bench.settings.rounds, calls=100), MICRO)
    note = "plain is `clone`"
    return [row("host time of one mask, 64x64", "µs", Goal(8.0, "value"), values, note=note)]


def linear(
    bench: Bench, tokens: int, width: int, out: int, goal: float, host: bool = False
) -> list[Row]:
    """Forward and backward of one layer in bfloat16."""
    dtype = torch.bfloat16
    tokens, width, out = map(bench.size, (tokens, width, out))
    plain = nn.Linear(width, out, device=bench.device, dtype=dtype)
    x, grad = bench.randn(tokens, width, dtype=dtype, grad=True), bench.randn(tokens, out).to(dtype)
    builders: dict[str, Callable[[], nn.Module]] = {
        peers.PARAMETRIZE: lambda: peers.parametrized(plain, ["weight"], P),
        peers.F_DROPOUT: lambda: peers.f_dropout(plain, [], P),
        peers.BAAL: lambda: peers.baal(plain, [], P).to(bench.device, dtype),
    }
    made, missing = usable(builders, lambda model: training_work(model, (x,), grad)())
    works = trained({PLAIN: plain, OURS: ours_of(plain, nn.Linear, P), **made}, x, grad)
    size = f"{tokens}x{width}x{out}"
    work = f"Linear bfloat16, eager, {size}, forward + backward"
    rows = [row(work, "µs", Goal(goal), bench.times(works, MICRO), missing=missing)]
    if host:
        times = in_unit(host_times(works, bench.settings.rounds), MICRO)
        work = f"host time of a Linear step beyond plain, {size}"
        rows.append(row(work, "µs", Goal(40.0, "value"), beyond(times, PLAIN)))
    return rows


def per_example(bench: Bench, dtype: torch.dtype) -> list[Row]:
    """The paper's sizes (section 6, table 2): time and memory of all three passes."""
    examples, width = bench.size(128), bench.size(1024)
    plain = nn.Linear(width, width, device=bench.device, dtype=dtype)
    x, grad = (bench.randn(examples, width, dtype=dtype, grad=grad) for grad in (True, False))
    builders: dict[str, Callable[[], nn.Module]] = {
        peers.EINSUM: lambda: Formula(peers.einsum, plain.weight),
        peers.SPIKING: lambda: peers.spiking(plain, HALF, 1, None).to(bench.device, dtype),
    }
    made, missing = usable(builders, lambda model: training_work(model, (x,), grad)())
    models = {PLAIN: plain, OURS: ours_of(plain, nn.Linear, HALF, sampling="example"), **made}
    works = trained(models, x, grad)
    work = f"per example, {width}x{width}, {examples} examples, {name_of(dtype)}, three passes"
    return [
        row(work, "ms", Goal(0.25, "value"), bench.times(works), missing=missing),
        row(f"{work}: memory, results included", "MB", Goal(8.0, "value"), bench.peaks(works)),
    ]


def per_sequence(bench: Bench, dtype: torch.dtype) -> list[Row]:
    """A mask for each sequence of a transformer's layer."""
    examples, tokens, width, out = 16, bench.size(128), bench.size(768), bench.size(3072)
    plain = nn.Linear(width, out, device=bench.device, dtype=dtype)
    x = bench.randn(examples, tokens, width, dtype=dtype, grad=True)
    grad = bench.randn(examples, tokens, out, dtype=dtype)
    builders: dict[str, Callable[[], nn.Module]] = {
        peers.EINSUM: lambda: Formula(peers.einsum, plain.weight)
    }
    made, missing = usable(builders, lambda model: training_work(model, (x,), grad)())
    models = {PLAIN: plain, OURS: ours_of(plain, nn.Linear, HALF, sampling="example"), **made}
    values = bench.times(trained(models, x, grad))
    work = f"per example, [{examples}, {tokens}, {width}] x {out}, {name_of(dtype)}"
    return [row(f"{work}, forward + backward", "ms", Goal(1.3), values, missing=missing)]


def gaussian(bench: Bench, dtype: torch.dtype) -> list[Row]:
    """Local reparameterisation: two products for one."""
    tokens, width = bench.size(128), bench.size(1024)
    plain = nn.Linear(width, width, device=bench.device, dtype=dtype)
    models = {PLAIN: plain, OURS: ours_of(plain, nn.Linear, HALF, sampling="gaussian")}
    x, grad = (bench.randn(tokens, width, dtype=dtype, grad=grad) for grad in (True, False))
    values = bench.times(trained(models, x, grad), MICRO)
    work = f'sampling="gaussian", {tokens}x{width}x{width}, {name_of(dtype)}, forward + backward'
    return [row(work, "µs", Goal(2.0), values)]


def moments(bench: Bench) -> list[Row]:
    """Inference through a ReLU."""
    tokens, width, out = bench.size(2048), bench.size(768), bench.size(3072)
    plain = nn.Sequential(nn.Linear(width, out), nn.ReLU()).to(bench.device)
    ours = ours_of(plain, nn.Linear, 0.3, inference="moments")
    x = bench.randn(tokens, width)
    works: dict[str, Work] = {
        name: partial(model.eval(), x) for name, model in {PLAIN: plain, OURS: ours}.items()
    }
    with torch.no_grad():
        values = bench.times(works, MICRO)
    work = f'inference="moments", Linear {tokens}x{width}x{out} and ReLU, float32, forward'
    return [row(work, "µs", Goal(2.2), values)]


def lstm(bench: Bench, dtype: torch.dtype) -> list[Row]:
    """Recurrent weights of AWD-LSTM's sizes, on cuDNN."""
    hidden, steps, batch = bench.size(1150), bench.settings.count(70), bench.settings.count(80)
    plain = nn.LSTM(hidden, hidden, 3, device=bench.device, dtype=dtype)
    names = [f"weight_hh_l{layer}" for layer in range(3)]
    x, grad = (bench.randn(steps, batch, hidden, dtype=dtype) for _ in range(2))
    builders: dict[str, Callable[[], nn.Module]] = {
        peers.PARAMETRIZE: lambda: peers.parametrized(plain, names, HALF),
        peers.WEIGHT_DROP: lambda: peers.weight_drop(plain, names, HALF),
        peers.FASTAI: lambda: peers.fastai(plain, names, HALF),
    }
    ours = ours_of(plain, nn.LSTM, HALF)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        training_work(ours, (x,), grad)()
    of_chunks = any("chunk of memory" in str(one.message) for one in told)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made, missing = usable(builders, lambda model: training_work(model, (x,), grad)())
        values = bench.times(trained({PLAIN: plain, OURS: ours, **made}, x, grad))
    work = f"LSTM 3x{hidden}, T={steps}, B={batch}, {name_of(dtype)}, forward + backward"
    note = "WITH cuDNN's warning of chunks" if of_chunks else "no warning"
    return [row(work, "ms", Goal(1.03), values, missing=missing, note=note)]
