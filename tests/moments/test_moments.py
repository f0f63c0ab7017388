"""`inference="moments"` on plain modules: the expectation of the activation that follows a site."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import apply_dropconnect, set_inference, strip_dropconnect

P = 0.3
Function = Callable[[Tensor], Tensor]


class Then(nn.Module):
    """A site, and whatever a forward does next."""

    def __init__(self, then: Function, site: nn.Module | None = None) -> None:
        super().__init__()
        self.site = nn.Linear(6, 4) if site is None else site
        self.then = then

    def forward(self, x: Tensor) -> Any:
        return self.then(self.site(x))


def operated(then: Function, site: nn.Module | None = None, **options: Any) -> Then:
    model = Then(then, site).double().eval()
    options = {"p": P, "inference": "moments", **options}
    return apply_dropconnect(model, "site", **options)


def exact_moments(site: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the pre-activation over all element masks; see design of the formula."""
    variance = P / (1 - P) * F.linear(x**2, site.weight**2)
    return F.linear(x, site.weight, site.bias), variance


def expected(f: Function, mean: Tensor, variance: Tensor, points: int = 20001) -> Tensor:
    """E[f(u)] by the trapezoidal rule over 10 standard deviations."""
    z = torch.linspace(-10, 10, points, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    values = f(mean[..., None] + variance.sqrt()[..., None] * z)
    return (values * density).sum(-1)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_mean_and_variance_are_those_of_all_masks(bias: bool) -> None:
    """Squaring shows the variance: E[u^2] - E[u]^2, exactly what enumeration of all masks gives."""
    site = nn.Linear(3, 2)
    model = operated(torch.square, site, bias=bias)
    x = torch.randn(4, 3, dtype=torch.float64)
    first = second = torch.zeros(())
    count = 3 + bias  # rows of the mask are independent: one at a time
    for bits in itertools.product((0.0, 1.0), repeat=count):
        chance = (1 - P) ** sum(bits) * P ** (count - sum(bits))
        mask = torch.tensor(bits, dtype=torch.float64) / (1 - P)
        u = F.linear(x, site.weight * mask[:3], site.bias * (mask[3] if bias else 1))
        first, second = first + chance * u, second + chance * u**2
    with torch.no_grad():
        torch.testing.assert_close(model(x), second, rtol=1e-7, atol=0)
        torch.testing.assert_close(Then(lambda u: u, site)(x), first, rtol=1e-7, atol=0)


EXACT: dict[str, Function] = {
    "identity": lambda u: u + 0,
    "relu": torch.relu,
    "relu-in-place": lambda u: u.clone().relu_(),
    "F.relu": lambda u: F.relu(u, inplace=False),
    "leaky": lambda u: F.leaky_relu(u, 0.1),
    "gelu": F.gelu,
    "clamp": lambda u: u.clamp(min=0),
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "relu-scaled-and-shifted": lambda u: 3 * torch.relu(0.5 * u - 0.1) + 1,
    "relu-dropout-cast": lambda u: F.dropout(torch.relu(u), 0.5, False).to(torch.float64),
    "tanh": torch.tanh,
    "sigmoid": lambda u: u.sigmoid(),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "softplus-decomposed": lambda u: torch.log(1 + torch.exp(u)),
    "gelu_new": lambda u: 0.5 * u * (1 + torch.tanh(0.79788 * (u + 0.044715 * torch.pow(u, 3.0)))),
    "quick_gelu": lambda u: u * torch.sigmoid(1.702 * u),
    "swish-by-division": lambda u: u / (1 + torch.exp(-u)),
    "square": lambda u: u**2,
    "cosine": torch.cos,
}


@pytest.mark.parametrize("f", EXACT.values(), ids=EXACT)
def test_expectation_of_an_activation(f: Function) -> None:
    """However it is written: the integral over the Gaussian with the exact mean and variance."""
    model = operated(f)
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        found = model(x)
        wanted = expected(f, *exact_moments(model.site, x))
    assert type(found) is Tensor
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


KINKED: dict[str, Function] = {
    "gelu-tanh": lambda u: F.gelu(u, approximate="tanh"),  # that of the other GELU is taken
    "where": lambda u: torch.where(u > 0, u, 0.1 * u),
    "times-mask": lambda u: u * (u > 0),
    "mask-cast": lambda u: (u > 0).to(u.dtype) * u,
    "maximum": lambda u: torch.maximum(u, torch.zeros(4, dtype=u.dtype)),
    "elu": F.elu,
    "softshrink": F.softshrink,
}


@pytest.mark.parametrize("f", KINKED.values(), ids=KINKED)
def test_expectation_with_a_kink(f: Function) -> None:
    """Gauss-Hermite quadrature misses a kink of slope 1 by about sd / 15 at most (16 nodes)."""
    model = operated(f)
    x = torch.randn(5, 6, dtype=torch.float64)
    shape = f if f is not KINKED["maximum"] else torch.relu
    with torch.no_grad():
        mean, variance = exact_moments(model.site, x)
        gap = (model(x) - expected(shape, mean, variance)).abs()
        assert (gap < variance.sqrt() / 15).all()
        plain = (f(mean) - expected(shape, mean, variance)).abs()
    assert gap.mean() < plain.mean() / 5


GATES: dict[str, tuple[Function, Callable[[Tensor], tuple[Tensor, Function]]]] = {
    "glu": (F.glu, lambda u: (u.chunk(2, -1)[1], torch.sigmoid)),
    "swiglu": (
        lambda u: F.silu(u.chunk(2, -1)[0]) * u.chunk(2, -1)[1],
        lambda u: (u.chunk(2, -1)[0], F.silu),
    ),
    "geglu-slices": (lambda u: u[..., :2] * F.gelu(u[..., 2:]), lambda u: (u[..., 2:], F.gelu)),
}


@pytest.mark.parametrize(("then", "parts"), GATES.values(), ids=GATES)
def test_gates_are_products_of_independent_factors(then: Function, parts: Any) -> None:
    model = operated(then)
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        mean, variance = exact_moments(model.site, x)
        gate, act = parts(mean)
        linear = torch.stack([half for half in mean.chunk(2, -1) if not torch.equal(half, gate)])[0]
        wanted = linear * expected(act, gate, parts(variance)[0])
        torch.testing.assert_close(model(x), wanted, rtol=1e-6, atol=1e-6)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def test_gated_mlp_and_residual() -> None:
    model = Gated().double().eval()
    apply_dropconnect(model, nn.Linear, p=P, inference="moments")
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        act = expected(F.silu, *exact_moments(model.gate, x))
        wanted = x + F.linear(act * F.linear(x, model.up.weight, model.up.bias),
                              model.down.weight, model.down.bias)  # fmt: skip
        torch.testing.assert_close(model(x), wanted, rtol=1e-6, atol=1e-6)


ADDS: dict[str, Callable[[Any, Tensor], Any]] = {
    "add": lambda u, t: u + t,
    "radd": lambda u, t: t + u,
    "add_": lambda u, t: u.add_(t),
    "iadd": lambda u, t: _added(u, t),
    "tensor-iadd": lambda u, t: _added(t.clone(), u),
    "torch.add": lambda u, t: torch.add(u, t),
    "alpha": lambda u, t: torch.add(u, t / 2, alpha=2),
    "rsub": lambda u, t: -(-t - u),
}


def _added(total: Any, term: Any) -> Any:
    total += term
    return total


@pytest.mark.parametrize("add", ADDS.values(), ids=ADDS)
def test_a_residual_shifts_the_gaussian(add: Any) -> None:
    t = torch.randn(5, 4, dtype=torch.float64)
    model = operated(lambda u: torch.sigmoid(add(u, t)))
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        mean, variance = exact_moments(model.site, x)
        wanted = expected(torch.sigmoid, mean + t, variance)
        torch.testing.assert_close(model(x), wanted, rtol=1e-6, atol=1e-6)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.one(x) - self.other(x))


def test_variances_of_two_sites_add() -> None:
    model = apply_dropconnect(Two().double().eval(), nn.Linear, p=P, inference="moments")
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        (a, v), (b, w) = (exact_moments(site, x) for site in (model.one, model.other))
        torch.testing.assert_close(
            model(x), expected(torch.tanh, a - b, v + w), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("functional", [False, True], ids=["module", "torch"])
def test_batch_norm_and_dropout_in_eval(functional: bool) -> None:
    norm = nn.BatchNorm2d(3).double().eval()
    for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
        nn.init.uniform_(value, 0.5, 2)
    values = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    run = norm if not functional else lambda u: torch.batch_norm(u, *values, False, 0.1, 1e-5, True)
    act = nn.ReLU(inplace=True)
    model = operated(lambda u: F.dropout(act(run(u)), 0.5, False), nn.Conv2d(2, 3, 2))
    x = torch.randn(4, 2, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        variance = P / (1 - P) * F.conv2d(x**2, model.site.weight**2)
        mean = norm(F.conv2d(x, model.site.weight, model.site.bias))
        scale = (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None, None]
        wanted = expected(torch.relu, mean, variance * scale**2, points=4001)
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


class Named(NamedTuple):
    y: Any
    rest: Any


@dataclasses.dataclass
class Fields:
    y: Any
    rest: Any


@pytest.mark.parametrize("make", [Named, Fields, lambda y, r: {"y": y, "r": r}, lambda *v: list(v)])
@pytest.mark.parametrize("wrap", [lambda u: u, torch.relu, lambda u: u > 0, lambda u: u.view(-1)])
def test_outputs_are_tensors(make: Any, wrap: Any) -> None:
    found = operated(lambda u: make(wrap(u), (u, [u.relu()])))(
        torch.randn(5, 6, dtype=torch.float64)
    )
    if dataclasses.is_dataclass(found):
        found = vars(found)
    first, (second, [third]) = found.values() if isinstance(found, dict) else found
    assert {type(first), type(second), type(third)} == {Tensor}


READS: dict[str, Function] = {
    "pool": lambda u: F.max_pool1d(u, 2),
    "cat": lambda u: torch.cat([u, u], -1),
    "matmul": lambda u: u @ u.mT,
    "einsum": lambda u: torch.einsum("ij,kj->ik", u, u),
    "sum": lambda u: u.sum(-1),
    "loss": lambda u: F.cross_entropy(u, torch.tensor([0, 1, 2, 3, 0])),
    "write": lambda u: torch.empty(5, 4, dtype=torch.float64).copy_(u),
    "tolist": lambda u: torch.tensor(u.tolist(), dtype=torch.float64),
    "branch": lambda u: u.sum() if u.mean() > 0 else -u.sum(),
    "index": lambda u: u[u > 0],
}


@pytest.mark.parametrize("then", READS.values(), ids=READS)
def test_linear_functions_and_those_without_a_rule_see_the_mean(then: Function) -> None:
    model = operated(then)
    x = torch.randn(5, 6, dtype=torch.float64)
    found = model(x)
    assert type(found) is Tensor
    with set_inference(model, "mean"):
        torch.testing.assert_close(found, model(x))


def test_queries_do_not_compute() -> None:
    def then(u: Any) -> Tensor:
        assert u.shape == (5, 4) == tuple(u.size())
        assert (u.size(0), u.dim(), u.ndim, u.numel(), len(u)) == (5, 2, 2, 20, 5)
        assert u.dtype is torch.float64
        assert torch.is_floating_point(u)
        v = torch.relu(u).to(torch.float32)
        assert v.dtype is torch.float32
        assert v.device == u.device
        assert repr(u) == "Travelling(shape=(5, 4), dtype=torch.float64)"
        return v.square()

    assert operated(then)(torch.randn(5, 6, dtype=torch.float64)).dtype is torch.float32


@pytest.mark.parametrize("p", [0, 1])
def test_nothing_and_everything(p: int) -> None:
    model = operated(torch.relu, p=p)
    x = torch.randn(5, 6, dtype=torch.float64)
    u = model.site(x) if p == 0 else model.site.bias.expand(5, 4)
    assert torch.equal(model(x), torch.relu(u))


def test_gradient_flows_in_eval() -> None:
    model = operated(torch.tanh, bias=True)
    names = [name for name, _ in model.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values)), (x,))

    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *model.parameters()))


def test_training_samples_and_strip_is_plain() -> None:
    model = operated(torch.relu)
    x = torch.randn(5, 6, dtype=torch.float64)
    found = model(x)
    model.train()
    assert not torch.equal(model(x), model(x))
    strip_dropconnect(model)
    assert type(model) is Then
    assert torch.equal(model(x), torch.relu(model.site(x)))
    assert not torch.equal(model(x), found)
