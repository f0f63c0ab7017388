"""The models of `benchmarks.moments`: trained, operated, each with inputs."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import apply_dropconnect, strip_dropconnect

FORMS: tuple[Any, ...] = ("diagonal", "outputs", 8, 32, "full")


@dataclass(frozen=True)
class Case:
    name: str
    model: nn.Module
    """Operated."""
    inputs: Any
    output: Any
    forms: tuple[Any, ...]
    sampling_rows: int
    """Rows that run together in Monte Carlo; 1: samples one by one."""
    draws: tuple[int, ...] = (10, 100)
    """Of each pre-activation, as in the paper; none where not every site is a product."""


def perceptron(depth: int, p: float, steps: int) -> Case:
    """ReLU layers of 64, trained with noise on a task of ten classes."""
    torch.manual_seed(0)
    widths = [32, *[64] * depth]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    apply_dropconnect(model, nn.Linear, p=p, sampling="gaussian")
    true = torch.randn(32, 10)
    x = torch.randn(8192, 32)
    labels = (x @ true + 0.5 * torch.randn(8192, 10)).argmax(-1)
    train(model, x, labels, steps)
    strip_dropconnect(model)
    # A mask for all rows: samples then differ in their masks alone, and cost one product each.
    apply_dropconnect(model, nn.Linear, p=p)
    inputs = torch.randn(32, 32)
    return Case(f"MLP 32-{'64-' * depth}10, p = {p:g}", model.eval(), inputs, None, FORMS, 1)


def train(model: nn.Module, x: Tensor, labels: Tensor, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(x), (128,))
        loss = F.cross_entropy(model(x[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def mlps(steps: int) -> Iterator[Case]:
    for depth, p in ((2, 0.3), (3, 0.5), (4, 0.1)):
        yield perceptron(depth, p, steps)


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, labels = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)


def cnns(steps: int) -> Iterator[Case]:
    """A small CNN on scikit-learn's digits, whose first layer has 25 inputs, and one where it has 9."""
    for kernel in (5, 3):
        model, x = cnn(kernel, steps)
        name = f"CNN on digits, first kernel {kernel} x {kernel}, p = 0.1"
        yield Case(name, model, x, None, FORMS, 1)


def cnn(kernel: int, steps: int) -> tuple[nn.Module, Tensor]:
    """Convolutions, batch norm, max and mean pooling, trained while weights drop; and inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, kernel, padding=kernel // 2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    x, labels = digits()
    targets = [nn.Conv2d, nn.Linear]
    apply_dropconnect(model, targets, p=0.1)
    train(model, x[:1500], labels[:1500], steps)
    return model.eval(), x[1500:1532]


def resnets(steps: int) -> Iterator[Case]:
    """timm's ResNet-10t for ten classes, trained on the digits at 32 x 32."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=10, in_chans=1)
    x, labels = digits()
    x = F.interpolate(x, size=32, mode="bilinear")
    apply_dropconnect(model, [nn.Conv2d, nn.Linear], p=0.1)
    train(model, x[:1500], labels[:1500], max(1, steps // 10))
    yield Case("ResNet-10t (timm), p = 0.1", model.eval(), x[1500:1508], None, FORMS, 1)


def minilms(steps: int) -> Iterator[Case]:
    """MiniLM as it comes: the state of the first token."""
    from transformers import AutoModel, AutoTokenizer

    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from minilm import minilm, quiet

    quiet()
    model = AutoModel.from_pretrained(minilm()).eval()
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    texts = [
        "The central bank raised interest rates again this month.",
        "A goal in the last minute decided the cup final.",
        "The new phone has a folding screen and a better camera.",
        "He lives by the sea.",
    ]
    inputs = dict(tokenizer(texts, return_tensors="pt", padding="max_length", max_length=16))
    apply_dropconnect(model, "all-linear", p=0.1)
    yield Case(
        "MiniLM-L6, first token, p = 0.1", model, inputs,
        lambda found: found.last_hidden_state[:, 0], ("diagonal", 8, 32), 1,
    )  # fmt: skip


class Reader(nn.Module):
    """Reads the rows of an image one after the other: ten classes from the state at the end."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.layer(x.squeeze(1))[0][:, -1])
        return found


def recurrents(steps: int) -> Iterator[Case]:
    """An LSTM and a GRU of 64, trained on the digits; all their weights drop."""
    x, labels = digits()
    for cls in (nn.LSTM, nn.GRU):
        torch.manual_seed(0)
        model = Reader(cls(8, 64, batch_first=True))
        train(model, x[:1500], labels[:1500], steps)
        apply_dropconnect(model, ["layer.weight_*", "head"], p=0.3)
        name = f"{cls.__name__} of 64, p = 0.3"
        yield Case(name, model.eval(), x[1500:1532], None, FORMS, 1, draws=())


class Encoder(nn.Module):
    """Two of torch's encoder layers over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.first, self.layers = nn.Linear(8, 64), nn.TransformerEncoder(layer, 2)
        self.place, self.head = nn.Parameter(0.3 * torch.randn(8, 64)), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.layers(self.first(x.squeeze(1)) + self.place).mean(1))
        return found


def encoders(steps: int) -> Iterator[Case]:
    """Packed attention and all linear layers of torch's encoder, trained on the digits."""
    torch.manual_seed(0)
    model = Encoder()
    x, labels = digits()
    train(model, x[:1500], labels[:1500], steps)
    targets = [nn.Linear, nn.MultiheadAttention]
    apply_dropconnect(model, targets, p=0.1)
    name = "nn.TransformerEncoder, 2 layers of 64, p = 0.1"
    yield Case(name, model.eval(), x[1500:1532], None, FORMS, 1, draws=())


class Logits(nn.Module):
    """What a classifier of transformers says of its inputs, as a tensor."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x).logits


def vits(steps: int) -> Iterator[Case]:
    """A small vision transformer of transformers, trained on the digits: four layers of width 64."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256,
        image_size=8, patch_size=2, num_channels=1, num_labels=10,
    )  # fmt: skip
    whole = ViTForImageClassification(config)
    x, labels = digits()
    model = Logits(whole)
    train(model, x[:1500], labels[:1500], steps)
    apply_dropconnect(model, "all-linear", p=0.1)
    yield Case("ViT, 4 layers of 64, p = 0.1", model.eval(), x[1500:1532], None, FORMS, 1)


CASES: dict[str, Callable[[int], Iterator[Case]]] = {
    "mlp": mlps,
    "cnn": cnns,
    "resnet": resnets,
    "minilm": minilms,
    "vit": vits,
    "rnn": recurrents,
    "encoder": encoders,
}
