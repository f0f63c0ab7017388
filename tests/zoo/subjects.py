"""Small models, one for each kind of site, that take one tensor and return one.

Fresh processes can import the classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery import apply_dropconnect


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 5, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 5)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Mixer(nn.Module):
    """Reads the weight of its child instead of calling it, as Mamba does with `dt_proj`."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.proj.weight.t() + self.proj.bias


class Experts(nn.Module):
    """A bare three-dimensional parameter, as mixture-of-experts layers have."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(3, 4, 5) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nti,eio->neto", x, self.gate_up).tanh()


@dataclass(frozen=True)
class Subject:
    """A model, an input and the sites to operate on."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    targets: tuple[str, ...]
    sites: tuple[str, ...]
    """Plain names of the sites that `targets` means."""
    words: bool = False

    def plain(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make()

    def operated(self, p: float = 0.5, **options: Any) -> nn.Module:
        return apply_dropconnect(self.plain(), list(self.targets), p=p, **options)

    def moved(self, **options: Any) -> nn.Module:
        """Operated, with weights that have left their pretrained values."""
        model = self.operated(**options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
        return model

    def inputs(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        if self.words:
            return torch.randint(0, 11, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator)


SEQUENCE = (2, 3, 4)

SUBJECTS = (
    Subject(
        "linear",
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)),
        (5, 4),
        ("0", "2"),
        ("0.weight", "2.weight"),
    ),
    Subject(
        "conv",
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, groups=2), nn.Tanh(), nn.Conv2d(4, 3, 2)
        ),
        (2, 2, 9, 9),
        ("*",),
        ("0.weight", "2.weight"),
    ),
    Subject("embedding", Words, (3, 4), ("embedding",), ("embedding.weight",), words=True),
    Subject(
        "lstm",
        Recurrent,
        SEQUENCE,
        ("rnn",),
        tuple(f"rnn.weight_hh_l{layer}{way}" for layer in (0, 1) for way in ("", "_reverse")),
    ),
    Subject("gru-cell", Loop, SEQUENCE, ("cell",), ("cell.weight_hh",)),
    Subject(
        "attention",
        SelfAttention,
        SEQUENCE,
        ("attention",),
        ("attention.in_proj_weight", "attention.out_proj.weight"),
    ),
    Subject(
        "transformer",
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        SEQUENCE,
        ("self_attn", "linear1", "linear2"),
        (
            "self_attn.in_proj_weight",
            "self_attn.out_proj.weight",
            "linear1.weight",
            "linear2.weight",
        ),
    ),
    Subject("parent-read", Mixer, SEQUENCE, ("proj",), ("proj.weight",)),
    Subject("experts", Experts, SEQUENCE, ("gate_up",), ("gate_up",)),
)

BY_NAME = {subject.name: subject for subject in SUBJECTS}
