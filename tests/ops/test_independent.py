"""Moments of functions of independent Gaussians: kernels beside the formulas in float64, and formulas
beside quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.ops import gauss_hermite, independent
from surgery.ops.blocks import BLOCK

EPS = torch.finfo(torch.float32).eps
Moments = Callable[..., tuple[Tensor, ...]]


def leaky(mean: Tensor, variance: Tensor, slope: float = 0.2) -> tuple[Tensor, ...]:
    return independent.leaky_relu(mean, variance, torch.tensor(slope, dtype=mean.dtype), True)


def gelu(mean: Tensor, variance: Tensor) -> tuple[Tensor, ...]:
    return independent.gelu(mean, variance, True)


ENTRIES: dict[str, Moments] = {
    "relu": partial(leaky, slope=0.0),
    "leaky_relu": leaky,
    "rising": partial(leaky, slope=1.5),
    "gelu": gelu,
}


@pytest.mark.compiler
@pytest.mark.parametrize("name", ENTRIES)
def test_kernels_of_entries_agree_with_formulas(name: str, kernel_calls: list[str]) -> None:
    """From no variance to much, and far into both tails. What is small beside the deviation is allowed
    an error of a few roundings of it."""
    t = torch.cat([torch.linspace(-15, 15, 3001), torch.tensor([0.0, 1e4, -1e4])])
    for deviation in (0.0, 1e-3, 0.4, 1.0, 30.0):
        mean, variance = t * (deviation or 1.0), torch.full_like(t, deviation**2)
        found = ENTRIES[name](mean, variance)
        wanted = ENTRIES[name](mean.double(), variance.double())
        size = mean.abs() + deviation
        allowed = 8 * EPS * size, 30 * EPS * variance, torch.full_like(t, 16 * EPS)
        for own, exact, bound in zip(found, wanted, allowed):
            assert bool(((own - exact).abs() <= bound + 1e-37).all())
    assert kernel_calls == ["moments_of_entries"] * 5
    found = ENTRIES[name](torch.tensor([math.nan, 1.0]), torch.ones(2))
    assert all(bool(one[0].isnan()) and bool(one[1].isfinite()) for one in found)


@pytest.mark.compiler
@pytest.mark.parametrize("width", [1, 7, 48, 301])
def test_kernels_of_rows_agree_with_formulas(width: int, kernel_calls: list[str]) -> None:
    torch.manual_seed(0)
    mean, variance = 3 * torch.randn(5, 11, width), torch.rand(5, 11, width)
    weight, bias = torch.randn(width), torch.randn(width)

    def check(function: Moments, *given: Tensor, atol: float) -> None:
        found, wanted = function(*given), function(*(one.double() for one in given))
        for one, exact in zip(found, wanted):
            torch.testing.assert_close(one.double(), exact, rtol=1e-4, atol=atol)

    for centred in (True, False) if width > 1 else (False,):
        norm = partial(independent.norm, eps=1e-5, centred=centred)
        check(norm, mean, variance, weight, bias, atol=1e-5)
        check(partial(norm, weight=None, bias=None), mean, variance, atol=1e-5)
    check(independent.softmax, mean, variance, atol=1e-7)
    masked = torch.where(torch.rand(mean.shape) < 0.5, -math.inf, mean)
    masked[..., 0] = 0
    check(independent.softmax, masked, variance, atol=1e-7)
    masked[0, 0] = -math.inf  # an empty row
    assert bool(independent.softmax(masked, variance)[0][0, 0].isnan().all())
    assert set(kernel_calls) == {"moments_of_norm", "moments_of_softmax"}


def test_kernels_are_for_what_nobody_differentiates(kernel_calls: list[str]) -> None:
    mean, variance = torch.randn(4, 5, requires_grad=True), torch.rand(4, 5)
    for found in (
        *(one(mean, variance) for one in ENTRIES.values()),
        independent.softmax(mean, variance),
    ):
        assert found[0].requires_grad
    weight = torch.ones(5, requires_grad=True)
    own = mean.detach()
    assert independent.norm(own, variance, weight, None, 1e-5, True)[0].requires_grad
    assert kernel_calls == []
    own.t().contiguous()
    strided = independent.gelu(own.t(), variance.t(), True)
    for one, other in zip(strided, independent.gelu(own, variance, True)):
        torch.testing.assert_close(one.t(), other)


@pytest.mark.parametrize(
    ("name", "function", "bound"),
    [
        ("relu", F.relu, 3e-3),
        ("leaky_relu", partial(F.leaky_relu, negative_slope=0.2), 3e-3),
        ("gelu", F.gelu, 3e-3),
    ],
)
def test_formulas_against_quadrature(name: str, function: Any, bound: float) -> None:
    """A kink costs quadrature an error; the series of GELU's variance ends at the third term."""
    mean = torch.linspace(-2, 2, 21, dtype=torch.float64)
    nodes = torch.tensor(gauss_hermite(128), dtype=torch.float64)
    for variance in (0.1, 0.7):
        first, second, gain = ENTRIES[name](mean, torch.full_like(mean, variance))
        node, weight = nodes.unbind(1)
        value = function(mean[:, None] + math.sqrt(variance) * node)
        wanted = (value * weight).sum(1)
        square = (value.square() * weight).sum(1) - wanted.square()
        slope = (value * weight * node).sum(1) / math.sqrt(variance)
        for own, exact in ((first, wanted), (second, square), (gain, slope)):
            torch.testing.assert_close(own, exact, rtol=0, atol=bound)


def test_large_tensors_go_in_parts() -> None:
    """The same as whole ones, row by row."""
    torch.manual_seed(0)
    rows = 3 * BLOCK // 32
    mean, variance = torch.randn(rows, 32).double(), torch.rand(rows, 32).double()
    some = slice(rows // 2, rows // 2 + 3)
    for function in (gelu, independent.softmax):
        for whole, part in zip(function(mean, variance), function(mean[some], variance[some])):
            torch.testing.assert_close(whole[some], part)
