"""One small module of every kind, with inputs and the names of the weights dropped by default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence


class OwnLinear(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.weight.sum()


class Router(nn.Module):
    """A parameter that the module itself multiplies by."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).softmax(-1)


class Experts(nn.Module):
    """3-D weights, as mixtures of experts store them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 6, 8))
        self.down_proj = nn.Parameter(torch.randn(3, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for expert in range(3):
            gate, up = (x @ self.gate_up_proj[expert]).chunk(2, -1)
            outputs.append((F.silu(gate) * up) @ self.down_proj[expert])
        return torch.stack(outputs).sum(0)


class ReadsChild(nn.Module):
    """Multiplies by its child's weight and never calls the child."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight, self.proj.bias)


@dataclass(frozen=True)
class Case:
    """A module to operate on."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    weights: tuple[str, ...]
    """Dotted names of the weights that `targets` drops, in the order of the model."""
    targets: Any = None
    """Default: the class of the module."""

    def build(self) -> nn.Module:
        torch.manual_seed(7)
        return self.make().double()

    def target_of(self, module: nn.Module) -> Any:
        return type(module) if self.targets is None else self.targets


def rand(*shape: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randn(*shape, dtype=torch.float64),)


def tokens() -> tuple[Tensor]:
    return (torch.randint(0, 9, (3, 5)),)


def packed() -> tuple[PackedSequence]:
    return (pack_padded_sequence(torch.randn(5, 3, 6, dtype=torch.float64), [5, 4, 2]),)


def cell_inputs() -> tuple[Tensor, Tensor]:
    return *rand(3, 6)(), *rand(3, 4)()


def lstm_cell_inputs() -> tuple[Tensor, tuple[Tensor, Tensor]]:
    return *rand(3, 6)(), (*rand(3, 4)(), *rand(3, 4)())


def attention_inputs() -> tuple[Tensor, Tensor, Tensor]:
    return (torch.randn(4, 3, 8, dtype=torch.float64),) * 3


def cross_inputs() -> tuple[Tensor, Tensor, Tensor]:
    sizes = (8, 6, 10)
    a, b, c = (torch.randn(4, 3, size, dtype=torch.float64) for size in sizes)
    return a, b, c


def recurrent(layers: int = 1, reverse: bool = False) -> tuple[str, ...]:
    endings = ("", "_reverse") if reverse else ("",)
    return tuple(f"weight_hh_l{n}{end}" for n in range(layers) for end in endings)


SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
PACKED = ("in_proj_weight", "out_proj.weight")

CASES = {
    "linear": Case(lambda: nn.Linear(6, 4), rand(3, 6), ("weight",)),
    "linear-no-bias": Case(lambda: nn.Linear(6, 4, bias=False), rand(2, 3, 6), ("weight",)),
    "linear-subclass": Case(lambda: OwnLinear(6, 4), rand(3, 6), ("weight",)),
    "conv1d": Case(lambda: nn.Conv1d(4, 6, 3), rand(2, 4, 9), ("weight",)),
    "conv1d-groups": Case(lambda: nn.Conv1d(4, 6, 3, groups=2), rand(2, 4, 9), ("weight",)),
    "conv2d": Case(lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), rand(2, 4, 7, 7), ("weight",)),
    "conv2d-depthwise": Case(lambda: nn.Conv2d(4, 4, 3, groups=4), rand(2, 4, 5, 5), ("weight",)),
    "conv2d-reflect": Case(
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), rand(2, 4, 5, 5), ("weight",)
    ),
    "conv3d": Case(lambda: nn.Conv3d(2, 4, 2, groups=2), rand(2, 2, 4, 4, 4), ("weight",)),
    "conv-transpose1d": Case(
        lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), rand(2, 4, 5), ("weight",)
    ),
    "conv-transpose2d": Case(
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), rand(2, 4, 4, 4), ("weight",)
    ),
    "conv-transpose3d": Case(
        lambda: nn.ConvTranspose3d(4, 2, 2, groups=2), rand(2, 4, 3, 3, 3), ("weight",)
    ),
    "embedding": Case(lambda: nn.Embedding(9, 5), tokens, ("weight",)),
    "embedding-padding": Case(lambda: nn.Embedding(9, 5, padding_idx=0), tokens, ("weight",)),
    "rnn": Case(lambda: nn.RNN(6, 4), rand(5, 3, 6), recurrent()),
    "gru": Case(lambda: nn.GRU(6, 4, num_layers=2), rand(5, 3, 6), recurrent(2)),
    "lstm": Case(lambda: nn.LSTM(6, 4), rand(5, 3, 6), recurrent()),
    "lstm-layers": Case(lambda: nn.LSTM(6, 4, num_layers=3), rand(5, 3, 6), recurrent(3)),
    "lstm-bidirectional": Case(
        lambda: nn.LSTM(6, 4, num_layers=2, bidirectional=True), rand(5, 3, 6), recurrent(2, True)
    ),
    "lstm-projection": Case(lambda: nn.LSTM(6, 4, proj_size=2), rand(5, 3, 6), recurrent()),
    "lstm-batch-first": Case(lambda: nn.LSTM(6, 4, batch_first=True), rand(3, 5, 6), recurrent()),
    "lstm-packed": Case(lambda: nn.LSTM(6, 4, bidirectional=True), packed, recurrent(1, True)),
    "gru-packed": Case(lambda: nn.GRU(6, 4), packed, recurrent()),
    "lstm-inputs": Case(
        lambda: nn.LSTM(6, 4, num_layers=2),
        rand(5, 3, 6),
        ("weight_ih_l0", "weight_ih_l1"),
        targets="weight_ih_l*",
    ),
    "rnn-cell": Case(lambda: nn.RNNCell(6, 4), cell_inputs, ("weight_hh",)),
    "gru-cell": Case(lambda: nn.GRUCell(6, 4), cell_inputs, ("weight_hh",)),
    "lstm-cell": Case(lambda: nn.LSTMCell(6, 4), lstm_cell_inputs, ("weight_hh",)),
    "attention": Case(lambda: nn.MultiheadAttention(8, 2), attention_inputs, PACKED),
    "attention-separate": Case(
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=10), cross_inputs, SEPARATE
    ),
    "attention-out": Case(
        lambda: nn.MultiheadAttention(8, 2),
        attention_inputs,
        ("out_proj.weight",),
        targets="out_proj",
    ),
    "encoder-layer": Case(
        lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True),
        rand(3, 4, 8),
        (
            "self_attn.in_proj_weight",
            "self_attn.out_proj.weight",
            "linear1.weight",
            "linear2.weight",
        ),
        targets=[nn.MultiheadAttention, "linear*"],
    ),
    "router": Case(Router, rand(3, 6), ("weight",), targets="weight"),
    "experts": Case(
        Experts, rand(3, 6), ("gate_up_proj", "down_proj"), targets=["gate_up_proj", "down_proj"]
    ),
    "reads-child": Case(ReadsChild, rand(3, 6), ("proj.weight",), targets="proj"),
}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
