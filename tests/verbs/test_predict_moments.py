"""`predict_moments`: against the enumeration of all masks, against Monte Carlo, and its manners."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import (
    LowRank,
    NotOperatedError,
    Prediction,
    SurgeryError,
    apply_dropconnect,
    mc_predict,
    predict_moments,
    set_inference,
    strip_dropconnect,
)

from ..helpers import Snapshot
from ..zoo.tiny import tiny

P = 0.2


def enumerated(
    model: nn.Module, x: Tensor, unit: str = "element", towards: dict[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and covariance (rows, outputs, outputs) over all masks of the weights of Linear layers. The
    examples share them: that changes nothing for one of them."""
    weights = {name: w.detach() for name, w in model.named_parameters() if w.ndim == 2}
    shapes = {
        name: {
            "element": w.shape,
            "input": (1, w.shape[1]),
            "output": (len(w), 1),
            "tensor": (1, 1),
        }[unit]
        for name, w in weights.items()
    }
    sizes = [math.prod(shape) for shape in shapes.values()]
    kept = torch.tensor(list(itertools.product((0.0, 1.0), repeat=sum(sizes))), dtype=x.dtype)
    probability = (P + (1 - 2 * P) * kept).prod(1)
    parts = zip(weights.items(), shapes.values(), kept.split(sizes, 1))
    anchors = {name: torch.zeros_like(w) for name, w in weights.items()} | (towards or {})
    masked = {
        name: anchors[name] + (w - anchors[name]) * m.view(-1, *shape) / (1 - P)
        for (name, w), shape, m in parts
    }

    def call(own: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, own, x).flatten(1)

    with torch.no_grad():
        u = torch.vmap(call)(masked)
    mean = torch.einsum("m,mbi->bi", probability, u)
    square = torch.einsum("m,mbi,mbj->bij", probability, u, u)
    return mean, square - mean[:, :, None] * mean[:, None]


def chain(act: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 2), act, nn.Linear(2, 1)).double().eval()


@pytest.mark.parametrize("unit", ["element", "input", "output", "tensor"])
def test_one_layer_is_exact(unit: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 2)).double(), torch.randn(4, 3, dtype=torch.float64)
    mean, covariance = enumerated(model, x, unit)
    apply_dropconnect(model, nn.Linear, p=P, unit=unit)
    form: Any
    for form in ("diagonal", "outputs", "full", 64):
        found = predict_moments(model, x, form, class_dim=None)
        torch.testing.assert_close(found.mean, mean)
        torch.testing.assert_close(found.variance, covariance.diagonal(dim1=1, dim2=2))
    both: tuple[Any, ...] = ("outputs", "full")
    for form in both:
        found = predict_moments(model, x, form, class_dim=None)
        torch.testing.assert_close(found.covariance, covariance)


@pytest.mark.parametrize("unit", ["element", "input", "output", "tensor"])
def test_two_linear_layers_are_exact(unit: str) -> None:
    """Without an activation nothing is Gaussian here, and yet both moments are exact."""
    model, x = chain(nn.Identity()), torch.randn(3, 4, dtype=torch.float64)
    mean, covariance = enumerated(model, x, unit)
    apply_dropconnect(model, nn.Linear, p=P, unit=unit)
    found = predict_moments(model, x, "full", class_dim=None)
    torch.testing.assert_close(found.mean, mean)
    if unit in ("element", "tensor"):
        torch.testing.assert_close(found.covariance, covariance)
    torch.testing.assert_close(found.variance, covariance.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("unit", ["element", "input", "output", "tensor"])
def test_toward_the_pretrained_weights(unit: str) -> None:
    model, x = chain(nn.Identity()), torch.randn(3, 4, dtype=torch.float64)
    pretrained = {name: p.detach().clone() for name, p in model.named_parameters() if p.ndim == 2}
    apply_dropconnect(model, nn.Linear, p=P, unit=unit, toward="pretrained")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    found = predict_moments(model, x, "full", class_dim=None)
    strip_dropconnect(model)
    mean, covariance = enumerated(model, x, unit, pretrained)
    torch.testing.assert_close(found.mean, mean)
    if unit in ("element", "output"):
        torch.testing.assert_close(found.covariance, covariance)
    size = covariance.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(found.variance, size, rtol=0.35, atol=0.0)


class MeanOfTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).mean(1)


@pytest.mark.parametrize("unit", ["element", "input", "output", "tensor"])
@pytest.mark.parametrize("dim", [0, "all"])
def test_tokens_share_a_mask_or_do_not(unit: str, dim: Any) -> None:
    """The mean over tokens: of one mask, what it makes of the mean token; of masks for each token, the
    covariance of one of them by their number."""
    torch.manual_seed(0)
    model, x = MeanOfTokens().double(), torch.randn(4, 5, 3, dtype=torch.float64)
    if dim == 0:
        _, wanted = enumerated(model.fc, x.mean(1), unit)
    else:
        each = [enumerated(model.fc, token, unit)[1] for token in x.unbind(1)]
        wanted = torch.stack(each).sum(0) / 25
    apply_dropconnect(model, nn.Linear, p=P, unit=unit, sampling="example", example_dim=dim)
    for form in ("outputs", "full"):
        found = predict_moments(model, x, form, class_dim=None)
        torch.testing.assert_close(found.covariance, wanted)


ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], float, float]] = {
    "relu": (nn.ReLU, 0.07, 0.17),
    "leaky_relu": (lambda: nn.LeakyReLU(0.1), 0.06, 0.15),
    "gelu": (nn.GELU, 0.03, 0.13),
    "gelu_tanh": (lambda: nn.GELU("tanh"), 0.03, 0.13),
    "silu": (nn.SiLU, 0.015, 0.1),
    "sigmoid": (nn.Sigmoid, 0.002, 0.02),
    "tanh": (nn.Tanh, 0.015, 0.11),
    "elu": (nn.ELU, 0.01, 0.07),
    "softplus": (nn.Softplus, 0.004, 0.02),
}
"""What is allowed with four inputs, of which a sum is far from Gaussian, as root mean squares over
inputs: the error of the mean as a share of the standard deviation, and that of the variance as a
share of it."""


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_tiny_networks_against_all_masks(name: str) -> None:
    act, of_mean, of_variance = ACTIVATIONS[name]
    model = chain(act())
    torch.manual_seed(3)
    x = torch.randn(24, 4, dtype=torch.float64)
    mean, covariance = enumerated(model, x)
    with torch.no_grad():
        plain = model(x)
    apply_dropconnect(model, nn.Linear, p=P)
    found = predict_moments(model, x, "full", class_dim=None)
    size = covariance[:, :, 0]
    error = ((found.mean - mean) / size.sqrt()).square().mean().sqrt()
    assert error < of_mean
    assert error < ((plain - mean) / size.sqrt()).square().mean().sqrt() / 3
    assert ((found.variance - size) / size).square().mean().sqrt() < of_variance


def trained(sampling: str = "batch") -> tuple[nn.Module, Tensor]:
    """A perceptron whose units covary, as training makes them do."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )
    x = torch.randn(1024, 16)
    labels = (x @ torch.randn(16, 4)).argmax(-1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        chosen = torch.randint(1024, (64,))
        nn.functional.cross_entropy(model(x[chosen]), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    apply_dropconnect(model, nn.Linear, p=P, sampling=sampling)
    return model.eval(), torch.randn(16, 16)


def test_a_trained_perceptron_against_monte_carlo() -> None:
    (model, x), count = trained(), 1500
    sampled = mc_predict(model, x, count, seed=1, batch_size=1)
    with torch.no_grad():
        plain = model(x)
    own = (sampled.variance / count).mean().sqrt()

    def error(mean: Tensor) -> float:
        return float((mean - sampled.mean).square().mean().sqrt())

    by_form = {form: predict_moments(model, x, form) for form in ("diagonal", 32, "full")}
    assert error(plain) > 4 * own
    for found in by_form.values():
        assert error(found.mean) < error(plain) / 3
    full = by_form["full"]
    assert abs(full.variance.sum() / sampled.variance.sum() - 1) < 0.05
    assert by_form["diagonal"].variance.sum() < 0.95 * sampled.variance.sum()
    assert (full.probabilities - sampled.probabilities).abs().mean() < 0.01
    assert (full.entropy - sampled.entropy).abs().mean() < 0.03
    assert (full.mutual_information - sampled.mutual_information).abs().mean() < 0.03
    low = by_form[32].covariance
    assert isinstance(low, LowRank)
    diagonal = low.dense().diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(diagonal, by_form[32].variance, rtol=1e-4, atol=1e-6)


def against_samples(
    model: nn.Module, inputs: Any, count: int, form: Any, **options: Any
) -> tuple[float, float]:
    """How many times nearer than plain weights the mean is, and the variance beside that of samples."""
    sampled = mc_predict(model, inputs, count, seed=1, batch_size=1, class_dim=None, **options)
    found = predict_moments(model, inputs, form, class_dim=None, **options)
    assert not found.settled
    with torch.no_grad():
        plain = predict_plain(model, inputs)
    own = float((sampled.variance / count).mean())

    def square(mean: Tensor) -> float:
        return max(float((mean - sampled.mean).square().mean()) - own, own / 9)

    ratio = float(found.variance.sum() / sampled.variance.sum())
    return math.sqrt(square(plain) / square(found.mean)), ratio


def predict_plain(model: nn.Module, inputs: Any) -> Tensor:
    found: Tensor = model.eval()(inputs)
    return found


class Residual(nn.Module):
    """Attention and a gate beside a path around them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm(self.up(x)[..., :8])
        u = u + self.attention(u, u, u)[0]
        u = u + self.down(nn.functional.silu(self.gate(u)) * self.up(u))
        return self.head(u.mean(1))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 3),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "shape", "low", "high"),
    [(Residual, (6, 5, 8), 0.75, 1.25), (convolutions, (6, 4, 8, 8), 0.85, 1.15)],
    ids=["attention", "convolutions"],
)
def test_full_of_shared_masks_against_monte_carlo(
    make: Callable[[], nn.Module], shape: tuple[int, ...], low: float, high: float
) -> None:
    """Tokens and positions share masks; paths meet again: what only backward passes know."""
    torch.manual_seed(0)
    model = make().eval()
    targets = ["gate", "up", "down", "head"] if make is Residual else [nn.Conv2d, nn.Linear]
    apply_dropconnect(model, targets, p=0.1)
    x, ratios = torch.randn(*shape), {}
    for form in ("full", "outputs"):
        _, ratios[form] = against_samples(model, x, 800, form)
    assert all(low < ratio < high for ratio in ratios.values()), ratios


@pytest.mark.parametrize(
    ("name", "attention"),
    [("llama", "sdpa"), pytest.param("t5", "eager", marks=pytest.mark.slow), ("vit", "sdpa")],
)
def test_transformers_against_monte_carlo(name: str, attention: str) -> None:
    """Tiny models as they are made: gates, norms written out, caches, relative positions, both ways to
    attend. All variance arrives."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = tiny(name).eval()
    model.set_attn_implementation(attention)
    apply_dropconnect(model, "all-linear", p=P)
    inputs = {"input_ids": torch.randint(0, 99, (2, 6))}
    if name == "t5":
        inputs["decoder_input_ids"] = torch.randint(0, 99, (2, 4))
    if name == "vit":
        inputs = {"pixel_values": torch.randn(4, 3, 16, 16)}
    count = 150
    sampled = mc_predict(model, inputs, count, seed=1, batch_size=1)
    found = predict_moments(model, inputs)
    assert not found.settled
    own = (sampled.variance / count).mean()
    with torch.no_grad():
        plain = model(**inputs).logits
    error, of_plain = (
        ((mean - sampled.mean).square().mean() - own).clamp_min(0) for mean in (found.mean, plain)
    )
    assert error < of_plain / 4
    assert 0.8 < found.variance.sum() / sampled.variance.sum() < 1.25
    assert predict_moments(model, inputs, 4).variance.isfinite().all()


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


def test_an_embedding_is_exact() -> None:
    torch.manual_seed(0)
    model, index = nn.Embedding(5, 3), torch.tensor([[1, 2], [0, 4]])
    apply_dropconnect(model, nn.Embedding, p=P)
    found = predict_moments(model, index, class_dim=None)
    row = model.weight.detach()[index]
    torch.testing.assert_close(found.mean, row)
    torch.testing.assert_close(found.variance, 0.25 * row**2)


@pytest.mark.parametrize("unit", ["element", "input", "output", "tensor"])
def test_the_same_word_has_the_same_mask(unit: str) -> None:
    """Words 1 and 1 covary, of which the second is no other; exact for every form that knows it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 2), nn.Flatten()).double().eval()
    index = torch.tensor([[1, 2, 1], [0, 4, 3]])
    rows = model[0].weight.detach()[index]
    same = (index.unsqueeze(2) == index.unsqueeze(1)).double()
    alike = torch.eye(2).double()
    shares = {
        "element": torch.einsum("bst,de->bsdte", same, alike),
        "input": torch.einsum("bst,de->bsdte", same, torch.ones(2, 2).double()),
        "output": torch.einsum("bst,de->bsdte", torch.ones(2, 3, 3).double(), alike),
        "tensor": torch.ones(2, 3, 2, 3, 2).double(),
    }[unit]
    wanted = 0.25 * torch.einsum("bsd,bte,bsdte->bsdte", rows, rows, shares).view(2, 6, 6)
    apply_dropconnect(model, nn.Embedding, p=P, unit=unit)
    form: Any
    for form in ("full", "outputs"):
        found = predict_moments(model, index, form, class_dim=None)
        torch.testing.assert_close(found.covariance, wanted)
        torch.testing.assert_close(found.mean, rows.flatten(1))
    columns = predict_moments(model, index, 4096, class_dim=None).covariance
    assert isinstance(columns, LowRank)
    torch.testing.assert_close(columns.dense(), wanted, rtol=0.0, atol=0.08 * float(wanted.max()))
    with set_inference(model, "moments"):
        assert torch.equal(model(index), rows.flatten(1))


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


@pytest.mark.parametrize("covariance", ["diagonal", "full", 3])
@pytest.mark.parametrize("site", ["0", "2"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_units(site: str, covariance: Any) -> None:
    """What passes through them is the bias alone."""
    model = nn.Sequential(nn.Linear(4, 0), nn.ReLU(), nn.Linear(0, 3))
    apply_dropconnect(model, site, P)
    for leading in ((2, 5), (2,)):
        found = predict_moments(model, torch.randn(*leading, 4), covariance)
        assert torch.equal(found.mean, model[2].bias.detach().expand(*leading, 3))
        assert not found.variance.any()


def test_a_loader_and_a_compiled_model() -> None:
    model, x = trained()
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
    model = convolutions().eval()
    apply_dropconnect(model, nn.Conv2d, p=0.1)
    x = torch.randn(2, 4, 8, 8)
    expected = predict_moments(model, x, form).variance
    with mode():
        found = predict_moments(model, x.clone(), form).variance
        assert torch.equal(found, expected)
    assert bool((found > 0).all())
