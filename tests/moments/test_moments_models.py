"""`inference="moments"` on whole models: Monte Carlo, draws, precision, compilation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import apply_dropconnect, set_inference
from surgery.base.torch_names import canonical
from surgery.moments import torch_functions as table
from surgery.torch_private.trees import tree_leaves

P = 0.3


def mlp(act: nn.Module, width: int = 256) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), act, nn.Linear(width, 3)).double().eval()
    return apply_dropconnect(model, "0", p=P, inference="moments")


def estimate(model: nn.Module, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Monte Carlo mean and its standard error, each draw with masks of its own for every row."""
    with set_inference(model, "sample"), torch.no_grad():
        draws = torch.stack([model(x) for _ in range(count)])
    return draws.mean(0), draws.std(0) / math.sqrt(count)


@pytest.mark.parametrize(
    "act", [nn.ReLU(), nn.GELU(), nn.Tanh()], ids=lambda act: type(act).__name__
)
def test_large_layer_agrees_with_monte_carlo(act: nn.Module) -> None:
    """Of 256 inputs the sum is near a Gaussian: by Berry-Esseen its distribution is off by at most
    0.56 * sum E|term|^3 / sd^3, about 0.1; the expectation of the outputs is off by far less than a
    standard error of 1500 draws."""
    model, x = mlp(act), torch.randn(8, 256, dtype=torch.float64)
    with torch.no_grad():
        found = model(x)
        with set_inference(model, "mean"):
            plain = model(x)
    mean, error = estimate(model, x, 1500)
    assert ((found - mean) / error).abs().max() < 5
    if not isinstance(act, nn.Tanh):  # an odd function: the errors of mean inference cancel
        assert (plain - mean).abs().mean() > 3 * (found - mean).abs().mean()


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_draws_converge_to_the_expectation(residual: bool) -> None:
    """`samples=Z` is unbiased; its error falls as 1 / sqrt(Z)."""
    t = torch.randn(4, 16, dtype=torch.float64)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.site = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            u = self.site(x)
            return torch.relu(u + t if residual else u)

    model = apply_dropconnect(Net().double().eval(), "site", p=P, inference="moments")
    x = torch.randn(4, 16, dtype=torch.float64)
    with torch.no_grad():
        exact = model(x)
        errors = []
        for count in (10, 1000):
            with set_inference(model, "moments", samples=count):
                gaps = torch.stack([model(x) - exact for _ in range(8)])
            errors.append(gaps.square().mean().sqrt())
            spread = gaps.std(0).mean() / math.sqrt(8 * gaps[0].numel())
            assert gaps.mean().abs() < 5 * spread
    assert 5 < errors[0] / errors[1] < 20


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "softmin"])
def test_softmax_after_a_site(name: str) -> None:
    function = getattr(nn, {"softmax": "Softmax", "log_softmax": "LogSoftmax"}.get(name, "Softmin"))
    model = nn.Sequential(nn.Linear(6, 4), function(-1)).double().eval()
    plain, x = copy.deepcopy(model), torch.randn(5, 6, dtype=torch.float64)
    apply_dropconnect(model, nn.Linear, p=P, inference="moments")
    exact, error = estimate(model, x, 3000)
    with torch.no_grad():
        found = model(x)
        gap, before = ((one - exact).square().mean() for one in (found, plain(x)))
    assert gap < 0.5 * before + 2 * error.square().mean()
    with set_inference(model, "moments", samples=20000), torch.no_grad():
        drawn = model(x)
    # Two estimates, and few inputs, so that the Gaussian itself is off by some hundredths.
    assert (drawn - exact).abs().max() < 5 * float(error.max()) + 0.05
    if name != "log_softmax":
        for one in (found, drawn):
            torch.testing.assert_close(one.sum(-1), torch.ones(5, dtype=torch.float64))


def test_inner_modules_can_be_called_alone() -> None:
    """The scope is that of the outermost forward, whichever that is."""
    inner = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    model = nn.ModuleDict({"bert": nn.ModuleDict({"mlp": inner})}).eval()
    apply_dropconnect(model, nn.Linear, p=P, inference="moments")
    x = torch.randn(5, 6)
    found = model["bert"]["mlp"](x)
    assert type(found) is Tensor
    assert type(inner[0](x)) is Tensor
    with set_inference(model, "mean"):
        assert not torch.equal(found, inner(x))


def test_after_an_error_the_scope_is_closed() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(5, 2)).eval()
    apply_dropconnect(model, "0", p=P, inference="moments")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(5, 6))
    assert type(model[0](torch.randn(5, 6))) is Tensor


@pytest.mark.parametrize(
    "make",
    [lambda: nn.LSTM(4, 3), lambda: nn.MultiheadAttention(4, 2), lambda: nn.Bilinear(4, 4, 2)],
)
def test_any_module_can_follow(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    after = make()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.site, self.after = nn.Linear(6, 4), after

        def forward(self, x: Tensor) -> Any:
            u = self.site(x)
            return self.after(*(u,) * {nn.LSTM: 1, nn.Bilinear: 2}.get(type(self.after), 3))

    model = Net().eval()
    x = torch.randn(5, 2, 6)
    with torch.no_grad():
        plain = model(x)
        apply_dropconnect(model, "site", p=P, inference="moments")
        found = model(x)
    assert isinstance(after, nn.Bilinear) == torch.equal(
        tree_leaves(found)[0], tree_leaves(plain)[0]
    )
    torch.testing.assert_close(found, plain, rtol=0.05, atol=0.01)


def test_narrow_floats() -> None:
    model, x = mlp(nn.GELU()), torch.randn(8, 256, dtype=torch.float64)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            model.float()
            autocast = model(x.float())
        narrow = model.bfloat16()(x.bfloat16())
    for found in (autocast, narrow):
        assert found.dtype == torch.bfloat16
        assert (found - exact).abs().max() < 2**-5 * exact.abs().max()


@pytest.mark.compiler
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_compiled_is_the_same() -> None:
    torch._dynamo.reset()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4)
            self.gate, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = nn.functional.relu(self.norm(self.conv(x)), inplace=True)
            x = x + self.down(nn.functional.gelu(self.gate(x)) * self.up(x))
            return {"y": x}

    model = apply_dropconnect(Net().eval(), "*", p=P, inference="moments", exclude="norm")
    x = torch.randn(2, 3, 9)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x)["y"], model(x)["y"])


EXCLUDED = {
    "of integers": "bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift "
    "bitwise_xor __lshift__ __rshift__ __xor__",
    "of complex numbers": "angle conj_physical",
    "of number formats": "copysign float_power floor_divide fmod frac frexp ldexp remainder",
    "no activations, with poles or of fast growth": "digamma i0 lgamma mvlgamma polygamma "
    "special_erfcx special_i0e special_i1 special_i1e special_zeta",
}

"""Unary pointwise operations that see the mean, and why."""


def _unary_pointwise() -> set[str]:
    """Names of the aten operations on one floating-point tensor that are tagged as elementwise."""
    found = set()
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads() if hasattr(packet, "overloads") else ():
            op = getattr(packet, overload)
            tensors = [a for a in op._schema.arguments if str(a.type) == "Tensor"]
            if torch.Tag.pointwise in op.tags and not op._schema.is_mutable and len(tensors) == 1:
                found.add(name)
    return found


def test_every_elementwise_function_has_a_place() -> None:
    known = table.ELEMENTWISE | table.CASTING | table.COPYING
    excluded = frozenset(map(canonical, " ".join(EXCLUDED.values()).split()))
    special = ("special_bessel", "special_modified", "special_spherical", "special_scaled",
               "special_airy", "special_chebyshev", "special_shifted", "special_hermite",
               "special_laguerre", "special_legendre")  # fmt: skip
    missing = {
        name
        for name in set(map(canonical, _unary_pointwise())) - known - excluded
        if not name.startswith(special)
    }
    assert not missing
    assert not known & excluded


def test_a_function_is_in_one_table() -> None:
    sets = (table.ADDS, table.REVERSED, table.SCALES, table.POINTWISE, table.COMPARISONS,
            table.PARTIAL, table.CASTING, table.COPYING, table.VIEWS, table.JOINING, table.DROPOUTS,
            table.JOINT, table.QUERIES, table.ATTRIBUTES, table.GATING,
            table.DROPPING - table.DROPOUTS)  # fmt: skip
    known = frozenset().union(*sets)
    assert sum(map(len, sets)) == len(known)
    every = [value for value in vars(table).values() if isinstance(value, frozenset)]
    assert frozenset().union(*every) <= known
    assert all(canonical(name) == name for name in known - {"H", "T", "mT"})


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("rows", [1, 40], ids=["one", "all"])
def test_layer_norms_divide_by_the_expected_square(norm: type[nn.Module], rows: int) -> None:
    """Mean inference leaves the variance of 256 features out; what is left is of order 1 / 256."""
    model = nn.Sequential(nn.Linear(64, 256), norm(256)).double().eval()
    torch.nn.init.normal_(model[1].weight)
    x = torch.randn(rows, 64, dtype=torch.float64)
    apply_dropconnect(model, "0", p=P, inference="moments")
    with torch.no_grad():
        found = model(x)
        with set_inference(model, "mean"):
            plain = model(x)
        with set_inference(model, "moments", samples=400):
            drawn = model(x)
    mean, error = estimate(model, x, 1500)
    assert (found - mean).square().mean() < 0.02 * (
        plain - mean
    ).square().mean() + error.square().mean()
    assert ((drawn - mean) / error).abs().max() < 5 * math.sqrt(1 + 1500 / 400)


def test_layer_norm_of_what_has_no_variance_is_the_norm() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8, bias=False), nn.RMSNorm(8)).eval()
    x = torch.randn(3, 6)
    plain = model(x)
    torch.nn.init.zeros_(model[0].weight)
    expected = model(x)
    apply_dropconnect(model, "0", p=P, inference="moments")
    torch.testing.assert_close(model(x), expected)
    assert not torch.allclose(plain, expected)


def test_an_activation_around_a_traced_graph() -> None:
    x = torch.randn(2, 32)
    inner = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(32, 8)))
    graph, plain = nn.Sequential(inner, nn.ReLU()), nn.Sequential(nn.Linear(32, 8), nn.ReLU())
    plain[0].load_state_dict({name[2:]: value for name, value in inner.state_dict().items()})
    for model in (graph, plain):
        apply_dropconnect(model.eval(), "*", p=P, inference="moments")
    assert torch.equal(graph(x), plain(x))
