"""Small models, one for each kind of site, and what the tests of this folder do with them.

A module of its own, so that fresh processes can import the classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import apply_dropconnect, plain_state_dict


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


def raw(site: str) -> str:
    """Key of a site's stored parameter."""
    return f"{site}_raw"


def anchor(site: str) -> str:
    """Key of a site's pretrained weight."""
    return f"{site}_anchor"


def step(model: Callable[[Tensor], Tensor], x: Tensor, seed: int | None = 7) -> Tensor:
    """One forward and backward pass; the output. Gradients add up in the parameters."""
    if seed is not None:
        torch.manual_seed(seed)
    out = model(x)
    out.float().square().sum().backward()
    return out.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by plain name; every parameter must have one."""
    found = plain_state_dict(model, {name: p.grad for name, p in model.named_parameters()})
    missing = [name for name, grad in found.items() if grad is None]
    assert not missing, f"no gradient for {missing}"
    return {name: grad.clone() for name, grad in found.items()}


def step_gradients(model: nn.Module, x: Tensor, seed: int | None = 7) -> dict[str, Tensor]:
    """Gradients by plain name, and the output, of one pass from clean gradients."""
    model.zero_grad()
    out = step(model, x, seed)
    return {**gradients(model), "output": out}


def assert_same(
    found: dict[str, Tensor], expected: dict[str, Tensor], rounding: float = 0.0
) -> None:
    """Equal keys and bitwise equal values, or values that differ by rounding only."""

    def same(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, rtol=rounding, atol=rounding) if rounding else torch.equal(a, b)

    assert list(found) == list(expected)
    differing = [name for name in found if not same(found[name], expected[name])]
    assert not differing, f"differ: {differing}"


def rounding_without_grad(subject: Subject) -> float:
    """0 if the plain model's forward is the same to the bit under `no_grad`. On some processors that of
    nn.LSTM is not: torch takes another kernel."""
    model, x = subject.plain(), subject.inputs()
    with torch.no_grad():
        inferred = model(x)
    return 0.0 if torch.equal(inferred, model(x)) else 1e-6


def skip_unless_autocast(subject: Subject) -> None:
    """On some processors torch has no bfloat16 LSTM, with or without DropConnect."""
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            subject.plain()(subject.inputs())
    except RuntimeError as error:
        pytest.skip(f"the plain model fails under autocast here: {error}")


def assert_drops(model: nn.Module, x: Tensor) -> None:
    """Two forward calls from different seeds differ: masks act."""
    with torch.no_grad():
        torch.manual_seed(3)
        first = model(x)
        torch.manual_seed(4)
        assert not torch.equal(first, model(x))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return copy.deepcopy(dict(model.state_dict()))
