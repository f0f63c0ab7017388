"""A bias whose p is not that of its weight, where a product drops both."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import apply_dropconnect, mc_predict, set_p

ROWS = 4000


class Functional(nn.Module):
    """For a graph: parameters that a node reads."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


MODELS = {
    "linear": lambda: nn.Linear(6, 4),
    "conv": lambda: nn.Conv1d(6, 4, 1),
    "graph": lambda: torch.fx.symbolic_trace(Functional()),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sampling", ["example", "gaussian"])
def test_the_bias_alone_drops(name: str, sampling: str) -> None:
    """At p = 1/2 every deviation is the bias itself; a Gaussian has its variance."""
    unit = "output" if name == "conv" else "element"
    model = MODELS[name]().double()
    apply_dropconnect(model, "weight", p=0.5, sampling=sampling, unit=unit, bias=True)
    set_p(model, 0.0, "weight")  # and what goes along with it
    set_p(model, 0.5, "bias")
    x = torch.randn(6, 1) if name == "conv" else torch.randn(6)
    x = x.double().expand(ROWS, *x.shape)
    with torch.no_grad():
        plain = model.eval()(x[:1])
        gap = (model.train()(x) - plain).flatten(1)
    bias = model.bias_raw
    if sampling == "example":
        torch.testing.assert_close(gap.abs(), bias.detach().abs().expand_as(gap))
        assert ((gap > 0).double().mean(0) - 0.5).abs().max() < 5 * 0.5 / ROWS**0.5
    else:
        assert (gap.square().mean(0) / bias.square() - 1).abs().max() < 5 * (2 / ROWS) ** 0.5


def test_the_bias_alone_drops_in_grouped_samples() -> None:
    model = apply_dropconnect(nn.Linear(6, 4), "weight", p=0.5, bias=True)
    set_p(model, 0.0, "weight")  # and what goes along with it
    set_p(model, 0.5, "bias")
    found = mc_predict(model, torch.randn(3, 6), samples=64, seed=0)
    assert torch.all(found.variance.sqrt() > 0.7 * model.bias_raw.abs())


@pytest.mark.compiler
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("p", [(0.3, 0.6), (0.6, 0.3), (0.0, 0.5), (0.5, 0.0), (0.3, 1.0)], ids=str)
def test_expectations_of_an_activation(p: tuple[float, float], compiled: bool) -> None:
    """Exact, where one number masks a row and its bias: over ten equally likely ones."""
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU()).double().eval()
    apply_dropconnect(model, "0", p=0.2, unit="output", inference="moments", bias=True)
    set_p(model, p[0], "0.weight")
    set_p(model, p[1], "0.bias")
    x, numbers = torch.randn(3, 6).double(), torch.arange(0.05, 1, 0.1).double().view(-1, 1, 1)
    parts = F.linear(x, model[0].weight), model[0].bias
    used = [
        (numbers >= one) / (1 - one) * part if one < 1 else 0 * part for one, part in zip(p, parts)
    ]
    torch._dynamo.reset()
    run = torch.compile(model, backend="eager") if compiled else model
    with torch.no_grad():
        torch.testing.assert_close(run(x), torch.relu(used[0] + used[1]).mean(0))
