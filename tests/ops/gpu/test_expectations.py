"""Expectations of activations by kernels for the GPU, in Triton's interpreter, against float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.special import erfcx
from torch import nn

from surgery import apply_dropconnect
from surgery.ops import expectation
from surgery.ops.gpu import expect

from ...expected import normal_expectation

SCALES = [1e-3, 0.37, 1.0, 30.0]


def test_relu_far_in_the_tail(gpu_kernels) -> None:
    """As accurate as the kernel for the CPU: 13 standard deviations below zero, and beyond."""
    t = torch.linspace(-13, 13, 3001)
    for scale in SCALES:
        mean, var = t * scale, torch.full_like(t, scale * scale)
        found = expectation(torch.relu, mean, var).double()
        sd = var.double().sqrt()
        u = mean.double().abs() / sd
        tail = 1 - u * math.sqrt(math.pi / 2) * torch.from_numpy(erfcx((u / 2**0.5).numpy()))
        exact = sd * torch.exp(-u.square() / 2) / math.sqrt(2 * math.pi) * tail
        exact = exact + mean.double().relu()
        bound = 4 * torch.finfo(torch.float32).eps * (1 + t.double().square())
        assert bool(((found - exact).abs() <= exact * bound + 1e-44).all())
    assert set(gpu_kernels) == {"expect"}


def test_where_nothing_is_left_and_where_it_is_no_number(gpu_kernels) -> None:
    mean = torch.tensor([0.0, 2.0, -2.0, 1e30, -1e30, math.nan, 3.0])
    var = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, math.nan])
    found = expectation(torch.relu, mean, var)
    assert found[:5].tolist() == [0, 2, 0, pytest.approx(1e30), 0]
    assert bool(found[5:].isnan().all())
    assert expect("excess", mean, var)[:5].tolist() == [0, 0, 0, 0, 0]
    gelu = expectation(F.gelu, mean, var)
    torch.testing.assert_close(gelu[:3], F.gelu(mean[:3]))
    assert gelu[4] == 0
    assert bool(gelu[5:].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gelu_and_relu_of_any_dtype(dtype, gpu_kernels) -> None:
    for f in (F.gelu, torch.relu, F.leaky_relu, F.hardtanh):
        for sd in (0.0, 0.5, 4.0):
            mean = torch.linspace(-8, 8, 33).to(dtype)
            var = torch.full_like(mean, sd * sd)
            found = expectation(f, mean, var)
            assert found.dtype == dtype
            exact = [normal_expectation(f, m, sd) if sd else float(f(torch.tensor(m).double()))
                     for m in mean.double().tolist()]  # fmt: skip
            expected = torch.tensor(exact, dtype=torch.float64)
            step = max(torch.finfo(dtype).eps, 1e-6)
            torch.testing.assert_close(found.double(), expected, rtol=step, atol=2e-6)
    assert len(gpu_kernels) > 12


def test_gelu_on_the_left_has_a_small_relative_error(gpu_kernels) -> None:
    mean = torch.linspace(-9, -1, 300)
    found = expectation(F.gelu, mean, torch.zeros_like(mean)).double()
    z = mean.double()
    exact = z * torch.special.erfc(-z / 2**0.5) / 2
    bound = 8 * torch.finfo(torch.float32).eps * (1 + z.square())
    assert bool(((found - exact).abs() <= exact.abs() * bound).all())


def test_with_a_gradient_it_is_the_formula(gpu_kernels) -> None:
    mean = torch.randn(5, requires_grad=True)
    assert expectation(torch.relu, mean, torch.ones(5)).requires_grad
    assert gpu_kernels == []
    expectation(torch.relu, mean.double().detach(), torch.ones(5).double())
    assert gpu_kernels == []


def test_launches_of_a_layer_and_its_activation(gpu_kernels) -> None:
    """Squares, both products, and the expectation."""
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU())
    apply_dropconnect(model, ["0"], p=0.3, inference="moments").eval()
    with torch.no_grad():
        model(torch.randn(4, 8))
    assert gpu_kernels == ["factors", "expect"]
