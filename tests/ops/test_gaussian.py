"""Moments against the enumeration of every mask; the sample against its moments and gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.ops import Law, gaussian_linear, gaussian_sample, linear_moments, moments_of
from surgery.spec.config import Unit

from ..expected import every_mask, mask_shape

CPU = torch.device("cpu")
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
units = pytest.mark.parametrize("unit", ["element", "input", "output", "tensor"])
towards = pytest.mark.parametrize("anchored", [False, True], ids=["zero", "pretrained"])

PRODUCTS = {
    "linear": (F.linear, (3, 2), (2, 2)),
    "conv1d": (partial(F.conv1d, padding=1, stride=2), (2, 2, 4), (2, 2, 2)),
    "conv1d pointwise": (F.conv1d, (2, 2, 4), (2, 2, 1)),
    "conv1d grouped": (partial(F.conv1d, groups=2), (2, 4, 3), (2, 2, 2)),
    "conv2d": (partial(F.conv2d, padding=1, dilation=2), (1, 1, 4, 4), (2, 1, 2, 2)),
    "conv3d": (F.conv3d, (1, 1, 2, 2, 3), (1, 1, 2, 2, 2)),
    "transposed": (partial(F.conv_transpose1d, stride=2), (2, 2, 3), (2, 2, 3)),
}

ONCE = "a draw of sampling='gaussian' is differentiable once"


def law(p: float, dtype: torch.dtype = torch.float64) -> Law:
    return Law.of(p, CPU, dtype)


def outputs(name: str, weight: Tensor) -> int:
    return weight.shape[1] if name == "transposed" else weight.shape[0]


def enumerate_moments(product, x, weight, bias, p, unit, anchor, bias_anchor, drop_bias):
    """Mean and variance of the product over every mask, each with its probability."""
    shape = mask_shape(tuple(weight.shape), unit)
    entries = torch.Size(shape).numel()
    shared = unit in ("output", "tensor")
    extra = 0 if not drop_bias or shared else (1 if unit == "input" else len(bias))

    def used(value: Tensor, towards: Tensor | None, mask: Tensor) -> Tensor:
        towards = torch.zeros_like(value) if towards is None else towards
        return towards + (mask * (value - towards) / (1 - p) if p < 1 else 0)

    mean = square = torch.zeros(())
    for chance, bits in every_mask(entries + extra, p):
        mask = bits[:entries].view(shape)
        own = (mask.flatten() if shared else bits[entries:]) if drop_bias else None
        b = bias if own is None else used(bias, bias_anchor, own)
        u = product(x, used(weight, anchor, mask), b)
        mean, square = mean + chance * u, square + chance * u.square()
    return mean, square - mean.square()


CASES = [
    (name, unit)
    for name, (_, _, shape) in PRODUCTS.items()
    for unit in ("element", "input", "output", "tensor")
    # rows of a transposed convolution are inputs; columns of a kernel are refused, see below
    if (unit, name) != ("output", "transposed") and (unit != "input" or set(shape[2:]) <= {1})
]


@pytest.mark.parametrize(("name", "unit"), CASES, ids=map("-".join, CASES))
@towards
@pytest.mark.parametrize("drop_bias", [False, True], ids=["bias kept", "bias dropped"])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_moments_are_those_of_all_masks(name, unit, anchored, drop_bias, p) -> None:
    product, inputs, shape = PRODUCTS[name]
    x, weight = torch.randn(inputs).double(), torch.randn(shape).double()
    bias = torch.randn(outputs(name, weight)).double()
    anchor = torch.randn(shape).double() if anchored else None
    bias_anchor = torch.randn_like(bias) if anchored else None
    args: tuple[Any, Tensor, Tensor, Tensor] = (product, x, weight, bias)
    rule = law(p)
    mean, var = moments_of(*args, rule, unit, anchor, bias_anchor, rule if drop_bias else None)
    found = enumerate_moments(*args, p, unit, anchor, bias_anchor, drop_bias)
    # probabilities are multiples of 2**-32
    torch.testing.assert_close(mean, found[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(var, found[1], rtol=1e-8, atol=1e-9)


@units
@towards
@pytest.mark.parametrize("p", [(0.3, 0.6), (0.6, 0.3), (0.0, 0.5), (0.3, 1.0), (1.0, 0.3)], ids=str)
def test_moments_where_weight_and_bias_differ_in_p(unit: Unit, anchored: bool, p) -> None:
    """One output of two inputs, over every mask: ten equally likely numbers for each entry."""
    x, values = torch.randn(2).double(), torch.randn(3).double()
    anchors = torch.randn(3).double() if anchored else torch.zeros(3).double()
    shared = unit in ("output", "tensor")
    numbers = torch.arange(0.05, 1, 0.1, dtype=torch.float64)
    drawn = torch.cartesian_prod(*[numbers] * (1 if shared else 3)).view(-1, 1 if shared else 3)
    drop = torch.tensor([p[0], p[0], p[1]], dtype=torch.float64)
    scale = torch.where(drop < 1, 1 / (1 - drop), 0)
    used = anchors + (drawn.expand(-1, 3) >= drop) * scale * (values - anchors)
    wanted = used[:, :2] @ x + used[:, 2]
    weight, bias = values[:2].view(1, 2), values[2:]
    mean, var = linear_moments(
        x, weight, bias, law(p[0]), unit, anchors[:2].view(1, 2), anchors[2:], law(p[1])
    )
    torch.testing.assert_close(mean, wanted.mean()[None], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(var, wanted.var(correction=0)[None], rtol=1e-8, atol=1e-8)


@units
def test_mean_is_the_plain_layer_bit_for_bit(unit: Unit) -> None:
    x, weight, bias = torch.randn(4, 3, 8), torch.randn(5, 8), torch.randn(5)
    for p in (0.0, 0.4):
        rule = law(p, torch.float32)
        mean, var = linear_moments(x, weight, bias, rule, unit, bias_law=rule)
        assert torch.equal(mean, F.linear(x, weight, bias))
        assert bool((var == 0).all()) == (p == 0)


@units
@towards
def test_p_one_is_the_anchor_bit_for_bit(unit: Unit, anchored: bool) -> None:
    x, weight, bias = torch.randn(4, 8), torch.randn(5, 8), torch.randn(5)
    anchor = torch.randn(5, 8) if anchored else None
    mean, var = linear_moments(x, weight, bias, law(1.0, torch.float32), unit, anchor)
    assert torch.equal(mean, F.linear(x, torch.zeros(5, 8) if anchor is None else anchor, bias))
    assert torch.equal(var, torch.zeros(4, 5))


def test_no_bias() -> None:
    x, weight = torch.randn(4, 8), torch.randn(5, 8)
    rule = law(0.5, torch.float32)
    mean, var = linear_moments(x, weight, None, rule, "element", bias_law=rule)
    assert torch.equal(mean, F.linear(x, weight))
    torch.testing.assert_close(var, F.linear(x.square(), weight.square()))


def test_input_unit_of_a_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match=r'unit="input".*shape \(2, 3, 3\).*Use unit="element"'):
        moments_of(F.conv1d, torch.randn(1, 3, 5), torch.randn(2, 3, 3), None, law(0.5), "input")


@units
@towards
def test_gradients_of_the_moments(unit: Unit, anchored: bool) -> None:
    leaves = [torch.randn(s).double().requires_grad_() for s in [(3, 4), (2, 4), (2,)]]
    anchor = torch.randn(2, 4).double() if anchored else None

    rule = law(0.3)

    def both(x, weight, bias):
        return linear_moments(x, weight, bias, rule, unit, anchor, bias_law=rule)

    assert torch.autograd.gradcheck(both, leaves)
    assert torch.autograd.gradgradcheck(both, leaves)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_small_weights_of_narrow_dtypes_have_a_variance(dtype: torch.dtype) -> None:
    """Squares of 1e-4 vanish in float16."""
    x, weight = torch.randn(4, 256).to(dtype), (torch.randn(5, 256) * 1e-4).to(dtype)
    mean, var = linear_moments(x * 16, weight, None, law(0.5, dtype), "element")
    exact = F.linear((x * 16).double().square(), weight.double().square())
    assert mean.dtype == dtype
    assert var.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(var.double(), exact, rtol=max(step, 1e-12) * 4, atol=1e-7)


def test_under_autocast_the_variance_is_of_float32_squares() -> None:
    x, weight = torch.randn(4, 64), torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        mean, var = linear_moments(x, weight, None, law(0.5, torch.float32), "element")
        assert torch.equal(mean, F.linear(x, weight))
    exact = F.linear(x.square(), weight.square())
    assert torch.equal(var, exact.bfloat16())


def test_sample_has_its_moments(check_mean) -> None:
    mean, var = torch.randn(6).double(), torch.rand(6).double()
    check_mean(lambda: gaussian_sample(mean, var), mean)
    check_mean(lambda: (gaussian_sample(mean, var) - mean).square(), var)


@pytest.mark.parametrize("unit", ["element", "input"])
@towards
@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("frozen", ["", "x", "weight"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_linear_is_the_sample_of_its_moments(
    unit: Unit, anchored: bool, shape, frozen: str, dtype: torch.dtype
) -> None:
    """Value and gradients, of the same noise; float32 has a kernel."""
    x = torch.randn(shape, dtype=dtype, requires_grad=frozen != "x")
    weight = torch.randn(3, 4, dtype=dtype, requires_grad=frozen != "weight")
    bias = torch.randn(3, dtype=dtype, requires_grad=True)
    anchor = torch.randn(3, 4, dtype=dtype) if anchored else None
    rule = Law.of(0.3, weight.device, weight.dtype)
    leaves = [tensor for tensor in (x, weight, bias) if tensor.requires_grad]
    results = []
    for draw in (
        lambda: gaussian_linear(x, weight, bias, rule, unit, anchor),
        lambda: gaussian_sample(*linear_moments(x, weight, bias, rule, unit, anchor)),
    ):
        torch.manual_seed(3)
        sample = draw()
        results.append([sample, *torch.autograd.grad(sample.sin().sum(), leaves)])
    for found, expected in zip(*results, strict=True):
        close = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(found, expected, rtol=close, atol=close)


@pytest.mark.compiler
def test_a_draw_by_the_kernel_is_that_of_the_formula(kernel_calls, switch_kernels) -> None:
    """Also where the variance is zero or not a number."""
    x, weight = torch.randn(33, 70), torch.randn(130, 70)
    x[3], x[5, 2], weight[7] = 0, torch.nan, 0
    rule = Law.of(0.3, weight.device, weight.dtype)
    found = []
    for enabled in (True, False):
        switch_kernels(enabled)
        torch.manual_seed(1)
        leaf = weight.clone().requires_grad_()
        sample = gaussian_linear(x, leaf, None, rule, "element")
        found.append([sample, *torch.autograd.grad(sample.nan_to_num().sum(), leaf)])
    assert kernel_calls == ["sample"]
    for one, other in zip(*found):
        rounding = (
            4 * torch.finfo(torch.float32).eps * float(other.detach().nan_to_num().abs().max())
        )
        torch.testing.assert_close(one, other, rtol=0, atol=rounding, equal_nan=True)


def test_linear_checks_its_weight_and_refuses_a_second_derivative() -> None:
    x, weight = torch.randn(2, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    rule = Law.of(0.3, weight.device, weight.dtype)
    sample = gaussian_linear(x, weight, None, rule, "element")
    (grad,) = torch.autograd.grad(sample.sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=ONCE):
        grad.sum().backward()
    sample = gaussian_linear(x, weight, None, rule, "element")
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sample.sum().backward()


def test_linear_has_no_nan_where_the_variance_is_zero() -> None:
    x, weight = torch.zeros(2, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    rule = Law.of(0.3, weight.device, weight.dtype)
    sample = gaussian_linear(x, weight, torch.ones(3), rule, "element")
    assert torch.equal(sample, torch.ones(2, 3))
    for grad in torch.autograd.grad(sample.sum(), (x, weight)):
        assert bool(grad.isfinite().all())


def test_sample_comes_from_the_default_generator() -> None:
    mean, var = torch.randn(6), torch.rand(6)
    torch.manual_seed(3)
    expected = mean + var.sqrt() * torch.randn(6)
    torch.manual_seed(3)
    assert torch.equal(gaussian_sample(mean, var), expected)


def test_gradients_of_the_sample() -> None:
    mean = torch.randn(6).double().requires_grad_()
    var = (torch.rand(6).double() + 0.1).requires_grad_()

    def draw(mean, var):
        torch.manual_seed(7)
        return gaussian_sample(mean, var)

    assert torch.autograd.gradcheck(draw, (mean, var))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_zero_variance(dtype: torch.dtype) -> None:
    mean = torch.tensor([-2.0, 0.0, 3.0]).to(dtype).requires_grad_()
    var = torch.zeros(3).to(dtype).requires_grad_()
    sample = gaussian_sample(mean, var)
    assert sample.dtype == dtype
    assert torch.equal(sample, mean)
    sample.sum().backward()
    assert torch.equal(mean.grad, torch.ones(3).to(dtype))
    assert torch.equal(var.grad, torch.zeros(3).to(dtype))


def test_sample_keeps_one_tensor_and_refuses_a_second_derivative() -> None:
    mean, var = torch.randn(50, requires_grad=True), torch.rand(50, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sample = gaussian_sample(mean, var)
    assert [tensor.shape for tensor in kept if tensor.numel()] == [(50,)]
    (slope,) = torch.autograd.grad(sample.square().sum(), var, create_graph=True)
    with pytest.raises(RuntimeError, match=ONCE):
        slope.sum().backward()


@pytest.mark.parametrize("function", ["linear", "sample"])
@pytest.mark.parametrize("loss", [torch.sum, lambda out: out.square().sum()], ids=["sum", "square"])
def test_no_second_derivative_is_left_out(function: str, loss: Callable[[Tensor], Tensor]) -> None:
    """Of a loss whose gradient is a constant, too, and where autograd only goes to the inputs: what
    `once_differentiable` cuts off is missing there without a word."""
    x, weight = torch.randn(2, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    law = Law.of(0.3, weight.device, weight.dtype)

    def draw(x: Tensor) -> Tensor:
        if function == "linear":
            return gaussian_linear(x, weight, None, law, "element")
        return gaussian_sample(x, x.square() + 1)

    (grad,) = torch.autograd.grad(loss(draw(x)), x, create_graph=True)
    with pytest.raises(RuntimeError, match=ONCE):
        torch.autograd.grad(grad.sum() + x.square().sum(), x)
    with pytest.raises(RuntimeError, match=ONCE):
        torch.autograd.functional.hessian(lambda x: loss(draw(x)), x.detach())


def test_traces_into_one_graph() -> None:
    weight = torch.randn(5, 8, requires_grad=True)

    def layer(x: Tensor) -> Tensor:
        return gaussian_sample(*linear_moments(x, weight, None, law(0.3, torch.float32), "element"))

    x = torch.randn(4, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    (found,) = torch.autograd.grad(compiled(x).sum(), weight)
    torch.manual_seed(1)
    (expected,) = torch.autograd.grad(layer(x).sum(), weight)
    torch.testing.assert_close(found, expected)


def test_meta_tensors() -> None:
    x, weight = torch.empty(3, 4, device="meta"), torch.empty(5, 4, device="meta")
    rule = Law.of(0.5, weight.device, weight.dtype)
    for unit in ("element", "tensor"):
        assert all(t.shape == (3, 5) for t in linear_moments(x, weight, None, rule, unit))
