"""How cost grows with tokens, with the size of a weight and with the number of sites."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from surgery.ops import Law, Layout, draw_key, drop_weight

from . import peers
from .layers import P, ours_of, training_work
from .measure import Measured, Settings, Work, interleaved
from .rows import MILLI, NANO, OURS, PLAIN, in_unit


@dataclass
class Curve:
    """Measurements along one axis."""

    title: str
    axis: str
    unit: str
    points: list[int]
    series: dict[str, list[Measured]] = field(default_factory=dict)

    def add(self, found: dict[str, Measured]) -> None:
        for name, value in found.items():
            self.series.setdefault(name, []).append(value)

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "axis": self.axis,
            "unit": self.unit,
            "points": self.points,
            "median": {name: [v.median for v in values] for name, values in self.series.items()},
            "quartiles": {
                name: [list(v.quartiles) for v in values] for name, values in self.series.items()
            },
        }


def growth(settings: Settings) -> list[Curve]:
    each = replace(settings, seconds=settings.seconds / 6)
    return [_tokens(each), _weights(each), _sites(each)]


def _points(first: int, last: int, settings: Settings) -> list[int]:
    """Powers of two; fewer in the quick run, small ones in tests."""
    if settings.divide > 1:
        return [first, 2 * first]
    step = 2 if settings.quick else 1
    found = [1 << power for power in range(first.bit_length() - 1, last.bit_length(), step)]
    return found


def _tokens(settings: Settings) -> Curve:
    width = settings.size(768)
    points = _points(8, 4096, settings)
    curve = Curve(f"Linear {width} x {width}, forward + backward", "tokens", "ms", points)
    for tokens in points:
        curve.add(_training(nn.Linear(width, width), tokens, width, settings))
    return curve


def _sites(settings: Settings) -> Curve:
    width, tokens = settings.size(256), settings.size(64)
    points = _points(1, 128, settings)
    title = f"Linears {width} x {width}, {tokens} tokens, forward + backward"
    curve = Curve(title, "sites", "ms", points)
    for sites in points:
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(sites)))
        curve.add(_training(model, tokens, width, settings))
    return curve


def _training(model: nn.Module, tokens: int, width: int, settings: Settings) -> Any:
    models = {
        PLAIN: model,
        OURS: ours_of(model, nn.Linear, P),
        peers.F_DROPOUT: peers.f_dropout(nn.Sequential(model), [], P),
    }
    x, grad = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)
    works = {name: training_work(other, (x,), grad) for name, other in models.items()}
    return in_unit(interleaved(works, settings), MILLI)


def _weights(settings: Settings) -> Curve:
    points = _points(1 << 10, 1 << (22 if settings.quick else 26), settings)
    curve = Curve("mask and apply", "weights", "ns a weight", points)
    for numel in points:
        weight = torch.randn(numel)
        law = Law.of(P, weight.device, weight.dtype)
        key, layout = draw_key(weight.device), Layout.elements(numel)
        works: dict[str, Work] = {
            PLAIN: partial(torch.mul, weight, 2.0),
            OURS: partial(drop_weight, weight, key, law, layout),
            peers.F_DROPOUT: partial(F.dropout, weight, P),
        }
        with torch.no_grad():
            curve.add(in_unit(interleaved(works, settings), NANO / numel))
    return curve
