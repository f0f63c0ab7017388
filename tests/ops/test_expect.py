"""Expectations of activations against adaptive quadrature; tails, limits, gradients, draws."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.special import erfcx
from torch import Tensor, nn

from surgery.ops import (
    expectation,
    expectation_by_draws,
    gauss_hermite,
    register_closed_form,
)
from surgery.ops.expect import excess

from ..expected import normal_expectation
from ..internals import constant, own_table_of_closed_forms, set_constant

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
MEANS = [-6.0, -1.0, 0.0, 0.3, 3.0, 6.5]

CLOSED = {
    "identity": nn.Identity(),
    "relu": torch.relu,
    "nn.ReLU": nn.ReLU(),
    "gelu": F.gelu,
    "leaky_relu": F.leaky_relu,
    "nn.LeakyReLU": nn.LeakyReLU(0.3),
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "nn.Hardtanh": nn.Hardtanh(-0.5, 2.0),
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
}


def quick_gelu(u: Tensor) -> Tensor:
    return u * torch.sigmoid(1.702 * u)


SMOOTH = {
    "silu": (F.silu, (1e-12, 1e-9, 1e-6)),
    "tanh": (torch.tanh, (1e-9, 3e-5, 1e-3)),
    "gelu-tanh": (nn.GELU(approximate="tanh"), (1e-12, 3e-8, 3e-6)),
    "quick_gelu": (quick_gelu, (1e-11, 5e-6, 3e-4)),
    "sigmoid": (torch.sigmoid, (1e-12, 3e-10, 3e-7)),
    "softplus": (F.softplus, (1e-12, 1e-10, 1e-7)),
    "elu": (F.elu, (1e-3, 2e-3, 5e-3)),
    "mish": (F.mish, (1e-12, 1e-7, 3e-5)),
}
"""Quadrature, and its error for standard deviations up to 1, 2 and 3."""


def errors(f, name: str | None, sd: float, dtype: torch.dtype = torch.float64) -> float:
    mean = torch.tensor(MEANS, dtype=dtype)
    found = expectation(f, mean, torch.full_like(mean, sd * sd), name)
    exact = torch.tensor([normal_expectation(f, m, sd) for m in MEANS], dtype=torch.float64)
    return float((found.double() - exact).abs().max())


@pytest.mark.parametrize("sd", [0.01, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms(name: str, sd: float) -> None:
    assert errors(CLOSED[name], None, sd) < 1e-11
    assert errors(CLOSED[name], None, sd, torch.float32) < 1e-6


@pytest.mark.parametrize("count", [1, 2, 3, 12, 64, 128])
def test_the_rule_of_gauss_and_hermite(count: int) -> None:
    """Nodes are the eigenvalues of the Jacobi matrix, weights the squared first entries of its
    eigenvectors (Golub and Welsch 1969)."""
    off = torch.arange(1, count, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    weights = vectors[0].square()
    found = torch.tensor(gauss_hermite(count), dtype=torch.float64)
    kept = len(nodes) - len(found)
    middle = slice(kept // 2, len(nodes) - kept // 2)
    torch.testing.assert_close(found[:, 0], nodes[middle], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[:, 1], weights[middle], rtol=1e-9, atol=1e-16)
    with pytest.raises(ValueError, match="1 to 128 nodes"):
        gauss_hermite(129)


@pytest.mark.parametrize("name", SMOOTH)
def test_quadrature(name: str) -> None:
    f, bounds = SMOOTH[name]
    for sds, bound in zip([(0.1, 0.5, 1.0), (2.0,), (3.0,)], bounds):
        for sd in sds:
            assert errors(f, None, sd) < bound, sd
            assert errors(f, None, sd, torch.float32) < bound + 1e-6, sd


def test_a_name_finds_the_closed_form_of_any_callable() -> None:
    slope = functools.partial(F.leaky_relu, negative_slope=0.4)
    assert errors(slope, "leaky_relu", 1.0) < 1e-11
    assert errors(slope, None, 1.0) > 1e-4
    assert errors(torch.tanh, "a name that nobody registered", 0.5) < 1e-11


@pytest.mark.parametrize(
    "f", [torch.relu_, nn.ReLU(inplace=True), torch.tanh_], ids=["relu_", "ReLU", "tanh_"]
)
def test_a_function_that_writes_gets_a_copy(f: Callable[[Tensor], Tensor]) -> None:
    mean, var = torch.tensor([-1.0, 0.5]), torch.tensor([1.0, 2.0])
    plain = torch.tanh if f is torch.tanh_ else torch.relu
    assert torch.equal(expectation(f, mean, var), expectation(plain, mean, var))
    assert torch.equal(mean, torch.tensor([-1.0, 0.5]))


def test_a_method_has_the_closed_form_of_its_function() -> None:
    mean, var = torch.randn(5), torch.rand(5)
    assert torch.equal(expectation(Tensor.relu, mean, var), expectation(torch.relu, mean, var))


def test_registered_forms_are_used() -> None:
    square = torch.square
    mean, var = torch.randn(5), torch.rand(5)
    with own_table_of_closed_forms():
        register_closed_form("square", lambda f, mean, var: mean.square() + var, square)
        assert torch.equal(expectation(square, mean, var), mean.square() + var)
        assert torch.equal(expectation(lambda u: u * u, mean, var, "square"), mean.square() + var)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_relu_far_in_the_tail(dtype: torch.dtype) -> None:
    """Relative error: the mean is up to 13 standard deviations below zero."""
    mean = torch.linspace(-12.5, 0, 400).mul(0.37).to(dtype)
    var = torch.full_like(mean, 0.37**2)
    found = expectation(torch.relu, mean, var).double()
    sd = var.double().sqrt()
    t = -mean.double() / sd
    tail = 1 - t * math.sqrt(math.pi / 2) * torch.from_numpy(erfcx((t / math.sqrt(2)).numpy()))
    exact = sd * torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi) * tail
    # rounding of t moves the exponent by t^2 eps; 1 - t * mills is 1 / t^2, of terms with 3 eps
    bound = 4 * torch.finfo(dtype).eps * (1 + t.square())
    assert bool(((found - exact).abs() / exact < bound).all())
    assert bool((exact > 0).all())


@pytest.mark.compiler
def test_the_kernel_and_the_formula_of_a_kink_agree(kernel_calls) -> None:
    """Also where nothing is left of it, and where it is not a number."""
    t = torch.cat([torch.linspace(-15, 15, 3001), torch.tensor([0.0, 1e30, -1e30, math.nan])])
    bound = 4 * torch.finfo(torch.float32).eps * (1 + t.square())[:3002]
    normal = torch.finfo(torch.float32).tiny
    for sd in (0.0, 1e-3, 0.4, 1.0, 1e3):
        mean, var = t * (sd or 1.0), torch.full_like(t, sd * sd)
        found, expected = excess(mean, var), excess(mean.double(), var.double())
        assert bool(((found - expected).abs()[:3002] <= bound * expected[:3002] + normal).all())
        assert found[3002:3004].tolist() == [0.0, 0.0]
        assert bool(found[-1].isnan()) or sd == 0.0
        whole = expectation(torch.relu, mean, var)
        assert torch.equal(whole.nan_to_num(-1), (torch.relu(mean) + found).nan_to_num(-1))
    assert kernel_calls == ["excess"] * 10


def test_a_kink_that_is_differentiated_has_the_formula(kernel_calls) -> None:
    """The kernel has no gradient."""
    mean, var = torch.randn(5, requires_grad=True), torch.rand(5)
    assert excess(mean, var).requires_grad
    assert excess(mean.detach(), var.requires_grad_()).requires_grad
    assert kernel_calls == []


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", [*CLOSED, *SMOOTH])
def test_zero_variance_gives_the_function_and_its_derivative(name: str, dtype) -> None:
    f: Any = CLOSED[name] if name in CLOSED else SMOOTH[name][0]
    values = [-1e4, -7.0, -2.5, -0.7, 0.0, 0.1, 1.5, 7.0, 1e4]
    mean = torch.tensor(values).to(dtype).requires_grad_()
    var = torch.zeros_like(mean).requires_grad_()
    found = expectation(f, mean, var)
    plain = f(mean)
    assert found.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(found, plain, rtol=step, atol=6 * step)
    by_mean, by_var = torch.autograd.grad(found.sum(), (mean, var), allow_unused=True)
    (slope,) = torch.autograd.grad(plain.sum(), mean)
    if name == "hardsigmoid":  # torch multiplies by a float32 1 / 6, whatever the dtype
        step = max(step, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(by_mean, slope, rtol=step, atol=4 * step)
    assert by_var is None or bool(by_var.isfinite().all())


@pytest.mark.parametrize("name", [*CLOSED, "silu"])
def test_gradients(name: str) -> None:
    f: Any = CLOSED.get(name, F.silu)
    mean = torch.randn(6).double().requires_grad_()
    var = (torch.rand(6).double() + 0.05).requires_grad_()

    def both(mean, var):
        return expectation(f, mean, var) + 0 * var

    assert torch.autograd.gradcheck(both, (mean, var))
    if name != "hardsigmoid":  # torch has no second derivative of it
        assert torch.autograd.gradgradcheck(both, (mean, var))


def test_gradient_of_a_smooth_form_at_zero_variance() -> None:
    """Half the second derivative of the function."""
    mean = torch.tensor([-1.0, 0.0, 0.5], dtype=torch.float64, requires_grad=True)
    var = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(expectation(F.gelu, mean, var).sum(), var)
    (slope,) = torch.autograd.grad(F.gelu(mean).sum(), mean, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), mean)
    torch.testing.assert_close(found, second / 2)


def test_parameters_of_the_function_learn() -> None:
    f = nn.PReLU(3).double()
    mean, var = torch.randn(4, 3).double(), torch.rand(4, 3).double()
    expectation(f, mean, var).sum().backward()
    assert f.weight.grad.shape == (3,)
    assert bool((f.weight.grad < 0).all())


def test_quadrature_keeps_no_tensor_for_each_node() -> None:
    """Autograd keeps the mean, the deviation and little else, not one tensor for each node."""
    mean, var = torch.randn(1000, requires_grad=True), torch.rand(1000, requires_grad=True)
    kept: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        expectation(F.silu, mean, var)
    assert len(kept) <= 6


@pytest.mark.parametrize(
    "f",
    [torch.relu, F.gelu, F.silu, F.hardswish, nn.LeakyReLU(0.3)],
    ids=["relu", "gelu", "silu", "hardswish", "LeakyReLU"],
)
def test_traces_into_one_graph(f) -> None:
    mean, var = torch.randn(8, requires_grad=True), torch.rand(8, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(functools.partial(expectation, f), fullgraph=True, backend="aot_eager")
    found, expected = compiled(mean, var), expectation(f, mean, var)
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(e.sum(), (mean, var)) for e in (found, expected))):
        torch.testing.assert_close(a, b)


def test_functional_transforms() -> None:
    mean, var = torch.randn(8).double(), torch.rand(8).double()
    for f in (torch.relu, F.silu):
        leaf = mean.clone().requires_grad_()
        (expected,) = torch.autograd.grad(expectation(f, leaf, var).sum(), leaf)

        def loss(mean, f=f):
            return expectation(f, mean, var).sum()

        torch.testing.assert_close(torch.func.grad(loss)(mean), expected)


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 4)], ids=str)
def test_draws_have_the_expectation(shape, check_mean) -> None:
    mean, var = torch.rand(shape).double(), torch.rand(shape).double()
    exact = expectation(torch.relu, mean, var)
    check_mean(lambda: expectation_by_draws(torch.relu, mean, var, 3), exact, 1000)


@pytest.mark.parametrize("samples", [1, 2, 5, 64])
def test_chunks_of_draws(samples: int, monkeypatch) -> None:
    """So many draws are averaged, never more of them at a time than a chunk holds."""
    sizes: list[int] = []

    def f(u: Tensor) -> Tensor:
        sizes.append(u.numel())
        return torch.ones_like(u)

    set_constant(monkeypatch, "chunk of draws", 50)
    mean = torch.zeros(4, 5)
    assert torch.equal(expectation_by_draws(f, mean, mean + 1, samples), torch.ones(4, 5))
    assert sum(sizes) == 20 * samples
    assert max(sizes) <= 40


def test_draws_of_a_function_with_channels() -> None:
    f = nn.PReLU(3)
    with torch.no_grad():
        f.weight.copy_(torch.tensor([0.0, 1.0, 2.0]))
    mean = torch.randn(2, 3, 5)
    found = expectation_by_draws(f, mean, torch.zeros_like(mean), 4)
    torch.testing.assert_close(found, f(mean))


def test_no_draws_are_refused() -> None:
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        expectation_by_draws(torch.relu, torch.zeros(2), torch.ones(2), 0)


def test_large_tensors_are_drawn_one_by_one() -> None:
    mean = torch.zeros(constant("chunk") + 1)
    sizes: list[int] = []

    def f(u: Tensor) -> Tensor:
        sizes.append(u.numel())
        return u

    expectation_by_draws(f, mean, mean, 3)
    assert sizes == [constant("chunk") + 1] * 3
