"""`inference="moments"` on whole models: Monte Carlo, draws, refusals, precision, compilation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import apply_dropconnect, mc_predict, set_inference
from surgery.base.torch_names import canonical
from surgery.moments import torch_functions as table
from surgery.ops import register_closed_form
from surgery.ops.expect import _FORMS

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
    apply_dropconnect(model, nn.Linear, p=P, inference="moments")
    x = torch.randn(5, 6, dtype=torch.float64)
    message = (
        r"0\.weight: inference='moments' needs an elementwise activation after it, and found "
        r"\w*softm\w+. Give samples=Z to estimate it by draws, or give this site inference='mean'"
    )
    with pytest.raises(RuntimeError, match=message):
        model(x)
    exact, error = estimate(model, x, 3000)
    with set_inference(model, "moments", samples=20000), torch.no_grad():
        found = model(x)
    # Two estimates, and few inputs, so that the Gaussian itself is off by some hundredths.
    assert (found - exact).abs().max() < 5 * float(error.max()) + 0.05
    if name != "log_softmax":
        torch.testing.assert_close(found.sum(-1), torch.ones(5, dtype=torch.float64))


def test_softmax_of_an_activation_sees_its_expectation() -> None:
    inner = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    model = nn.Sequential(inner, nn.Softmax(-1)).eval()
    apply_dropconnect(model, nn.Linear, p=P, inference="moments")
    x = torch.randn(5, 6)
    torch.testing.assert_close(model(x), inner(x).softmax(-1))


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
    "after", [nn.LSTM(4, 3), nn.MultiheadAttention(4, 2), nn.Bilinear(4, 4, 2)]
)
def test_any_module_can_follow(after: nn.Module) -> None:
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
        torch.testing.assert_close(model(x), plain)


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
            table.JOINT, table.NORMALISING, table.QUERIES, table.ATTRIBUTES, table.GATING,
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


class Around(nn.Module):
    """A site whose output goes through a function."""

    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.site, self.then = nn.Linear(32, 32), then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.site(x))


def _relative_errors(
    then: Callable[[Tensor], Tensor], **options: Any
) -> tuple[float, float, float]:
    """Of moments, of mean inference, and the standard error of 8000 draws."""
    model, x = Around(then).double().eval(), torch.randn(8, 32, dtype=torch.float64)
    options = {"p": 0.5, "sampling": "example", "bias": True, **options}
    apply_dropconnect(model, "site", inference="moments", **options)
    with torch.no_grad():
        found = model(x)
        with set_inference(model, "mean"):
            plain = model(x)
    truth = mc_predict(model, x, 8000, class_dim=None, batch_size=8000)
    noise = (truth.variance / truth.samples).sqrt().norm()
    errors = ((found - truth.mean).norm(), (plain - truth.mean).norm(), noise)
    moments, mean, standard = (float(error / truth.mean.norm()) for error in errors)
    return moments, mean, standard


@pytest.mark.parametrize("unit", ["output", "tensor"])
@pytest.mark.parametrize("act", [torch.relu, torch.tanh, lambda u: torch.relu(u + 1) ** 2])
def test_two_values_are_no_gaussian(unit: str, act: Callable[[Tensor], Tensor]) -> None:
    """One mask entry for the whole pre-activation: both values are looked at, which is exact."""
    moments, _, noise = _relative_errors(act, unit=unit)
    assert moments < 2 * noise


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "chunks": lambda u: nn.functional.silu(u.chunk(2, -1)[0]) * u.chunk(2, -1)[1],
    "halves": lambda u: nn.functional.silu(u[..., :16]) * u[..., 16:],
    "every-other": lambda u: nn.functional.silu(u[:, ::2]) * u[:, 1::2],
    "same-half": lambda u: torch.sigmoid(u[:, :16]) * u[:, :16],
    "cat": lambda u: torch.relu(torch.cat([u, -u], -1)),
    "maximum": lambda u: torch.max(u, torch.tensor(0.3)),
    "in-place": lambda u: torch.relu_(u).view(8, 32) ** 2,
}


@pytest.mark.parametrize("then", GATES.values(), ids=GATES)
def test_views_of_one_pre_activation(then: Callable[[Tensor], Tensor]) -> None:
    if then is GATES["in-place"]:
        x = torch.randn(8, 32)
        model = apply_dropconnect(Around(then).eval(), "site", p=0.5, inference="moments")
        assert (model(x) >= 0).all()
        return
    moments, mean, noise = _relative_errors(then)
    assert moments < 2.5 * noise < mean


@pytest.mark.parametrize("unit", ["input", "tensor"])
def test_a_gate_whose_halves_share_a_mask_is_as_in_mean_inference(unit: str) -> None:
    moments, mean, _ = _relative_errors(GATES["chunks"], unit=unit)
    assert moments == pytest.approx(mean)


def test_overlapping_views_are_as_in_mean_inference() -> None:
    moments, mean, _ = _relative_errors(lambda u: u.unsqueeze(1).squeeze(1) * torch.sigmoid(u))
    assert moments == pytest.approx(mean)


def test_a_write_into_a_view_is_refused() -> None:
    def then(u: Tensor) -> Tensor:
        u[:, :4].relu_()
        return u

    model = apply_dropconnect(Around(then).eval(), "site", inference="moments")
    with pytest.raises(RuntimeError, match=r"site\.weight: .* cannot follow a write into a view"):
        model(torch.randn(2, 32))


def _assign_power(u: Tensor) -> Tensor:
    same = u
    same **= 2
    return u


def test_every_operator_that_assigns_writes() -> None:
    model, x = Around(_assign_power).eval(), torch.randn(2, 32)
    apply_dropconnect(model, "site", inference="moments")
    found = model(x)
    model.then = torch.square
    torch.testing.assert_close(found, model(x))


def test_a_registered_form_is_used_by_its_name() -> None:
    model, x = Around(nn.Mish()).eval(), torch.randn(2, 32)
    apply_dropconnect(model, "site", inference="moments")
    register_closed_form("mish", lambda f, mean, var: torch.full_like(mean, 7))
    try:
        assert bool((model(x) == 7).all())
    finally:
        del _FORMS["mish"]


@pytest.mark.parametrize("split", [torch.split, torch.unsafe_split])
def test_parts_are_independent_however_they_are_split(split: Callable[..., Any]) -> None:
    def gated(u: Tensor) -> Tensor:
        one, other = split(u, 16, -1)
        return torch.relu(one) * torch.relu(other)

    model, x = Around(gated).eval(), torch.randn(2, 32)
    apply_dropconnect(model, "site", inference="moments")
    found = model(x)
    model.then = torch.relu
    assert torch.equal(found, torch.mul(*model(x).chunk(2, -1)))


def _write_to_view(h: Tensor) -> Tensor:
    part = h[:, :4]
    part += 1
    return h


def _write_to_base(h: Tensor) -> Tensor:
    part = h[:, :4]
    h += 1
    return part


def _write_to_both(h: Tensor) -> Tensor:
    first, second = h[:, :4], h[:, 2:6]
    second.mul_(3)
    h.sub_(1)
    first.add_(2)
    return torch.cat([h, first, second, h[:, 1:3]], 1)


@pytest.mark.parametrize("write", [_write_to_view, _write_to_base, _write_to_both])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_writes_into_views_of_an_expectation(write: Callable[[Tensor], Tensor], mode: Any) -> None:
    """They are seen where a tensor would show them: in the value, and in its other views."""
    x = torch.randn(2, 32)
    plain = Around(torch.relu).eval()
    model = apply_dropconnect(copy.deepcopy(plain), "site", inference="moments")
    apply_dropconnect(plain, "site", inference="moments")
    model.then = lambda u: write(torch.relu(u))
    with mode():
        expected = write(plain(x).clone())
        assert torch.equal(model(x), expected)


def _then_write(view: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def then(u: Tensor) -> Tensor:
        part = view(u)
        u.relu_()
        return part + 0

    return then


def _write_first(take: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
    def then(u: Tensor) -> Tensor:
        first, second = take(u)
        first.relu_()
        return second + 0

    return then


STALE: dict[str, Callable[[Tensor], Tensor]] = {
    "part": _then_write(lambda u: u[:, :4]),
    "flat": _then_write(lambda u: u.view(-1)),
    "halves": _then_write(lambda u: u.chunk(2, 1)[0]),
    "one more dimension": _then_write(lambda u: u.unsqueeze(0)),
    "the same twice": _write_first(lambda u: (u[:, :4], u[:, :4])),
    "overlapping": _write_first(lambda u: (u[:, :4], u[:, 2:6])),
    "view of a view": _write_first(lambda u: (v := u.view(2, 32), v[:, :4])),
}


@pytest.mark.parametrize("then", STALE.values(), ids=STALE)
def test_a_view_from_before_a_write_is_refused(then: Callable[[Tensor], Tensor]) -> None:
    model = apply_dropconnect(Around(then).eval(), "site", inference="moments")
    with pytest.raises(RuntimeError, match="nor a view that was taken before a write"):
        model(torch.randn(2, 32))


def test_what_is_the_same_tensor_is_the_same_value() -> None:
    """`contiguous` and casts to what it is return the tensor itself; so a write is one into it."""
    for same in (lambda u: u.contiguous(), lambda u: u.float(), lambda u: u.to(u.dtype)):
        alone = apply_dropconnect(Around(torch.relu).eval(), "site", inference="moments")
        model = copy.deepcopy(alone)
        model.then = lambda u, same=same: (same(u).relu_(), u)[1]
        x = torch.randn(2, 32)
        assert torch.equal(model(x), alone(x))


def test_parts_of_a_sum_are_not_independent_of_it() -> None:
    """(u + v) - v is no sum of three Gaussians; nor is a product with what was joined."""

    class Two(nn.Module):
        def __init__(self, then: Callable[[Tensor, Tensor], Tensor]) -> None:
            super().__init__()
            self.a, self.b, self.then = nn.Linear(8, 8), nn.Linear(8, 8), then

        def forward(self, x: Tensor) -> Tensor:
            return self.then(self.a(x), self.b(x))

    x = torch.randn(3, 8)
    for then in (
        lambda u, v: (u + v - v).relu(),
        lambda u, v: torch.cat([u, v], 1)[:, :8] * u,
        lambda u, v: (u + v) * v,
    ):
        plain = Two(then).eval()
        model = apply_dropconnect(copy.deepcopy(plain), "*", p=0.5, inference="moments")
        torch.testing.assert_close(model(x), plain(x))  # the values at the mean


def test_changes_that_are_no_writes() -> None:
    def then(u: Tensor) -> Tensor:
        r = u.relu()
        part = r[:, :4]
        r.unsqueeze_(0)
        return r[0] + part.sum()

    alone = apply_dropconnect(Around(torch.relu).eval(), "site", inference="moments")
    model = copy.deepcopy(alone)
    model.then = then
    x = torch.randn(2, 32)
    r = alone(x)
    torch.testing.assert_close(model(x), r + r[:, :4].sum())
    model.then = lambda u: u.requires_grad_(False).relu()
    with torch.no_grad():
        assert torch.equal(model(x), alone(x))
    model.then = lambda u: torch.stack([row.relu() for row in u])
    torch.testing.assert_close(model(x), alone(x))


def test_an_activation_around_a_traced_graph() -> None:
    x = torch.randn(2, 32)
    inner = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(32, 8)))
    graph, plain = nn.Sequential(inner, nn.ReLU()), nn.Sequential(nn.Linear(32, 8), nn.ReLU())
    plain[0].load_state_dict({name[2:]: value for name, value in inner.state_dict().items()})
    for model in (graph, plain):
        apply_dropconnect(model.eval(), "*", p=P, inference="moments")
    assert torch.equal(graph(x), plain(x))
