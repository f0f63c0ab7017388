"""`mc_predict`: the moments and uncertainties of outputs over masks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from surgery import (
    MCPrediction,
    NotOperatedError,
    SurgeryError,
    apply_dropconnect,
    hold_masks,
    mc_predict,
    set_inference,
)
from surgery.modules.places import states_in

from ..helpers import Snapshot
from ..internals import states_of

P = 0.4


class Stack(nn.Module):
    """Keeps every output but those of probes, to look at it afterwards."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.seen: list[Tensor] = []

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output = self.inner(*args, **kwargs)
        if not any(state.group and state.group.probing for state in states_in(self.inner)):
            self.seen.append(output)
        return output

    def samples(self, rows: int) -> Tensor:
        return torch.cat([out.reshape(-1, rows, *out.shape[1:]) for out in self.seen]).double()


def classifier(**options: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    return apply_dropconnect(model, nn.Linear, p=P, **options)


@pytest.mark.parametrize("sampling", ["batch", "example", "gaussian"])
@pytest.mark.parametrize("batch_size", [1, 12, 256])
def test_against_stacked_outputs(sampling: str, batch_size: int) -> None:
    model, x = Stack(classifier(sampling=sampling)), torch.randn(5, 6)
    found = mc_predict(model, x, samples=9, batch_size=batch_size)
    outputs = model.samples(5)
    assert len(model.seen) == {1: 9, 12: 5, 256: 1}[batch_size]
    assert outputs.shape == (9, 5, 4)
    p = outputs.softmax(-1)
    entropy = -(p.mean(0) * p.mean(0).log()).sum(-1)
    expected = MCPrediction(
        outputs.mean(0), outputs.var(0), p.mean(0), entropy,
        entropy + (p * p.log()).sum(-1).mean(0), 9,
    )  # fmt: skip
    for name, wanted in vars(expected).items():
        value = getattr(found, name)
        if name == "samples":
            assert value == wanted
        else:
            torch.testing.assert_close(value.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 10**6])
def test_moments_of_a_known_distribution(batch_size: int) -> None:
    """One linear layer: mean W x + b, variance p / (1 - p) W^2 x^2, within standard errors."""
    layer = nn.Linear(6, 3).double()
    apply_dropconnect(layer, nn.Linear, p=P)
    x, count = torch.randn(4, 6, dtype=torch.float64), 3000
    found = mc_predict(layer, x, samples=count, batch_size=batch_size, class_dim=None)
    with torch.no_grad():
        mean = layer.eval()(x)
        variance = P / (1 - P) * (x**2) @ (layer.weight**2).t()
    assert ((found.mean - mean) / (variance / count).sqrt()).abs().max() < 5
    # var of a sample variance is at most (kurtosis - 1) var^2 / n; kurtosis of a masked sum < 4
    assert ((found.variance - variance) / (variance * math.sqrt(3 / count))).abs().max() < 5
    assert (found.probabilities, found.entropy, found.mutual_information) == (None, None, None)


@pytest.mark.parametrize("unit", ["element", "input", "output", "tensor"])
@pytest.mark.parametrize("batch_size", [1, 256])
def test_a_sample_has_one_mask_for_the_whole_batch(unit: str, batch_size: int) -> None:
    """With `sampling="batch"`: equal rows of a batch give equal outputs, and samples differ."""
    model = Stack(classifier(unit=unit, bias=True))
    mc_predict(model, torch.randn(1, 6).expand(5, 6), samples=8, batch_size=batch_size)
    outputs = model.samples(5)
    torch.testing.assert_close(outputs, outputs[:, :1].expand_as(outputs))
    assert len({tuple(row.tolist()) for row in outputs[:, 0]}) > (2 if unit != "tensor" else 1)


def test_reproducible_and_generators_untouched() -> None:
    model, x = classifier(), torch.randn(5, 6)
    state = torch.get_rng_state()
    first, second = (mc_predict(model, x, 4, seed=7) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.mean, second.mean)
    assert not torch.equal(first.mean, mc_predict(model, x, 4, seed=8).mean)
    assert torch.equal(torch.get_rng_state(), state)
    mc_predict(model, x, 4)
    assert not torch.equal(torch.get_rng_state(), state)


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("inside")


@pytest.mark.parametrize("inference", ["mean", "moments", "sample"])
@pytest.mark.parametrize("fails", [False, True], ids=["", "error"])
def test_leaves_the_model_as_it_was(inference: str, fails: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    model.append(Failing() if fails else nn.Identity())
    apply_dropconnect(model, "0", p=P, inference=inference)
    model.train()
    model[1].eval()
    model(torch.randn(5, 6)).sum().backward() if not fails else None
    before, state = Snapshot(model), torch.get_rng_state()
    if fails:
        with pytest.raises(KeyError, match="inside"):
            mc_predict(model, torch.randn(5, 6).sign(), 4, seed=1)
    else:
        found = mc_predict(model, torch.ones(5, 6), 4, seed=1)
        assert torch.equal(torch.get_rng_state(), state)
        assert not found.mean.requires_grad
    assert Snapshot(model) == before
    (kept,) = states_of(model[0])
    assert (kept.inference, kept.group) == (inference, None)


class Output(NamedTuple):
    logits: Tensor
    rest: Any = None


def _dict(u: Tensor) -> dict[str, Tensor]:
    return {"features": u.exp(), "logits": u}


@pytest.mark.parametrize("wrap", [lambda u: u, lambda u: (u, None), lambda u: [u], Output, _dict])
def test_forms_of_inputs_and_outputs(wrap: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x: Tensor, y: Tensor | None = None, scale: float = 1.0) -> Any:
            return wrap(self.fc(x) * scale + (0 if y is None else y))

    model, x, y = apply_dropconnect(Net(), "fc", p=P), torch.randn(5, 6), torch.randn(5, 1)
    found = [mc_predict(model, form, 4, seed=3).mean for form in (
        (x, y), [x, y], {"x": x, "y": y}, {"x": x, "y": y, "scale": torch.tensor(1.0)})]  # fmt: skip
    for one in found:
        assert torch.equal(one, found[0])


@pytest.mark.parametrize("class_dim", [1, -2])
def test_class_dimension(class_dim: int) -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 1))
    apply_dropconnect(model, "0", p=P)
    found = mc_predict(model, torch.randn(2, 3, 7), 5, class_dim=class_dim)
    assert found.entropy.shape == found.mutual_information.shape == (2, 7)
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(2, 7))
    for wrong in (0, 3, -3):
        with pytest.raises(ValueError, match=f"class_dim={wrong} is no dimension after the batch"):
            mc_predict(model, torch.randn(2, 3, 7), 5, class_dim=wrong)


def test_one_logit_is_a_question_of_yes_or_no() -> None:
    model = Stack(apply_dropconnect(nn.Linear(6, 1), nn.Linear, p=P))
    found = mc_predict(model, torch.randn(5, 6), 8)
    p = model.samples(5).sigmoid()
    torch.testing.assert_close(found.probabilities.double(), p.mean(0), rtol=1e-5, atol=1e-6)
    q = torch.cat([p, 1 - p], -1)
    entropy = torch.special.entr(q.mean(0)).sum(-1)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-4, atol=1e-5)
    information = entropy - torch.special.entr(q).sum(-1).mean(0)
    torch.testing.assert_close(found.mutual_information.double(), information, rtol=1e-3, atol=1e-5)


def test_certain_outputs_give_no_nan() -> None:
    model = apply_dropconnect(nn.Linear(6, 3), nn.Linear, p=P)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([1e4, 0.0, -1e4]))
    found = mc_predict(model, torch.zeros(2, 6), 4)
    assert torch.equal(found.entropy, torch.zeros(2))
    assert torch.equal(found.mutual_information, torch.zeros(2))


class Small(nn.Module):
    """Runs out of memory beyond so many rows."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.fc, self.limit, self.tried = nn.Linear(6, 2), limit, []

    def forward(self, x: Tensor) -> Tensor:
        self.tried.append(len(x))
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("too many rows")
        return self.fc(x)


def test_halves_when_memory_runs_out() -> None:
    model = apply_dropconnect(Small(15), "fc", p=P)
    assert mc_predict(model, torch.randn(5, 6), 9, batch_size=40).samples == 9
    assert model.tried == [5, 15, 40, 20, 10, 10, 10, 10, 5]
    model.limit = 4
    with pytest.raises(torch.OutOfMemoryError, match="too many rows"):
        mc_predict(model, torch.randn(5, 6), 9)


def test_wrong_arguments() -> None:
    model, x = classifier(), torch.randn(5, 6)
    wrong: Any = (1, 0, True, 2.0)
    for samples in wrong:
        with pytest.raises(ValueError, match="samples must be at least 2; got"):
            mc_predict(model, x, samples)
    with pytest.raises(ValueError, match="batch_size must be positive; got 0"):
        mc_predict(model, x, batch_size=0)
    with pytest.raises(NotOperatedError, match="Linear has no DropConnect in place to sample"):
        mc_predict(nn.Linear(6, 2), x)
    message = r"batch as its first dimension; got inputs\[0\] \(5, 6\), inputs\[1\] \(4, 6\). Move"
    with pytest.raises(SurgeryError, match=message):
        mc_predict(apply_dropconnect(nn.Bilinear(6, 6, 2), "weight"), (x, torch.randn(4, 6)))
    with pytest.raises(SurgeryError, match="got no tensor"):
        mc_predict(model, {"input": 1})
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match=r"seed must lie in \[-2\*\*63, 2\*\*64\)"):
            mc_predict(model, x, seed=seed)
    for no_integer in (1.0, True, "1"):
        with pytest.raises(TypeError, match="seed must be an integer"):
            mc_predict(model, x, seed=no_integer)  # type: ignore[arg-type]


def test_wrong_outputs() -> None:
    x = torch.randn(5, 6)
    words = nn.Sequential(classifier(), Returns(lambda u: {"y": "words"}))
    with pytest.raises(SurgeryError, match="returned a dict, in which there is no tensor to look"):
        mc_predict(words, x)
    with pytest.raises(SurgeryError, match="returned a dict without 'z'; output= names one of its"):
        mc_predict(words, x, output="z")
    summed = nn.Sequential(classifier(), Returns(lambda u: u.sum(0)))
    with pytest.raises(
        SurgeryError, match=r"the output has shape \(4,\), but the batch has 5 rows"
    ):
        mc_predict(summed, x, batch_size=1)


@pytest.mark.parametrize(
    "decide", [lambda u: u.argmax(-1), lambda u: u > 0, lambda u: {"logits": u.argmax(-1)}]
)
@pytest.mark.parametrize("samples", [2, 9])
def test_decisions_have_no_mean(decide: Any, samples: int) -> None:
    model, x = nn.Sequential(classifier(), Returns(decide)), torch.randn(5, 6)
    with pytest.raises(
        SurgeryError, match=r"the output has torch\.(int64|bool): of decisions neither"
    ):
        mc_predict(model, x, samples)


def test_shares_of_votes() -> None:
    """What the error says to do instead."""
    inner, x = classifier(), torch.randn(5, 6)
    model = nn.Sequential(inner, Returns(lambda u: (u.argmax(-1), u)))
    assert torch.equal(
        mc_predict(model, x, 9, seed=1).mean, mc_predict(inner, x, 9, seed=1).mean
    )  # of both, the real numbers
    stack = Stack(inner)
    mc_predict(stack, x, 9, seed=1)
    votes = nn.functional.one_hot(stack.samples(5).argmax(-1), 4).double().mean(0)
    found = mc_predict(
        model, x, 9, seed=1, class_dim=None,
        output=lambda out: nn.functional.one_hot(out[0], 4).float(),
    )  # fmt: skip
    torch.testing.assert_close(found.mean.double(), votes)


class Returns(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def forward(self, u: Tensor) -> Any:
        return self.make(u)


def test_does_not_depend_on_the_mode_of_the_model() -> None:
    model, x = classifier(), torch.randn(5, 6)
    with set_inference(model, "moments"):
        first = mc_predict(model, x, 4, seed=3)
    assert torch.equal(first.mean, mc_predict(model.train(), x, 4, seed=3).mean)


def test_held_masks_are_refused() -> None:
    model = classifier()
    with hold_masks(model), pytest.raises(RuntimeError, match="masks are held, so every sample"):
        mc_predict(model, torch.randn(3, 6))
