"""What masks cost beside arithmetic: steps of layers so small that all of it is the time of the host.
On a GPU, training of small batches is bound by that."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from . import peers
from .layers import ours_of
from .measure import Settings, Work, interleaved
from .rows import MICRO, OURS, PLAIN, Row, in_unit

P = 0.3
STEP = "forward + backward, one thread"


def host(settings: Settings) -> list[Row]:
    """Forward and backward of each kind of layer, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if settings.divide > 1:  # tests
            return [_row("Conv2d", nn.Conv2d(4, 4, 3), "weight", torch.randn(2, 4, 6, 6), settings)]
        rows = [
            _row("Linear", nn.Linear(8, 8), "weight", torch.randn(4, 8), settings),
            _row("Conv2d", nn.Conv2d(4, 4, 3), "weight", torch.randn(2, 4, 6, 6), settings),
            *_conv1d(settings),
            _row("Embedding", nn.Embedding(10, 8), "weight", torch.randint(10, (2, 3)), settings),
            _row("LSTM", nn.LSTM(8, 8), "weight_hh_l0", torch.randn(3, 2, 8), settings),
            _row("LSTMCell", nn.LSTMCell(8, 8), "weight_hh", torch.randn(2, 8), settings),
            _row(
                "MultiheadAttention", _Attention(), "in_proj_weight", torch.randn(3, 2, 8), settings
            ),
            *(
                _row("Linear", nn.Linear(8, 8), "weight", torch.randn(4, 8), settings, **options)
                for options in (
                    {"unit": "output"},
                    {"sampling": "example"},
                    {"sampling": "gaussian"},
                )
            ),
            *_encoders(settings),
        ]
    finally:
        torch.set_num_threads(threads)
    return rows


class _Attention(nn.MultiheadAttention):
    def __init__(self) -> None:
        super().__init__(8, 2)

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, x, x)[0]


def _encoders(settings: Settings) -> list[Row]:
    """Four layers of twelve sites, eagerly and compiled."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    plain = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    x = torch.randn(2, 4, 16)
    rows = []
    for compiled in (False, True):
        made = {peers.PARAMETRIZE: lambda: peers.parametrized_linears(plain, P)}
        others, missing = peers.available(made)
        models = {PLAIN: plain, OURS: ours_of(plain, "all-linear", P), **others}
        if compiled:
            models = {name: torch.compile(model) for name, model in models.items()}
        works: dict[str, Work] = {name: _step(model, x) for name, model in models.items()}
        told = ", compiled" if compiled else ""
        work = f"host time of a small nn.TransformerEncoder, 4 layers{told}, {STEP}"
        values = in_unit(interleaved(works, settings), MICRO)
        rows.append(Row("host", work, "µs", None, values, missing))
    return rows


def _conv1d(settings: Settings) -> list[Row]:
    if find_spec("transformers") is None:
        return []
    from transformers.pytorch_utils import Conv1D

    return [_row("transformers' Conv1D", Conv1D(8, 8), "weight", torch.randn(4, 8), settings)]


def _row(
    kind: str, layer: nn.Module, name: str, x: Tensor, settings: Settings, **options: Any
) -> Row:
    made = {peers.PARAMETRIZE: lambda: peers.parametrized(layer, [name], P)}
    others, missing = peers.available(made)
    models = {PLAIN: layer, OURS: ours_of(layer, name, P, **options), **others}
    works: dict[str, Work] = {key: _step(model, x) for key, model in models.items()}
    told = "".join(f", {option}={value!r}" for option, value in options.items())
    work = f"host time of a small {kind}{told}, {STEP}"
    return Row("host", work, "µs", None, in_unit(interleaved(works, settings), MICRO), missing)


def _step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        found = model(x)
        while isinstance(found, tuple):
            found = found[0]
        found.sum().backward()

    return step
