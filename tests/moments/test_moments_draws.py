"""`inference="moments", samples=Z`: draws of a pre-activation go through what follows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import apply_dropconnect, set_inference

P, DRAWS = 0.3, 100
SLOPE = torch.linspace(-1, 1, 8, dtype=torch.float64)
Then = Callable[[Tensor], Tensor]


class Around(nn.Module):
    """A site whose output goes through a function."""

    def __init__(self, then: Then) -> None:
        super().__init__()
        self.site, self.then = nn.Linear(6, 8), then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.site(x))


class Two(nn.Module):
    """Two sites, and a function of both."""

    def __init__(self, then: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.then = nn.Linear(6, 8), nn.Linear(6, 8), then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.a(x), self.b(x))


def operated(model: nn.Module, draws: int | None = DRAWS) -> Any:
    model = model.double().eval()
    return apply_dropconnect(model, "*", p=P, inference="moments", samples=draws)


def repeated(model: nn.Module, x: Tensor, count: int = 40) -> tuple[Tensor, Tensor]:
    """Mean and standard error of forwards with new draws."""
    with torch.no_grad():
        found = torch.stack([model(x) for _ in range(count)])
    return found.mean(0), found.std(0) / math.sqrt(count)


def of_gaussian(
    model: nn.Module, x: Tensor, then: Then, count: int = 8000
) -> tuple[Tensor, Tensor]:
    """The same of a function of tensors that are drawn from the Gaussian of the pre-activation."""
    with torch.no_grad():
        weight = model.site.weight
        deviation = (P / (1 - P) * F.linear(x**2, weight**2)).sqrt()
        mean = F.linear(x, weight, model.site.bias)
        draws = [then(mean + deviation * torch.randn_like(mean)) for _ in range(count)]
    found = torch.stack(draws)
    return found.mean(0), found.std(0) / math.sqrt(count)


def _assigned(u: Tensor) -> Tensor:
    same = u.clone()
    same **= 2
    same += SLOPE
    return torch.tanh(same)


NORM = (SLOPE, SLOPE + 2, SLOPE + 3, SLOPE)
DRAWN: dict[str, Then] = {
    "gelu": F.gelu,
    "formula": lambda u: u * torch.sigmoid(1.702 * u),
    "shifted": lambda u: torch.relu(2 * u + SLOPE) - 1,
    "in place": lambda u: F.relu(u.clone().add_(SLOPE), inplace=True),
    "assigned": _assigned,
    "mask": lambda u: u * (u > 0),
    "prelu": lambda u: F.prelu(u, SLOPE),
    "batch norm": lambda u: torch.relu(F.batch_norm(u, *NORM)),
    "layer norm": lambda u: F.layer_norm(u, (8,), SLOPE + 2, SLOPE),
    "rms norm": lambda u: torch.relu(F.rms_norm(u, (8,))),
    "softmax": lambda u: F.softmax(3 * u + 1, -1),
    "views": lambda u: torch.tanh(u.view(-1, 2, 4).transpose(1, 2)),
    "rows": lambda u: torch.stack([row.relu() for row in u]),
    "cat": lambda u: torch.relu(torch.cat([u, -u, SLOPE.expand_as(u)], -1)),
    "sum of halves": lambda u: torch.relu(u[:, :4] - u[:, 4:]),
    "gate": lambda u: F.silu(u[:, ::2]) * u[:, 1::2],
    "glu": lambda u: F.glu(4 * u + 1),
    "one half twice": lambda u: torch.sigmoid(u[:, :4]) * u[:, :4],
}


@pytest.mark.parametrize("name", DRAWN)
def test_draws_go_through_what_follows(name: str) -> None:
    """Against the same function of plain tensors that are drawn; that of the mean is another."""
    torch.manual_seed(0)
    then, x = DRAWN[name], torch.randn(3, 6, dtype=torch.float64)
    model = operated(Around(then))
    found, error = repeated(model, x)
    wanted, other = of_gaussian(model, x, then)
    assert found.shape == wanted.shape
    bound = 5 * (error + other) + 1e-12
    assert bool(((found - wanted).abs() <= bound).all())
    with set_inference(model, "mean"):
        assert bool(((model(x) - wanted).abs() > bound).any())


WRITTEN: dict[str, Then] = {
    "into a part": lambda u: (u[:, :4].relu_(), u + 0)[1],
    "a part from before": lambda u: _write_first(u, u[:, :4]),
    "overlapping": lambda u: _write_first(u[:, :4], u[:, 2:6]),
}


def _write_first(one: Tensor, other: Tensor) -> Tensor:
    one.relu_()
    return other + 0


@pytest.mark.parametrize("name", WRITTEN)
def test_writes_into_views_of_a_pre_activation_are_refused(name: str) -> None:
    model = operated(Around(WRITTEN[name]))
    with pytest.raises(RuntimeError, match="cannot follow a write into a view"):
        model(torch.randn(3, 6, dtype=torch.float64))


def test_a_write_into_another_part_is_none_into_this() -> None:
    x = torch.randn(3, 6, dtype=torch.float64)
    model = operated(Around(lambda u: _write_first(u[:, :4], u[:, 4:])))
    found = model(x)
    model.then = lambda u: u[:, 4:]
    assert torch.equal(found, model(x))


@pytest.mark.parametrize("draws", [None, DRAWS])
@torch.no_grad()
def test_an_entry_is_a_number_to_python(draws: int | None) -> None:
    x = torch.randn(3, 6, dtype=torch.float64)
    model = operated(
        Around(lambda u: torch.tensor([float(u[0, 0]), float((3 * u + 1)[1, 2])])), draws
    )
    found = model(x)
    with set_inference(model, "mean"):
        torch.testing.assert_close(found, model(x))


@pytest.mark.parametrize("drawn", ["a", "b"])
@pytest.mark.parametrize("then", [torch.mul, torch.add, torch.sub])
def test_what_is_drawn_meets_what_travels(
    drawn: str, then: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Sites of one model can differ: each sees the mean of the other, and a tensor is returned."""
    x = torch.randn(3, 6, dtype=torch.float64)
    model = operated(Two(then), None)
    set_inference(model, "moments", samples=DRAWS, targets=drawn)
    found = model(x)
    assert type(found) is Tensor
    with set_inference(model, "mean"):
        torch.testing.assert_close(found, model(x))
