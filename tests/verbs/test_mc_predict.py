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


def test_together_and_one_by_one_agree() -> None:
    """The same distribution: means and covariances of the outputs, within standard errors."""
    model, x, count = classifier(bias=True), torch.randn(3, 6), 2000
    one, many = (mc_predict(model, x, count, batch_size=size) for size in (1, 3 * 500))
    error = ((one.variance + many.variance) / count).sqrt()
    assert ((one.mean - many.mean) / error).abs().max() < 5
    assert (one.variance / many.variance).log().abs().max() < 0.25
    torch.testing.assert_close(one.entropy, many.entropy, rtol=0.05, atol=0)


def test_convolutions_with_channel_masks_run_together() -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(30, 2))
    apply_dropconnect(model, [nn.Conv1d, nn.Linear], p=P, unit="output", bias=True)
    stack = Stack(model)
    mc_predict(stack, torch.randn(1, 4, 7).expand(3, 4, 7), samples=8)
    assert len(stack.seen) == 1
    outputs = stack.samples(3)
    torch.testing.assert_close(outputs, outputs[:, :1].expand_as(outputs))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Flat(nn.Module):
    """A site whose input has tokens, not the batch, first."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(0, 1)).view(len(x), -1)


@pytest.mark.parametrize(("make", "targets"), [(Recurrent, ["rnn", "head"]), (Flat, "fc")])
def test_falls_back_to_one_by_one(make: Any, targets: Any) -> None:
    model = Stack(apply_dropconnect(make(), targets, p=P))
    found = mc_predict(model, torch.randn(3, 5, 6), samples=6)
    assert [len(out) for out in model.seen] == [3] * 6
    assert found.variance.min() > 0


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
    kept = model[0]._dropconnect["weight"]
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
    message = r"batch as its first dimension; got inputs\[0\] \(5, 6\), inputs\[1\] \(4,\). Move"
    with pytest.raises(SurgeryError, match=message):
        mc_predict(model, (x, torch.randn(4)))
    with pytest.raises(SurgeryError, match="got no tensor"):
        mc_predict(model, {"a": 1})


def test_wrong_outputs() -> None:
    x = torch.randn(5, 6)
    words = nn.Sequential(classifier(), _Returns(lambda u: {"y": u}))
    with pytest.raises(SurgeryError, match="returned a dict; mc_predict needs a tensor"):
        mc_predict(words, x)
    summed = nn.Sequential(classifier(), _Returns(lambda u: u.sum(0)))
    with pytest.raises(
        SurgeryError, match=r"the output has shape \(4,\), but the batch has 5 rows"
    ):
        mc_predict(summed, x, batch_size=1)


class _Returns(nn.Module):
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


class TimeFirst(nn.Module):
    """Its site sees time first; as much time as several batches have rows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        u = torch.tanh(self.fc(x.transpose(0, 1))).transpose(0, 1)
        return self.head(u).mean(1)


def test_a_dimension_that_has_the_size_of_the_batch_by_chance() -> None:
    model, x = apply_dropconnect(TimeFirst(), "fc", p=0.5), torch.randn(2, 16, 6)
    alone = mc_predict(model, x, 400, seed=0, batch_size=1)
    together = mc_predict(model, x, 400, seed=0, batch_size=16)
    ratio = together.variance / alone.variance
    assert (ratio - 1).abs().max() < 5 * math.sqrt(2 * 2 / 400)


def test_falls_back_to_one_by_one_where_sizes_are_fixed() -> None:
    inner = apply_dropconnect(nn.Sequential(nn.Linear(6, 2)), "0", p=P)
    seen = []

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, extra: list[Tensor]) -> Tensor:
            seen.append(len(x))
            return self.inner(x) + extra[0]

    found = mc_predict(Outer(), (torch.randn(3, 6), [torch.ones(3, 1)]), 8)
    assert found.mean.shape == (3, 2)
    assert seen == [3, 9, *[3] * 8]


class TimeFirstLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.rnn, self.head = nn.Linear(6, 6), nn.LSTM(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.fc(x))[0])


def _then(function: Any) -> Any:
    """A linear layer, a norm over its features, and something that mixes the first dimension."""
    return lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), _Returns(function))


MIXING = {
    "time-first LSTM": TimeFirstLSTM,
    "cumsum": _then(lambda u: u.cumsum(0)),
    "cumsum from the end": _then(lambda u: u.flip(0).cumsum(0).flip(0)),
    "mean of the batch": _then(lambda u: u - u.mean(0)),
    "maximum of the batch": _then(lambda u: u / u.amax(0)),
    "softmax over the batch": _then(lambda u: u.softmax(0)),
    "first row": _then(lambda u: u - u[:1]),
    "last row": _then(lambda u: u - u[-1:]),
    "size of the batch": _then(lambda u: u / len(u)),
    "neighbours": _then(lambda u: u + 0.3 * u.roll(1, 0)),
    "interleaved": _then(lambda u: u.view(2, -1, *u.shape[1:]).transpose(0, 1).reshape(u.shape)),
    "some are masked": _then(lambda u: u.cumsum(0).index_fill(-1, torch.tensor([0, 3]), -1e30)),
    "infinite": _then(lambda u: u.cumsum(0).index_fill(-1, torch.tensor([1]), -math.inf)),
}


def _one_by_one_and_together(model: nn.Module, x: Tensor, samples: int = 9) -> None:
    """Without a difference, to the bit."""
    one, many = (
        mc_predict(model, x, samples, seed=3, batch_size=size, class_dim=None) for size in (1, 256)
    )
    for name in ("mean", "variance"):
        pair = getattr(many, name), getattr(one, name)
        torch.testing.assert_close(*pair, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", MIXING)
def test_a_model_that_mixes_samples_runs_them_one_by_one(name: str) -> None:
    for sampling in ("batch", "example", "gaussian"):
        for dtype in (torch.float32, torch.bfloat16):
            model = apply_dropconnect(MIXING[name]().to(dtype), nn.Linear, p=P, sampling=sampling)
            _one_by_one_and_together(model, torch.randn(4, 3, 6).to(dtype))


def test_a_convolution_and_a_graph_that_mix_samples_run_them_one_by_one() -> None:
    conv = nn.Sequential(nn.Conv1d(4, 6, 3), _Returns(lambda u: u.cumsum(0)))
    apply_dropconnect(conv, nn.Conv1d, p=P, unit="output")
    _one_by_one_and_together(conv, torch.randn(5, 4, 7))

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.w).cumsum(0)

    graph = apply_dropconnect(torch.fx.symbolic_trace(Functional()), "w", p=P)
    _one_by_one_and_together(graph, torch.randn(5, 6))


@pytest.mark.parametrize("example_dim", [1, -2, "all", 0, -3])
def test_examples_along_another_dimension(example_dim: Any) -> None:
    """Where examples lie along the second dimension, repetitions of the first would share masks."""
    model = Stack(nn.Sequential(nn.Linear(6, 5)))
    apply_dropconnect(model, nn.Linear, p=P, sampling="example", example_dim=example_dim)
    x = torch.randn(2, 1, 6).expand(2, 3, 6)
    mc_predict(model, x, 9, class_dim=None)
    samples = model.samples(2)
    assert len(model.seen) == (9 if example_dim in (1, -2) else 1)
    assert len(samples[:, 0, 0].unique(dim=0)) == 9  # masks of their own
    shared = bool((samples[:, :, :1] == samples).all())
    assert shared == (example_dim in (0, -3))


def test_a_bias_that_drops_without_its_weight() -> None:
    layer = apply_dropconnect(nn.Sequential(nn.Linear(6, 5)), "0.bias", p=P, bias=True)
    _one_by_one_and_together(layer, torch.randn(5, 6))
    assert mc_predict(layer, torch.randn(5, 6), 99, class_dim=None).variance.min() > 0


def test_an_input_whose_samples_can_run_together_does() -> None:
    """Huge, infinite and missing entries do not hinder; nor do sequences, autocast, bfloat16."""
    outputs = {
        "sequence": lambda u: u.softmax(-1),
        "masked": lambda u: u.index_fill(-1, torch.tensor([0, 3]), -1e30),
        "infinite": lambda u: u.index_fill(-1, torch.tensor([1]), -math.inf),
        "missing": lambda u: u.index_fill(-1, torch.tensor([1]), math.nan),
        "dead": lambda u: (u - 100).relu(),
    }
    for name, function in outputs.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            model = Stack(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), _Returns(function)))
            apply_dropconnect(model.to(dtype), nn.Linear, p=P)
            mc_predict(model, torch.randn(4, 3, 6).to(dtype), 9, class_dim=None)
            assert len(model.seen) == 1, (name, dtype)
    model = Stack(classifier())
    with torch.autocast("cpu", torch.bfloat16):
        mc_predict(model, torch.randn(4, 3, 6), 9)
    assert len(model.seen) == 1


def test_held_masks_are_refused() -> None:
    model = classifier()
    with hold_masks(model), pytest.raises(RuntimeError, match="masks are held, so every sample"):
        mc_predict(model, torch.randn(3, 6))
