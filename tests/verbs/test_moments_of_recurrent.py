"""`predict_moments` through recurrent layers, whose masks serve all steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from surgery import SurgeryError, apply_dropconnect, mc_predict, predict_moments, set_inference

from ..helpers import assert_moments_of_draws, linear

P = 0.2
WIDTH, HIDDEN, STEPS = 3, 6, 5
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class Last(nn.Module):
    """What a recurrent layer says at the end."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)[0][:, -1]
        return found


class Written(nn.Module):
    """The same with a Linear for each product, called at each step."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.name = type(layer).__name__
        self.of_input = linear(layer.weight_ih_l0, layer.bias_ih_l0)
        self.of_hidden = linear(layer.weight_hh_l0, layer.bias_hh_l0)

    def forward(self, x: Tensor) -> Tensor:
        hidden = cell = torch.zeros(len(x), HIDDEN, dtype=x.dtype)
        for step in x.unbind(1):
            one, other = self.of_input(step), self.of_hidden(hidden)
            if self.name == "LSTM":
                let_in, keep, new, show = (one + other).chunk(4, -1)
                cell = keep.sigmoid() * cell + let_in.sigmoid() * new.tanh()
                hidden = show.sigmoid() * cell.tanh()
            else:
                hidden = (one + other).tanh()
        return hidden


def made(name: str, **options: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = KINDS[name](WIDTH, HIDDEN, batch_first=True, **options).double().eval()
    return layer, torch.randn(4, STEPS, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("unit", ["element", "input", "output", "tensor"])
@pytest.mark.parametrize("name", ["lstm", "rnn"])
def test_as_written_with_linear_layers(name: str, unit: str) -> None:
    """Without columns, which know that steps share masks, the mathematics is the same."""
    layer, x = made(name)
    twin = Written(layer).eval()
    apply_dropconnect(layer, "weight_*", p=P, unit=unit)
    apply_dropconnect(twin, nn.Linear, p=P, unit=unit)
    found, wanted = (predict_moments(one, x, class_dim=None) for one in (Last(layer), twin))
    assert not found.settled
    torch.testing.assert_close(found.mean, wanted.mean)
    torch.testing.assert_close(found.variance, wanted.variance)


def test_what_is_linear_is_exact() -> None:
    """Of a ReLU that never is zero, u_2 = w x_2 + v w x_1 for the one dropped w: its variance is
    r w^2 (x_2 + v x_1)^2, where steps with masks of their own would have r w^2 (x_2^2 + v^2 x_1^2)."""
    layer = nn.RNN(1, 1, nonlinearity="relu", bias=False, batch_first=True).double().eval()
    with torch.no_grad():
        layer.weight_ih_l0.fill_(0.7)
        layer.weight_hh_l0.fill_(0.9)
    apply_dropconnect(layer, "weight_ih_l0", p=1e-6)  # so little that it never is
    x = torch.tensor([[[1.0], [2.0]]], dtype=torch.float64)
    ratio = 1e-6 / (1 - 1e-6)
    forms: list[tuple[Any, float]] = [("full", 2.9**2), (8, 2.9**2), ("diagonal", 4 + 0.81)]
    for form, wanted in forms:
        found = predict_moments(Last(layer), x, form, class_dim=None)
        assert float(found.variance) == pytest.approx(ratio * 0.49 * wanted, rel=1e-3)


SHOWN = [("lstm", "element"), ("gru", "tensor")]
OTHERS = [(name, unit) for name in KINDS for unit in ("element", "input", "output", "tensor")]


@pytest.mark.parametrize(
    ("name", "unit"),
    [*SHOWN, *(pytest.param(*one, marks=pytest.mark.slow) for one in OTHERS if one not in SHOWN)],
)
def test_steps_share_their_masks(name: str, unit: str) -> None:
    """Where masks move little, first order is all there is: against Monte Carlo, whose own relative
    error is about sqrt(2 / 600) for one entry."""
    layer, x = made(name)
    model = Last(layer).eval()
    apply_dropconnect(model, "*.weight_*", p=0.3, unit=unit, toward="pretrained")
    with torch.no_grad():
        for weight in layer.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    sampled = mc_predict(model, x, 600, class_dim=None, seed=0, batch_size=1)
    found = predict_moments(model, x, "full", class_dim=None)
    size = float(sampled.variance.sum())
    assert float(found.variance.sum()) == pytest.approx(size, rel=0.1)
    outputs = predict_moments(model, x, "outputs", class_dim=None)
    assert float(outputs.variance.sum()) == pytest.approx(size, rel=0.1)
    if unit == "element":
        columns = predict_moments(model, x, 256, class_dim=None)
        assert float(columns.variance.sum()) == pytest.approx(size, rel=0.12)


@pytest.mark.parametrize(
    "name", ["gru", *(pytest.param(one, marks=pytest.mark.slow) for one in ("lstm", "rnn"))]
)
def test_against_monte_carlo(name: str) -> None:
    torch.manual_seed(0)
    layer = KINDS[name](16, 32, batch_first=True).double().eval()
    model, x = Last(layer).eval(), torch.randn(4, 8, 16, dtype=torch.float64)
    with torch.no_grad():
        plain = model(x)
    apply_dropconnect(model, "*.weight_*", p=0.3)
    count = 500
    sampled = mc_predict(model, x, count, class_dim=None, seed=0, batch_size=1)
    own = float((sampled.variance / count).mean())
    forms: list[tuple[Any, float]] = [("diagonal", 0.8), ("full", 0.9)]
    for form, least in forms:
        found = predict_moments(model, x, form, class_dim=None)
        error, of_plain = (
            max(float((mean - sampled.mean).square().mean()) - own, own / 9)
            for mean in (found.mean, plain)
        )
        assert error < of_plain / 9
        assert least < float(found.variance.sum() / sampled.variance.sum()) < 1.1


LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("lstm", {"batch_first": True}),
    "time first": ("lstm", {}),
    "two layers, both ways": ("lstm", {"num_layers": 2, "bidirectional": True}),
    "projected": ("lstm", {"proj_size": 2, "num_layers": 2, "bidirectional": True}),
    "no bias": ("lstm", {"bias": False, "proj_size": 2}),
    "gru": ("gru", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "rnn": ("rnn", {"bidirectional": True}),
    "relu": ("rnn", {"nonlinearity": "relu", "num_layers": 2}),
}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("case", LAYERS)
def test_every_option_computes_what_torch_does(case: str, packed: bool) -> None:
    """Nearly nothing is dropped, so that the mean is that of the plain layer: outputs and last states,
    also from states that were given."""
    name, options = LAYERS[case]
    torch.manual_seed(0)
    layer = KINDS[name](WIDTH, HIDDEN, **options).double().eval()
    x: Any = torch.randn(4, 5, WIDTH, dtype=torch.float64)
    rows = 4 if options.get("batch_first") else 5
    lengths = torch.tensor([5, 2, 3, 2, 5][:rows])
    if packed:
        first = bool(options.get("batch_first"))
        lengths = lengths.clamp(max=x.shape[int(first)])
        x = pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=False)
    directions = 2 if options.get("bidirectional") else 1
    count = directions * options.get("num_layers", 1)
    hidden = torch.randn(count, rows, options.get("proj_size") or HIDDEN, dtype=torch.float64)
    cell = torch.randn(count, rows, HIDDEN, dtype=torch.float64)
    states = (None, (hidden, cell) if name == "lstm" else hidden)
    with torch.no_grad():
        wanted = [layer(x, state) for state in states]
        apply_dropconnect(layer, "weight_*", p=1e-9, inference="moments")
        found = [layer(x, state) for state in states]
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("cls", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(cls: Any) -> None:
    torch.manual_seed(0)
    cell = cls(WIDTH, HIDDEN).double().eval()
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        wanted = cell(x)
        wanted = cell(x, wanted)
        apply_dropconnect(cell, "weight_*", p=1e-9, inference="moments")
        found = cell(x, cell(x))
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7)
    first = (lambda found: found[0]) if cls is nn.LSTMCell else None
    predicted = predict_moments(cell, x, output=first, class_dim=None)
    assert predicted.variance.all()


class PackedInside(nn.Module):
    """Words, of which some are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.layer = nn.GRU(WIDTH, HIDDEN, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.fc(x), lengths, batch_first=True, enforce_sorted=False)
        found: Tensor = pad_packed_sequence(self.layer(packed)[0], True, 0.5)[0].flatten(1)
        return found


def test_packed_inside() -> None:
    torch.manual_seed(0)
    model, x = PackedInside().double().eval(), torch.randn(3, STEPS, WIDTH, dtype=torch.float64)
    lengths = torch.tensor([2, 5, 3])
    inputs = {"x": x, "lengths": lengths}
    with torch.no_grad():
        plain = model(**inputs)
    apply_dropconnect(model, ["fc", "layer"], p=P)
    count = 1000
    sampled = mc_predict(model, inputs, count, class_dim=None, seed=0, batch_size=1)
    for form in ("diagonal", 64):
        found = predict_moments(model, inputs, form, class_dim=None)
        assert not found.settled
        assert torch.equal(found.mean[0, 2 * HIDDEN :], plain[0, 2 * HIDDEN :])
        assert not found.variance[0, 2 * HIDDEN :].any()
    assert 0.75 < float(found.variance.sum() / sampled.variance.sum()) < 1.25
    with pytest.raises(SurgeryError, match="packed"):
        predict_moments(model, inputs, "full", class_dim=None)


def test_dropout_between_layers_counts() -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(WIDTH, HIDDEN, num_layers=2, dropout=0.3, batch_first=True).double()
    assert_moments_of_draws(Last(layer).train(), torch.randn(4, 2, WIDTH, dtype=torch.float64))


def test_variance_goes_through_layers_that_do_not_drop() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Last(nn.GRU(WIDTH, HIDDEN, batch_first=True)))
    x = torch.randn(4, STEPS, WIDTH)
    apply_dropconnect(model, "0", p=P)
    for form in ("diagonal", 8, "full"):
        found = predict_moments(model, x, form, class_dim=None)
        assert not found.settled
        assert found.variance.all()


def test_inference_is_the_mean_of_the_prediction() -> None:
    layer, x = made("lstm")
    model = Last(layer).eval()
    apply_dropconnect(model, "*.weight_*", p=P)
    wanted = predict_moments(model, x).mean
    with set_inference(model, "moments"), torch.no_grad():
        assert torch.equal(model(x), wanted)
        found = layer(x)
    assert type(found[0]) is Tensor
    with set_inference(model, "moments"):
        model(x).sum().backward()
    assert layer.weight_hh_l0.grad is not None
