"""The kernels for the GPU around the products of a Gaussian pre-activation, in Triton's interpreter."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.ops import Law, gaussian_linear, gaussian_sample, gpu, moments_of

from ...internals import set_constant

CPU = torch.device("cpu")


def with_and_without(monkeypatch, run) -> tuple[list[Tensor], list[Tensor]]:
    """The results of `run` by kernels, and by the formulas, of the same random numbers."""
    found = []
    for devices in ({"cpu"}, set()):
        set_constant(monkeypatch, "interpreted devices", devices)
        torch.manual_seed(3)
        found.append([tensor.detach() for tensor in run()])
    return found[0], found[1]


def assert_near(found: list[Tensor], expected: list[Tensor], step: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert float((one.double() - other.double()).norm()) <= step * float(other.double().norm())


def step(leaves: list[Tensor], bias: bool, anchor: Tensor | None, grad: Tensor) -> list[Tensor]:
    """A sample, and its gradients."""
    law = Law.of(0.3, CPU, leaves[0].dtype)
    given = [leaf.detach().requires_grad_() for leaf in leaves]
    x, weight, own = given if bias else (*given, None)
    u = gaussian_linear(x, weight, own, law, "element", anchor)
    return [u.detach(), *torch.autograd.grad(u, given, grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("anchored", [False, True], ids=["zero", "pretrained"])
def test_sample_and_gradients(dtype, anchored: bool, gpu_kernels, monkeypatch) -> None:
    """bfloat16 is compared with float32: it has a fast way on the GPU only."""
    wide = torch.promote_types(dtype, torch.float32)
    anchor = torch.randn(67, 45).to(dtype) if anchored else None
    for shape, bias in (((3, 5), True), ((1,), False), ((0,), True)):
        leaves = [torch.randn(*shape, 45), torch.randn(67, 45)]
        leaves = [leaf.to(dtype) for leaf in (*leaves, torch.randn(67))[: 2 + bias]]
        grad = torch.randn(*shape, 67).to(dtype)
        set_constant(monkeypatch, "interpreted devices", {"cpu"})
        torch.manual_seed(3)
        found = step(leaves, bias, anchor, grad)
        set_constant(monkeypatch, "interpreted devices", set())
        torch.manual_seed(3)
        towards = None if anchor is None else anchor.to(wide)
        expected = step([leaf.to(wide) for leaf in leaves], bias, towards, grad.to(wide))
        assert_near(found, [one.to(dtype) for one in expected], 3 * torch.finfo(dtype).eps)
    assert set(gpu_kernels) == {"factors", "draw", "add_twice"}


def test_launches_of_a_step(gpu_kernels) -> None:
    x, weight = torch.randn(8, 32), torch.randn(16, 32, requires_grad=True)
    law = Law.of(0.5, CPU, torch.float32)
    u = gaussian_linear(x.requires_grad_(), weight, torch.zeros(16), law, "element")
    assert gpu_kernels == ["factors", "draw"]
    u.sum().backward()
    assert gpu_kernels[2:] == ["factors", "add_twice"]


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["x", "weight"])
def test_one_gradient_alone(wanted, gpu_kernels, monkeypatch) -> None:
    law = Law.of(0.3, CPU, torch.float32)
    x, weight = torch.randn(9, 33).requires_grad_(wanted[0]), torch.randn(7, 33)
    leaf = weight.requires_grad_() if wanted[1] else x

    def run() -> list[Tensor]:
        u = gaussian_linear(x, weight, None, law, "element", torch.ones(7, 33))
        return [u, *torch.autograd.grad(u.square().sum(), leaf)]

    assert_near(*with_and_without(monkeypatch, run), 1e-6)


def test_under_autocast_the_product_is_in_bfloat16(gpu_kernels) -> None:
    x, weight = torch.randn(64, 256, requires_grad=True), torch.randn(32, 256, requires_grad=True)
    bias, law = torch.randn(32, requires_grad=True), Law.of(0.5, CPU, torch.float32)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        u = gaussian_linear(x, weight, bias, law, "element")
    assert u.dtype == torch.bfloat16
    assert set(gpu_kernels) == {"factors", "draw"}
    grads = torch.autograd.grad(u, (x, weight, bias), torch.ones_like(u))
    assert all(grad.dtype == torch.float32 for grad in grads)
    torch.manual_seed(1)
    wide = gaussian_linear(x, weight, bias, law, "element")
    expected = torch.autograd.grad(wide, (x, weight, bias), torch.ones_like(wide))
    for one, other in zip((u.detach(), *grads), (wide.detach(), *expected)):
        assert float((one - other).norm()) < 0.01 * float(other.norm())


def test_squares_in_bfloat16_give_the_right_deviation(gpu_kernels) -> None:
    """What `_dtype_of_squares` says, with sums in float32, as GPUs have them."""
    for n in (16, 256, 1024):
        x, weight = torch.randn(64, n).bfloat16(), torch.randn(128, n).bfloat16()
        found = gpu.factors(x, weight, None, torch.bfloat16)
        var = F.linear(found.square_x.float(), found.square_weight.float()).double()
        exact = F.linear(x.double().square(), weight.double().square())
        off = (var / exact).sqrt() - 1
        assert float(off.square().mean().sqrt()) < 2 * 2**-10 * (9 / n) ** 0.5
        assert float(off.abs().max()) < 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("unit", ["element", "input"])
def test_moments_without_gradients(dtype, unit, gpu_kernels, monkeypatch) -> None:
    x, weight, bias = torch.randn(9, 33), torch.randn(17, 33), torch.randn(17)
    given = [tensor.to(dtype) for tensor in (x, weight, bias)]
    for p in (0.0, 0.3, 1.0):
        for anchor in (None, torch.randn(17, 33).to(dtype)):
            law = Law.of(p, CPU, dtype)
            args = (F.linear, *given, law, unit, anchor, None, law)
            found, expected = with_and_without(monkeypatch, partial(moments_of, *args))
            assert torch.equal(found[0], expected[0])
            assert_near(found, expected, 2 * torch.finfo(dtype).eps)
    assert "factors" in gpu_kernels


def drawn_of(mean: Tensor, var: Tensor) -> list[Tensor]:
    leaves = mean.clone().requires_grad_(), var.clone().requires_grad_()
    u = gaussian_sample(*leaves)
    return [u, *torch.autograd.grad(u.sum(), leaves)]


def test_a_draw_of_any_mean_and_variance(gpu_kernels, monkeypatch) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        mean, var = torch.randn(1030).to(dtype), torch.rand(1030).to(dtype)
        var[:9] = 0
        found, expected = with_and_without(monkeypatch, partial(drawn_of, mean, var))
        assert_near(found, expected, torch.finfo(dtype).eps)
        assert torch.equal(found[0][:9], mean[:9])
        assert torch.equal(found[2][:9], torch.zeros(9, dtype=dtype))
    assert set(gpu_kernels) == {"draw"}
