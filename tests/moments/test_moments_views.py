"""Views of a pre-activation that travels as mean and variance, and writes into them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import apply_dropconnect, mc_predict, predict_moments, set_inference
from surgery.ops import register_closed_form

from ..internals import own_table_of_closed_forms

P = 0.3


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
def test_a_gate_whose_halves_share_a_mask(unit: str) -> None:
    """That the halves covary is not known; that each varies is."""
    moments, mean, _ = _relative_errors(GATES["chunks"], unit=unit)
    assert moments < 0.9 * mean


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
    with own_table_of_closed_forms():
        register_closed_form("mish", lambda f, mean, var: torch.full_like(mean, 7))
        assert bool((model(x) == 7).all())


@pytest.mark.parametrize("split", [torch.split, torch.unsafe_split])
def test_parts_are_independent_however_they_are_split(split: Callable[..., Any]) -> None:
    def gated(u: Tensor) -> Tensor:
        one, other = split(u, 16, -1)
        return torch.relu(one) * torch.relu(other)

    model, x = Around(gated).eval(), torch.randn(2, 32)
    apply_dropconnect(model, "site", inference="moments")
    found = model(x)
    model.then = torch.relu
    torch.testing.assert_close(found, torch.mul(*model(x).chunk(2, -1)))


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
        torch.testing.assert_close(model(x), expected)


def _relu_of_part(u: Tensor) -> Tensor:
    u[:, :4].relu_()
    return u


def _relu_of_first(take: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
    def then(u: Tensor) -> Tensor:
        first, second = take(u)
        first.relu_()
        return second + 0

    return then


def _part_relu(u: Tensor) -> Tensor:
    return torch.cat([u[:, :4].relu(), u[:, 4:]], 1)


WRITES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "into a part": (_relu_of_part, _part_relu),
    "a part from before": (_relu_of_first(lambda u: (u, u[:, :4])), lambda u: u.relu()[:, :4]),
    "flat": (_relu_of_first(lambda u: (u, u.view(-1))), lambda u: u.relu().view(-1)),
    "halves": (_relu_of_first(lambda u: (u, u.chunk(2, 1)[0])), lambda u: u.relu()[:, :16]),
    "one more dimension": (_relu_of_first(lambda u: (u, u.unsqueeze(0))), lambda u: u.relu()[None]),
    "the same twice": (_relu_of_first(lambda u: (u[:, :4], u[:, :4])), lambda u: u[:, :4].relu()),
    "overlapping": (_relu_of_first(lambda u: (u[:, :4], u[:, 2:6])), lambda u: _part_relu(u)[:, 2:6]),
    "view of a view": (
        _relu_of_first(lambda u: (v := u.view(2, 32), v[:, :4])),
        lambda u: u.relu()[:, :4],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITES)
def test_writes_are_seen_where_a_tensor_would_show_them(name: str) -> None:
    writes, pure = WRITES[name]
    x = torch.randn(2, 32)
    model = apply_dropconnect(Around(writes).eval(), "site", inference="moments")
    found = model(x)
    model.then = pure
    torch.testing.assert_close(found, model(x), rtol=1e-6, atol=1e-7)
    with set_inference(model, "mean"):
        assert not torch.allclose(found, model(x))


def test_what_is_the_same_tensor_is_the_same_value() -> None:
    """`contiguous` and casts to what it is return the tensor itself; so a write is one into it."""
    for same in (lambda u: u.contiguous(), lambda u: u.float(), lambda u: u.to(u.dtype)):
        alone = apply_dropconnect(Around(torch.relu).eval(), "site", inference="moments")
        model = copy.deepcopy(alone)
        model.then = lambda u, same=same: (same(u).relu_(), u)[1]
        x = torch.randn(2, 32)
        assert torch.equal(model(x), alone(x))


class Two(nn.Module):
    """Two sites, and a function of both."""

    def __init__(self, then: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.then = nn.Linear(8, 8), nn.Linear(8, 8), then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.a(x), self.b(x))


def test_what_meets_again_is_known_to_columns_alone() -> None:
    """(u + v) - v is u. A diagonal takes both for independent, as values of two sites are."""
    x = torch.randn(3, 8)
    model = apply_dropconnect(Two(lambda u, v: u + v - v).eval(), "*", p=0.5, inference="moments")
    variance = {form: predict_moments(model, x, form).variance for form in ("diagonal", "full")}
    model.then = lambda u, v: u
    of_u = predict_moments(model, x).variance
    torch.testing.assert_close(variance["full"], of_u)
    assert bool((variance["diagonal"] > of_u).all())


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
