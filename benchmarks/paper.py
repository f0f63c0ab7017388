"""The paper's modes: a mask for each example, Gaussian sampling, moments, Monte Carlo prediction."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surgery import apply_dropconnect, mc_predict

from . import peers
from .layers import ours_of, timed_training
from .measure import Measured, Settings, Work, interleaved
from .rows import MILLI, OURS, PLAIN, Goal, Row, in_unit

P = 0.5


class Formula(nn.Module):
    """A function of input, weight and p as a module."""

    def __init__(self, formula: Callable[[Tensor, Tensor, float], Tensor], weight: Tensor) -> None:
        super().__init__()
        self.formula = formula
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, self.weight, P)


def per_example(settings: Settings) -> list[Row]:
    """The paper's sizes (section 6, table 2), and a transformer's with one mask for each sequence."""
    return [_vectors(settings), _sequences(settings)]


def _vectors(settings: Settings) -> Row:
    examples, width = settings.size(128), settings.size(1024)
    plain = nn.Linear(width, width)
    work = f"per example, {width}x{width}, {examples} examples, forward + both gradients"
    goal = Goal(8.2, "value")
    made: dict[str, nn.Module] = {PLAIN: plain, OURS: _per_example(plain)}
    missing = {"dropconnect": peers.NOT_ON_INDEX}
    if settings.quick:
        missing["every peer"] = "left out of the quick run: seconds a call, gigabytes of memory"
    else:
        others, lacking = peers.available(
            {peers.SPIKING: lambda: peers.spiking(plain, P, samples=1, activation=None)}
        )
        missing.update(lacking)
        formulas = {peers.EINSUM: peers.einsum, peers.PYPI: peers.pypi_dropconnect}
        made.update(others)
        made.update((name, Formula(formula, plain.weight)) for name, formula in formulas.items())
    x = torch.randn(examples, width, requires_grad=True)
    values = timed_training(made, (x,), torch.randn(examples, width), settings)
    note = "the paper's best kernel took 8.2 ms on its GPU"
    return Row("paper", work, "ms", goal, values, missing, note=note)


def _sequences(settings: Settings) -> Row:
    examples, tokens = 16, settings.size(128)
    width, out = settings.size(768), settings.size(3072)
    plain = nn.Linear(width, out)
    made: dict[str, nn.Module] = {
        PLAIN: plain,
        OURS: _per_example(plain),
    }
    if not settings.quick:
        made[peers.EINSUM] = Formula(peers.einsum, plain.weight)
    missing = {peers.SPIKING: "takes 2-D input only", peers.PYPI: "wrong on 3-D input"}
    x = torch.randn(examples, tokens, width, requires_grad=True)
    grad = torch.randn(examples, tokens, out)
    values = timed_training(made, (x,), grad, settings)
    work = f"per example, [{examples}, {tokens}, {width}] x {out}, forward + backward"
    return Row("paper", work, "ms", Goal(1.6), values, missing)


def _per_example(plain: nn.Linear) -> nn.Module:
    return ours_of(plain, nn.Linear, P, sampling="example")


def gaussian(settings: Settings) -> list[Row]:
    """Local reparameterisation: two products instead of one."""
    rows = []
    shapes = ((128, 1024, 1024), (2048, 768, 768))
    for full in shapes[:1] if settings.quick else shapes:
        tokens, width, out = map(settings.size, full)
        plain = nn.Linear(width, out)
        models = {PLAIN: plain, OURS: ours_of(plain, nn.Linear, P, sampling="gaussian")}
        x = torch.randn(tokens, width, requires_grad=True)
        values = timed_training(models, (x,), torch.randn(tokens, out), settings)
        work = f'sampling="gaussian", Linear {tokens} x {width} x {out}, forward + backward'
        rows.append(Row("paper", work, "ms", Goal(2.2), values))
    return rows


def moments(settings: Settings) -> list[Row]:
    """Inference through a ReLU: its time, and how near it comes to the true expectation."""
    rows = [_moments_time(128, 768, 768, settings, peers_too=not settings.quick)]
    if not settings.quick:  # whose draws for a peer would need gigabytes
        rows.append(_moments_time(512, 768, 3072, settings, peers_too=False))
    return [*rows, _moments_error(settings)]


DRAWS = 1000
"""As many as the paper takes of each pre-activation."""


def _moments_time(tokens: int, width: int, out: int, settings: Settings, peers_too: bool) -> Row:
    tokens, width, out, draws = map(settings.size, (tokens, width, out, DRAWS))
    base = nn.Sequential(nn.Linear(width, out), nn.ReLU())
    linear = base[0]
    assert isinstance(linear, nn.Linear)
    builders = {peers.SPIKING: lambda: peers.spiking(linear, P, draws, nn.ReLU())}
    made, missing = peers.available(builders if peers_too else {})
    models = {PLAIN: base, OURS: ours_of(base, nn.Linear, P, inference="moments"), **made}
    x = torch.randn(tokens, width)
    with torch.no_grad():
        works: dict[str, Work] = {name: partial(model.eval(), x) for name, model in models.items()}
        values = in_unit(interleaved(works, settings), MILLI)
    work = f'inference="moments", Linear {tokens} x {width} x {out} and ReLU, forward'
    note = f"SpikingJelly takes {draws} draws of each pre-activation, as the paper does"
    return Row("paper", work, "ms", Goal(2.2), values, missing, note=note if peers_too else "")


def _moments_error(settings: Settings) -> Row:
    """Root mean square distance to the expectation over masks, at most.

    Two independent Monte Carlo estimates of it make the mean square free of their own noise: the
    product of the distances to the one and to the other has the squared distance as its expectation.
    Outputs have masks of their own, so their spread is the error of the mean square, of which twice is
    added.
    """
    width, p, masks = settings.size(512), 0.3, settings.count(1000 if settings.quick else 8000)
    base = nn.Sequential(nn.Linear(width, width), nn.ReLU())
    x = torch.randn(32, width)
    sampled = ours_of(base, nn.Linear, p, inference="sample").eval()
    exact = ours_of(base, nn.Linear, p, inference="moments").eval()
    with torch.no_grad():
        halves = [torch.stack([sampled(x) for _ in range(masks)]).mean(0) for _ in range(2)]
        answers = {PLAIN: base(x), OURS: exact(x)}
    values = {
        name: Measured((_upper_bound((answer - halves[0]) * (answer - halves[1])),))
        for name, answer in answers.items()
    }
    work = f'inference="moments", error beside mean inference, {width} inputs, ReLU, p = {p:g}'
    note = f"root mean square distance to the mean of 2 x {masks} masks, plus two standard errors"
    return Row("paper", work, "1", Goal(1 / 20), values, note=note)


def _upper_bound(squares: Tensor) -> float:
    """Root of the mean of (examples, outputs) plus two standard errors."""
    outputs = squares.double().mean(0)
    error = outputs.std() / len(outputs) ** 0.5
    return math.sqrt(max(float(outputs.mean() + 2 * error), 0.0))


def monte_carlo(settings: Settings) -> list[Row]:
    """32 samples for a batch, against a loop of 32 forwards."""
    width, batch, samples = settings.size(1024), 32, 32
    base = nn.Sequential(
        *(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
        nn.Linear(width, 10),
    )
    x = torch.randn(batch, width)
    ours = apply_dropconnect(copy.deepcopy(base), nn.Linear, p=P)
    made, missing = peers.available(
        {
            peers.BAAL: lambda: peers.baal(base, [], P),
            peers.PARAMETRIZE: lambda: peers.parametrized_linears(base, P),
            peers.F_DROPOUT: lambda: peers.f_dropout(base, [], P),
        }
    )

    def loop(model: nn.Module) -> Any:
        with torch.no_grad():
            return torch.stack([model(x) for _ in range(samples)])

    works: dict[str, Work] = {
        PLAIN: partial(loop, base),
        OURS: partial(mc_predict, ours, x, samples),
        **{name: partial(loop, model) for name, model in made.items()},
    }
    values = in_unit(interleaved(works, settings), MILLI)
    work = f"mc_predict, {samples} samples, batch of {batch}, {width}-{width}-{width}-10"
    note = "plain and peers: a loop of forwards, without entropies"
    return [Row("paper", work, "ms", Goal(2.0, "faster"), values, missing, note=note)]
