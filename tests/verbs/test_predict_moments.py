"""`predict_moments`: its manners, and what it takes besides a model with DropConnect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import (
    NotOperatedError,
    Prediction,
    SurgeryError,
    apply_dropconnect,
    predict_moments,
)

from ..helpers import Snapshot

P = 0.2


def test_dropouts_count_where_nothing_else_drops() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Dropout(0.2), nn.Linear(6, 3)).train(), torch.randn(4, 6)
    found = predict_moments(model, x, "full", class_dim=None)
    weight = model[1].weight.detach()
    wanted = torch.einsum("oi,pi,bi->bop", weight, weight, 0.25 * x**2)
    torch.testing.assert_close(found.covariance, wanted)
    assert model[0].training
    torch.testing.assert_close(found.mean, model[1](x).detach())
    apply_dropconnect(model, nn.Linear, p=P)
    off, on = (predict_moments(model, x, class_dim=None, dropout=one) for one in (False, True))
    assert torch.equal(off.variance, predict_moments(model, x, class_dim=None).variance)
    assert (on.variance > off.variance).all()


def test_noise_of_the_input() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(6, 3), torch.randn(4, 6)
    found = predict_moments(model, x, "full", input_variance=0.5, class_dim=None)
    wanted = 0.5 * model.weight.detach() @ model.weight.detach().t()
    torch.testing.assert_close(found.covariance, wanted.expand(4, 3, 3))
    with pytest.raises(SurgeryError, match="floating-point"):
        predict_moments(nn.Embedding(5, 2), torch.tensor([1]), input_variance=0.5)


class Sorting(nn.Module):
    def forward(self, u: Tensor) -> Tensor:
        return u.sort(-1).values


def test_where_a_value_settles_is_told() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Sorting(), nn.Linear(4, 2))
    apply_dropconnect(model, nn.Linear, p=P)
    found = predict_moments(model, torch.randn(3, 4))
    assert found.settled == ("1: sort",)
    assert (found.variance > 0).all()
    last = nn.Sequential(nn.Linear(4, 4), Sorting())
    apply_dropconnect(last, nn.Linear, p=P)
    with pytest.raises(SurgeryError, match=r"no variance reaches the output.*1: sort"):
        predict_moments(last, torch.randn(3, 4))


FORMS: dict[str, Callable[[Any], Any]] = {
    "new_zeros": lambda u: u + u.new_zeros(4),
    "zeros_like": lambda u: u + torch.zeros_like(u),
    "empty_like": lambda u: u + torch.empty_like(u).zero_(),
    "view_as": lambda u: u.flatten().view_as(u),
    "expand_as": lambda u: u.expand_as(u),
    "reshape_as": lambda u: u.flatten().reshape_as(u),
    "of a tensor": lambda u: u + torch.zeros(4).expand_as(u),
    "cast": lambda u: u + torch.zeros(4, dtype=torch.float64).to(u),
}


@pytest.mark.parametrize("form", ["diagonal", 4])
@pytest.mark.parametrize("name", FORMS)
def test_what_reads_the_form_alone_settles_nothing(name: str, form: Any) -> None:
    class Reading(nn.Module):
        def forward(self, u: Tensor) -> Any:
            return FORMS[name](u)

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), Reading()), torch.randn(3, 4)
    apply_dropconnect(model, nn.Linear, p=P)
    found = predict_moments(model, x, form, class_dim=None)
    assert found.settled == ()
    wanted = predict_moments(model[0], x, form, class_dim=None)
    torch.testing.assert_close(found.mean, wanted.mean)
    torch.testing.assert_close(found.variance, wanted.variance)


def _a_copy_is_written_to(u: Any) -> Any:
    v = u.transpose(1, 2).contiguous()
    v.mul_(2)
    return torch.cat([u.flatten(1), v.view(3, -1)], 1)


LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "contiguous": lambda u: u.transpose(1, 2).contiguous().view(3, -1),
    "clone": lambda u: u.mT.clone(memory_format=torch.contiguous_format).view((3, 20)),
    "an activation": lambda u: u.tanh().transpose(1, 2).contiguous().view(size=(3, 20)),
    "windows": lambda u: u.view(3, 5, 2, 2).transpose(1, 2).contiguous().view(6, 5, 2).view(3, -1),
    "a copy is written to": _a_copy_is_written_to,
}


@pytest.mark.parametrize("form", ["diagonal", 4, "outputs"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_contiguous_has_views_of_any_shape(name: str, form: Any) -> None:
    class Laid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.then = nn.Linear(4, 4), LAYOUTS[name]

        def forward(self, x: Tensor) -> Any:
            return self.then(self.layer(x))

    def copies(u: Any) -> Any:
        return torch.cat([u.flatten(1), 2 * u.transpose(1, 2).reshape(3, -1)], 1)

    written: dict[str, Callable[[Any], Any]] = {
        "windows": lambda u: u.reshape(3, 5, 2, 2).transpose(1, 2).reshape(3, -1),
        "an activation": lambda u: u.tanh().transpose(1, 2).reshape(3, -1),
        "a copy is written to": copies,
    }
    torch.manual_seed(0)
    model, x = Laid(), torch.randn(3, 5, 4)
    plain = model(x).detach()
    apply_dropconnect(model, "layer", p=P)
    found = predict_moments(model, x, form, class_dim=None)
    if name != "an activation":
        torch.testing.assert_close(found.mean, plain)
    model.then = written.get(name, lambda u: u.transpose(1, 2).reshape(3, -1))
    wanted = predict_moments(model, x, form, class_dim=None)
    torch.testing.assert_close(found.mean, wanted.mean)
    torch.testing.assert_close(found.variance, wanted.variance)


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("inside")


@pytest.mark.parametrize("fails", [False, True], ids=["", "error"])
@pytest.mark.parametrize("form", ["diagonal", 4, "full"])
def test_leaves_the_model_as_it_was(fails: bool, form: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    model.append(Failing() if fails else nn.Identity())
    apply_dropconnect(model, "0", p=P)
    model.train()
    before, random = Snapshot(model), torch.get_rng_state()
    if fails:
        with pytest.raises(KeyError, match="inside"):
            predict_moments(model, torch.randn(5, 6).sign(), form)
        random = torch.get_rng_state()
    else:
        x = torch.ones(5, 6)
        first, second = (predict_moments(model, x, form) for _ in range(2))
        assert torch.equal(first.mean, second.mean)
        assert torch.equal(first.variance, second.variance)
        assert type(first.mean) is Tensor
        assert not first.mean.requires_grad
    assert Snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("covariance", ["diagonal", "outputs", "full", 3])
@pytest.mark.parametrize("unit", ["element", "input", "output", "tensor"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_units(unit: Any, covariance: Any) -> None:
    """What passes through them is the bias alone; nothing comes out of a last one."""
    for leading in ((2, 5), (2,), (2, 0)):
        for site in ("0", "2"):
            model = nn.Sequential(nn.Linear(4, 0), nn.ReLU(), nn.Linear(0, 3))
            apply_dropconnect(model, site, P, unit=unit)
            found = predict_moments(model, torch.randn(*leading, 4), covariance)
            assert torch.equal(found.mean, model[2].bias.detach().expand(*leading, 3))
            assert not found.variance.any()
        last = apply_dropconnect(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 0)), "*", P, unit=unit)
        found = predict_moments(last, torch.randn(*leading, 4), covariance, class_dim=None)
        assert found.mean.shape == found.variance.shape == (*leading, 0)


def test_a_loader_and_a_compiled_model() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(16, 8)
    apply_dropconnect(model, nn.Linear, p=P)
    whole = predict_moments(model, x, "full")
    batches = predict_moments(model, iter(x.split(5)), "full")
    torch.testing.assert_close(batches.variance, whole.variance)
    compiled: Any = torch.compile(model, backend="eager")
    assert torch.equal(predict_moments(compiled, x).mean, predict_moments(model, x).mean)


def test_what_is_refused() -> None:
    with pytest.raises(NotOperatedError, match="input_variance"):
        predict_moments(nn.Linear(2, 2), torch.randn(1, 2), dropout=False)
    model = nn.Bilinear(3, 3, 3)
    apply_dropconnect(model, "weight", p=P)
    with pytest.raises(SurgeryError, match="weight: no moments are known"):
        predict_moments(model, (torch.randn(2, 3), torch.randn(2, 3)))
    for wrong in (0, True, "low", 1.5):
        with pytest.raises(ValueError, match="covariance"):
            predict_moments(nn.Linear(2, 2), torch.randn(1, 2), wrong, input_variance=1.0)  # type: ignore[arg-type]


def test_prediction_is_public() -> None:
    model = apply_dropconnect(nn.Linear(3, 2), "", p=P)
    found = predict_moments(model, torch.randn(2, 3), 4)
    assert isinstance(found, Prediction)
    assert found.cpu().mean.shape == (2, 2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("form", ["outputs", "full"])
def test_backward_passes_whatever_the_caller_does(mode: Any, form: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))
    apply_dropconnect(model, nn.Conv2d, p=0.1)
    x = torch.randn(2, 4, 8, 8)
    expected = predict_moments(model, x, form).variance
    with mode():
        found = predict_moments(model, x.clone(), form).variance
        assert torch.equal(found, expected)
    assert bool((found > 0).all())
