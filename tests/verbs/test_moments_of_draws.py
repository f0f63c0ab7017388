"""`predict_moments` with a number of draws, and the random numbers of draws."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers.pytorch_utils import Conv1D

from surgery import SurgeryError, apply_dropconnect, predict_moments, set_inference
from surgery.ops import Law
from surgery.travel import Numbers, Run, within
from surgery.travel.run import weight_of_draws

P, DRAWS = 0.3, 5


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.values = nn.LayerNorm(6), nn.Linear(6, 6, bias=False)
        self.queries = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.values(x))
        queries = self.queries(x)
        shares = (queries @ x.transpose(1, 2)).softmax(-1)
        return x + shares @ torch.tanh(x)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.attend(x, x, x)[0]


class Steps(nn.Module):
    """Two layers both ways, over sequences of several lengths."""

    def __init__(self, lengths: list[int] | None = None) -> None:
        super().__init__()
        self.steps = nn.RNN(6, 3, 2, batch_first=True, bidirectional=True)
        self.lengths = lengths

    def forward(self, x: Any) -> Any:
        if self.lengths is None:
            return self.steps(x)[0]
        lengths = torch.tensor(self.lengths)
        x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.steps(x)[0], batch_first=True)[0]


def one_dimension() -> nn.Module:
    first = nn.Conv1d(6, 4, 2, stride=2, padding=1, groups=2)
    return nn.Sequential(first, nn.Softplus(), nn.Conv1d(4, 2, 2, dilation=2))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), (4, 6)),
    "tokens": (lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)), (4, 5, 6)),
    "columns": (lambda: nn.Sequential(Conv1D(8, 6), nn.ReLU(), Conv1D(3, 8)), (4, 5, 6)),
    "attention": (Attending, (4, 5, 6)),
    "MultiheadAttention": (Attends, (4, 5, 6)),
    "RNN": (Steps, (4, 5, 6)),
    "packed": (lambda: Steps([3, 5, 1, 4]), (4, 5, 6)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(16, 3),
        ),
        (4, 2, 6, 6),
    ),
    "Conv1d": (one_dimension, (4, 6, 7)),
    "Conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.GroupNorm(1, 3)), (4, 2, 3, 3, 3)),
}  # fmt: skip


def masked_as_drawn(moving: Tensor, numbers: Iterator[int], parts: int, draw: int) -> Tensor:
    """A weight with the mask of one draw. The parts of a packed one have masks of their own."""
    law = Law.of(P, moving.device, moving.dtype)
    found = [
        [*Numbers(next(numbers)).masked(part, law, DRAWS)][draw] for part in moving.chunk(parts)
    ]
    return torch.cat(found)


@pytest.mark.parametrize("toward", ["zero", "pretrained"])
@pytest.mark.parametrize("name", MODELS)
def test_a_draw_is_what_a_mask_does(name: str, toward: Any) -> None:
    """Every draw at the output is the forward of the plain model with masked weights: to all orders."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = make().double().eval(), torch.randn(*shape, dtype=torch.float64)
    plain = copy.deepcopy(model)
    sites = [key for key, w in plain.named_parameters() if w.ndim > 1]
    apply_dropconnect(model, sites, p=P, toward=toward, bias=False)
    scale = 1.5 if toward == "pretrained" else 1.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    run = Run(model, len(x), "draws", DRAWS)
    with set_inference(model, "moments"), torch.no_grad():
        state: Any = within(run, lambda: model(x).state())
    for draw in range(DRAWS):
        weights = {key: (w * scale).detach() for key, w in plain.named_parameters()}
        numbers = itertools.count(1)
        for key in sites:
            anchor = plain.get_parameter(key).detach() if toward == "pretrained" else 0.0
            parts = 3 if key.endswith("in_proj_weight") else 1
            moving = weights[key] - anchor
            turned = moving.t() if name == "columns" else moving
            masked = masked_as_drawn(turned, numbers, parts, draw)
            weights[key] = anchor + (masked.t() if name == "columns" else masked)
        with torch.no_grad():  # the kernel of a whole layer reads the weights of the module itself
            wanted = torch.func.functional_call(plain, weights, x)
        torch.testing.assert_close(state.draw(draw), wanted)


def test_what_positions_share_to_all_orders() -> None:
    """The mean over tokens of squares: one mask of nine entries is far from a Gaussian, and tokens
    share it, so that slopes alone know half of the variance."""
    torch.manual_seed(0)
    layer, x = nn.Linear(9, 2, bias=False).double(), torch.randn(3, 6, 9).double() + 0.5

    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).square().mean(1)

    kept = torch.tensor([*itertools.product((0.0, 1.0), repeat=9)]).double()
    chance = (P + (1 - 2 * P) * kept).prod(1)
    masked = kept[:, None] * layer.weight.detach() / (1 - P)
    each = torch.einsum("bti,moi->mbto", x, masked).square().mean(2)
    mean = torch.einsum("m,mbo->bo", chance, each)
    variance = torch.einsum("m,mbo->bo", chance, (each - mean).square())
    model = apply_dropconnect(Squares(), "layer", p=P)
    found = predict_moments(model, x, 2000, class_dim=None)
    torch.testing.assert_close(found.mean, mean)
    size = found.variance.sum() / variance.sum()
    by_slopes = predict_moments(model, x, "outputs", class_dim=None).variance.sum() / variance.sum()
    assert abs(float(size) - 1) < 0.08
    assert abs(float(by_slopes) - 1) > 0.15


@pytest.mark.parametrize("p", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_numbers_have_the_moments_of_masks(p: float) -> None:
    """Mean 0 and variance 1; of weights, mean W and variance p / (1 - p) W^2; also where draws would
    never meet one of the values."""
    ratio = p / (1 - p) if p < 1 else 0.0
    drawn = Numbers(3).masks((100_000,), ratio, torch.zeros(()))
    if ratio > 0:
        assert abs(float(drawn.mean())) < 5 / math.sqrt(100_000)
        assert float(drawn.square().mean()) == pytest.approx(1, abs=0.05)
    weight = torch.full((200,), 2.0)
    law = Law.of(p, weight.device, weight.dtype)
    masked = torch.stack([*Numbers(3).masked(weight, law, 500)])
    error = 2 * math.sqrt(ratio / 100_000)
    assert float(masked.mean()) == pytest.approx(2, abs=5 * error + 1e-6)
    assert float((masked - 2).square().mean()) == pytest.approx(4 * ratio, rel=0.05, abs=1e-6)


def test_numbers_are_the_same_for_every_use() -> None:
    weight, law = torch.randn(4, 3), Law.of(P, torch.device("cpu"), torch.float32)
    one, other = Numbers(7), Numbers(7)
    together = one.all_masked(weight, law, 3)
    assert together is not None
    assert torch.equal(together, torch.stack([*other.masked(weight, law, 3)]))
    assert one.all_masked(weight, law, 3) is together
    assert torch.equal(one.normal((3, 2), weight), other.normal((3, 2), weight))
    assert not torch.equal(Numbers(8).normal((3, 2), weight), other.normal((3, 2), weight))


def test_what_draws_count_beside_a_rule() -> None:
    """Nothing where the rule is right, all where it is far off, for each example."""
    torch.manual_seed(0)
    true = torch.rand(2, 4000).double() + 0.5
    count = 20
    carried = (true * torch.randn(count, 2, 4000).double().square()).mean(0)
    rule = torch.stack([true[0], true[1] * torch.rand(4000).double().mul(4)])
    right, wrong = weight_of_draws(rule, carried, count).flatten().tolist()
    assert right < 0.15
    assert wrong > 0.7


@pytest.mark.parametrize("form", ["outputs", "full"])
@pytest.mark.parametrize("act", [nn.Tanh(), nn.ReLU(), nn.Sigmoid()])
def test_a_model_may_end_in_what_is_put_off(act: nn.Module, form: Any) -> None:
    """An activation at the end is computed when the output is read, which is a part of the run: it has
    the same moments as before a view."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), act), torch.randn(2, 5, 4)
    apply_dropconnect(model, nn.Linear, p=P)
    found = predict_moments(model, x, form, class_dim=None)
    model.append(nn.Flatten())
    other = predict_moments(model, x, form, class_dim=None)
    torch.testing.assert_close(found.mean.flatten(1), other.mean)
    torch.testing.assert_close(found.variance.flatten(1), other.variance)
    torch.testing.assert_close(found.covariance, other.covariance)


class Elsewhere(nn.Module):
    """Values whose first dimension are not the examples."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.layer, self.places = nn.Linear(4, 3), nn.Embedding(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "tokens first":
            return self.layer(x.transpose(0, 1)).tanh().transpose(0, 1).mean(1)
        at = torch.arange(6)
        found = x + self.places(at[None] if self.how == "one row for all" else at)
        return found.tanh().mean(1)


@pytest.mark.parametrize("how", ["tokens first", "one row for all", "no row"])
def test_backward_passes_say_where_they_need_examples(how: str) -> None:
    """Also where a size allows another reading; one example has nothing to mix up with."""
    torch.manual_seed(0)
    model, x = Elsewhere(how), torch.randn(3, 6, 4)
    apply_dropconnect(model, "layer" if how == "tokens first" else "places", p=P)
    for form in ("outputs", "full"):
        with pytest.raises(SurgeryError, match="examples along the first dimension: there are 3"):
            predict_moments(model, x, form, class_dim=None)
    together = predict_moments(model, x, 200, class_dim=None).variance
    forms: dict[Any, float] = {200: 0.01, "outputs": 0.45}
    for form, near in forms.items():
        found: Any = [predict_moments(model, one, form, class_dim=None) for one in x[:, None]]
        size = torch.cat([one.variance for one in found]).sum() / together.sum()
        assert abs(float(size) - 1) < near


def test_an_example_alone_is_as_among_others() -> None:
    """Where one number is left of each: what draws say of other examples is none of its business."""
    torch.manual_seed(0)

    class Sums(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x).sum(-1)

    x = torch.randn(3, 6) * torch.tensor([[1.0], [10.0], [100.0]])
    sums = apply_dropconnect(Sums(nn.Linear(6, 6)), nn.Linear, p=P)
    together = predict_moments(sums, x, 8, class_dim=None).variance
    alone = [predict_moments(sums, one[None], 8, class_dim=None).variance for one in x]
    torch.testing.assert_close(together, torch.cat(alone))


def test_covariances_of_narrow_floats_are_wide() -> None:
    """Variances of backward passes are as exact as those of columns: no number of half precision,
    which knows three digits, and nothing above 65,504."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3)).half(), torch.full((1, 5, 4), 20.0).half()
    apply_dropconnect(model, nn.Linear, p=0.999)
    found = predict_moments(model, x, "outputs", class_dim=None)
    assert isinstance(found.covariance, Tensor)
    assert found.variance.max() > 65_504
    assert found.covariance.dtype == found.variance.dtype == torch.float32
    wanted = 999 * (20.0 * model[0].weight.float()).square().sum(1).expand(5, 3)
    torch.testing.assert_close(found.variance[0], wanted, rtol=5e-3, atol=0.0)


@pytest.mark.parametrize("form", [8, "outputs"])
def test_a_softmax_of_narrow_floats_whose_logits_vary_a_lot(form: Any) -> None:
    """The half of a variance is no number of half precision."""
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1)).half(),
        torch.full((2, 4), 40.0).half(),
    )
    apply_dropconnect(model, "0.weight", p=0.999)
    found = predict_moments(model, x, form, class_dim=None)
    assert predict_moments(model[0], x, class_dim=None).variance.max() > 2 * 65_504
    torch.testing.assert_close(found.mean.sum(-1).float(), torch.ones(2), rtol=0.0, atol=0.01)
    assert found.variance.isfinite().all()
