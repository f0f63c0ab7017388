"""`inference="moments"` is `predict_moments` without asking: its mean, to the bit, through whole
models; against the enumeration of all masks, and Monte Carlo."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from surgery import apply_dropconnect, mc_predict, predict_moments, set_inference

from ..zoo.tiny import tiny

P = 0.2


class Block(nn.Module):
    """Of everything a little: attention, a gate, a residual sum, a norm, pooling."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm, self.gate = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        one, other = self.gate(self.norm(x)).chunk(2, -1)
        pooled: Tensor = self.head((x + F.silu(one) * other).mean(1))
        return pooled


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2, padding=1),
        nn.ConvTranspose2d(4, 3, 2), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(3, 4), nn.Softmax(-1),
    )  # fmt: skip


MODELS: dict[str, Any] = {
    "transformer": (Block, (2, 3, 8)),
    "convolutions": (convolutional, (2, 2, 7, 7)),
    "perceptron": (
        lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)),
        (5, 6),
    ),
}  # fmt: skip


def operated(name: str, **options: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, x = make().eval(), torch.randn(shape)
    convolved = name == "convolutions" and options.get("unit", "element") == "output"
    targets = [nn.Linear, nn.Conv2d] if convolved else nn.Linear
    return apply_dropconnect(model, targets, p=P, **options), x


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("unit", ["element", "input", "output", "tensor"])
def test_the_mean_of_predict_moments_to_the_bit(name: str, unit: str) -> None:
    model, x = operated(name, unit=unit, sampling="example", inference="moments")
    with torch.no_grad():
        found = model(x)
        with set_inference(model, "mean"):
            plain = model(x)
            asked = predict_moments(model, x, class_dim=None)
    assert type(found) is Tensor
    assert torch.equal(found, asked.mean)
    assert asked.settled == ()
    assert not torch.allclose(found, plain)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_outputs_of_transformers(name: str) -> None:
    model = apply_dropconnect(tiny(name).eval(), "all-linear", p=P)
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    if name == "bert":
        inputs = {"input_ids": torch.randint(0, 99, (2, 5))}
    asked = predict_moments(model, inputs)
    set_inference(model, "moments")
    with torch.no_grad():
        found = model(**inputs)
    assert torch.equal(found.logits, asked.mean)


def test_all_masks_of_a_tiny_network() -> None:
    """Two sites of a ReLU network. A sum of four inputs is no Gaussian: the mean is off by some percent
    of the standard deviation, as that of `predict_moments`."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 1)).double().eval()
    x = torch.randn(6, 4, dtype=torch.float64)
    one, other = model[0].weight.detach(), model[2].weight.detach()
    wanted, square = torch.zeros(2, 6, 1, dtype=torch.float64)
    with torch.no_grad():
        for bits in itertools.product((0.0, 1.0), repeat=10):
            mask = torch.tensor(bits, dtype=torch.float64)
            chance = math.prod((P, 1 - P)[int(bit)] for bit in bits)
            u = F.linear(x, one * mask[:8].view(2, 4) / (1 - P), model[0].bias).relu()
            y = F.linear(u, other * mask[8:] / (1 - P), model[2].bias)
            wanted, square = wanted + chance * y, square + chance * y**2
        apply_dropconnect(model, nn.Linear, p=P, inference="moments")
        found = model(x)
    assert (found - wanted).norm() < 0.07 * (square - wanted**2).sqrt().norm()


def test_monte_carlo_where_variance_passes_two_activations() -> None:
    """What settles at the second layer leaves most of the error; what travels does not."""
    torch.manual_seed(0)
    layers = [nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)]
    model, x = nn.Sequential(*layers).eval(), torch.randn(8, 32)
    apply_dropconnect(model, nn.Linear, p=0.5, sampling="gaussian")
    truth = mc_predict(model, x, 4000, class_dim=None, seed=0)
    error = float((truth.variance / 4000).mean().sqrt())
    set_inference(model, "moments")
    with torch.no_grad():
        gap = (model(x) - truth.mean).square().mean().sqrt()
        first = layers[2](nn.Sequential(*layers[:2])(x))  # parts alone: each settles at its end
        settled = layers[4](first.relu())
        with set_inference(model, "mean"):
            plain = (model(x) - truth.mean).square().mean().sqrt()
    assert gap < 2 * error
    assert (settled - truth.mean).square().mean().sqrt() > 3 * error
    assert plain > 5 * error


def test_a_part_alone_returns_its_own_mean() -> None:
    model, x = operated("perceptron", inference="moments")
    part = nn.Sequential(*list(model)[:4])
    asked = predict_moments(part, x, class_dim=None).mean
    set_inference(part, "moments")
    with torch.no_grad():
        assert torch.equal(part(x), asked)
        assert torch.equal(model[0](x), F.linear(x, model[0].weight, model[0].bias))


def test_a_traced_graph_is_the_same() -> None:
    model, x = operated("perceptron", inference="moments")
    plain, _ = operated("perceptron")
    with torch.no_grad():
        graph = apply_dropconnect(
            fx.symbolic_trace(nn.Sequential(*MODELS["perceptron"][0]())).eval(), nn.Linear, p=P
        )
        graph.load_state_dict(plain.state_dict())
        set_inference(graph, "moments")
        assert torch.equal(graph(x), model(x))


@pytest.mark.compiler
def test_compiled_and_exported_as_one_graph() -> None:
    torch._dynamo.reset()
    model, x = operated("transformer", inference="moments")
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), expected)  # traces have no kernels
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), expected)


def test_gradients_are_those_of_the_mean_that_travels() -> None:
    model, x = operated("transformer", inference="moments", bias=True)
    model, x = model.double(), x[:1, :2].double().requires_grad_()
    names = [name for name, _ in model.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(model, dict(zip(names, values)), (x,))
        return found

    assert torch.autograd.gradcheck(run, (x, *model.parameters()), fast_mode=True)
