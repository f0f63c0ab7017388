"""Predictions of models that overflow, or hold NaN: NaN where an answer would be none, as `mc_predict`
says it, and what is finite as if nothing were wrong elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import apply_dropconnect, mc_predict, predict_moments
from surgery.verbs.gaussians import LowRank, prediction_of
from surgery.verbs.prediction import Totals

FORMS: tuple[Any, ...] = ("diagonal", "outputs", "full", 3)
INF = float("inf")


def net(change: Callable[[nn.Sequential], None] = lambda model: None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        change(model)
    return apply_dropconnect(model, nn.Linear, p=0.3)


def inputs(value: float = 0.5) -> Tensor:
    x = torch.linspace(-1, 1, 12).view(3, 4).clone()
    x[1, 2] = value
    return x


def unknown_in(prediction: Any) -> list[Tensor]:
    parts = prediction.mean, prediction.probabilities, prediction.entropy
    return [~part.isfinite() for part in (*parts, prediction.mutual_information)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [INF, -INF, float("nan")])
def test_an_example_that_overflows(form: Any, value: float) -> None:
    """Its prediction is NaN, and those of the others are what they are without it."""
    bad, good = inputs(value), inputs()
    found = predict_moments(net(), bad, form)
    sampled = mc_predict(net(), bad, samples=64, seed=1)
    assert found.probabilities is not None
    assert found.probabilities[1].isnan().all()
    for one, other in zip(unknown_in(found), unknown_in(sampled)):
        assert one.equal(other)
    others = predict_moments(net(), good, form)
    for name in ("mean", "variance", "probabilities", "entropy", "mutual_information"):
        mine, its = (getattr(one, name)[::2] for one in (found, others))
        assert mine.isfinite().all()
        assert torch.allclose(mine, its, atol=0.05 if isinstance(form, int) else 1e-6)


def nan_weight(model: nn.Sequential) -> None:
    model[2].weight[1] = float("nan")


def infinite_weight(model: nn.Sequential) -> None:
    model[2].weight[1, 2] = INF


def infinite_logit(model: nn.Sequential) -> None:
    model[2].bias[1] = INF


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", [nan_weight, infinite_weight, infinite_logit])
def test_a_logit_that_is_not_finite_makes_its_classes_unknown(form: Any, change: Any) -> None:
    found = predict_moments(net(change), inputs(), form)
    assert unknown_in(found)[0].equal(torch.tensor([[False, True, False]] * 3))
    assert found.probabilities is not None
    assert found.probabilities.isnan().all()
    sampled = mc_predict(net(change), inputs(), samples=64, seed=1)
    assert sampled.probabilities is not None
    assert sampled.probabilities.isnan().all()


@pytest.mark.parametrize("form", FORMS)
def test_a_class_that_is_forbidden(form: Any) -> None:
    """A logit of -inf, as masks of tokens have it: its class has no probability, the others share."""

    def forbid(model: nn.Sequential) -> None:
        model[2].bias[1] = -INF

    def leave_out(model: nn.Sequential) -> None:
        last = model[2]
        model[2] = nn.Linear(6, 2)
        model[2].weight.copy_(last.weight[::2])
        model[2].bias.copy_(last.bias[::2])

    found = predict_moments(net(forbid), inputs(), form)
    others = predict_moments(net(leave_out), inputs(), form)
    assert found.mean[:, 1].equal(torch.full((3,), -INF))
    assert found.probabilities is not None
    assert others.probabilities is not None
    assert found.entropy is not None
    assert others.entropy is not None
    assert not found.probabilities[:, 1].any()
    assert torch.allclose(found.probabilities[:, ::2], others.probabilities, atol=0.05)
    assert torch.allclose(found.entropy, others.entropy, atol=0.05)


def test_other_entries_of_an_example_are_known() -> None:
    """(batch, tokens, classes): a token with no variance, or that is NaN, leaves the others known."""
    torch.manual_seed(0)
    mean = torch.randn(2, 3, 4)
    factors = torch.randn(2, 3, 4, 5)
    factors[0, 1] = torch.tensor([INF, 1.0, float("nan"), 0.0])[:, None]
    low = LowRank(factors)
    dense = low.dense()
    variance = dense.diagonal(dim1=1, dim2=2).reshape(mean.shape)
    for covariance in (None, low, dense):
        found = prediction_of(mean, variance, covariance, -1, ())
        assert found.probabilities is not None
        assert found.entropy is not None
        known = torch.ones(2, 3, dtype=torch.bool)
        known[0, 1] = False
        assert found.probabilities.isfinite().all(-1).equal(known)
        assert found.entropy.isfinite().equal(known)


def classes_of(covariance: Tensor) -> Tensor:
    mean = torch.tensor([[0.0, 1.0, 0.0]])
    variance = covariance.diagonal(dim1=1, dim2=2)
    found = prediction_of(mean, variance, covariance, -1, ())
    assert found.probabilities is not None
    assert found.entropy is not None
    assert found.entropy.isfinite().all()
    return found.probabilities


def test_variances_at_the_ends_of_their_type() -> None:
    """From logits of 2^30 on their size does not matter for the classes, nor does that of tiny ones.
    Eigenvalues are larger than the variances, and overflow if nothing is done about it."""
    factors = torch.tensor([[[1.0, 0.5], [0.5, 1.0], [0.9, -0.5]]]) / 2
    related = factors @ factors.mT
    together = torch.ones(1, 3, 3)
    for covariance in (related, together):
        classes = classes_of(covariance * 2.0**127)
        assert torch.allclose(classes.sum(), torch.ones(()))
        assert classes.equal(classes_of(covariance * 2.0**87))
        for size in (2.0**-100, 2.0**-149):
            certain = torch.tensor([[0.0, 1.0, 0.0]]).softmax(-1)
            assert torch.allclose(classes_of(covariance * size), certain)


def test_a_covariance_of_no_entries() -> None:
    for shape in ((2, 0), (0, 3)):
        mean = torch.zeros(shape)
        covariance = torch.zeros(shape[0], shape[1], shape[1])
        found = prediction_of(mean, mean, covariance, -1 if shape[1] else None, ())
        assert found.mean.shape == shape


@pytest.mark.parametrize("value", [INF, -INF, 3e38])
def test_means_do_not_depend_on_how_samples_are_added(value: float) -> None:
    outputs = torch.tensor([[1.0, value, value, 3.0], [1.0, value, 2.0, 3.0]])[:, None]
    alone, apart = Totals(None), Totals(None)
    alone.add(outputs)
    for one in outputs:
        apart.add(one[None])
    whole, parts = alone.result(), apart.result()
    assert parts.mean[0, 1] == value
    assert whole.mean[0, 1] in (value, INF)
    assert parts.mean.isnan().sum() == whole.mean.isnan().sum() == 0
    assert parts.variance[0, [0, 3]].equal(torch.zeros(2))


def test_variances_that_overflow_are_infinite() -> None:
    total = Totals(None)
    total.add(torch.tensor([[[1e25]], [[-1e25]]]))
    assert total.result().variance.item() == INF
