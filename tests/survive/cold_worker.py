"""Compile first, each case in a process in which nothing has run: `-m tests.survive.cold_worker [all]`.

This process only imports; every case is a fork of it, so it starts as a fresh process does (what
`torch._dynamo.reset` leaves behind, attributes of threads and of caches, is not there yet) and costs no
import. Writes a JSON list of [case, what went wrong] to the standard output.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from surgery import apply_dropconnect, set_inference, set_p

from ..forks import fork


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape)
        for _ in range(2):
            state = self.cell(x, state)
        return state


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x[:, None])[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 2, 6)
        return self.attention(x, x, x, need_weights=False)[0]


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x.abs().long() % 9)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(F.linear(x, self.w))


class Channels(nn.Module):
    """A convolution over the features."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.conv = (nn.ConvTranspose1d if transposed else nn.Conv1d)(2, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x.view(-1, 2, 3)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def columns() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(8, 6), nn.ReLU())


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "linear": (mlp, "*"),
    "conv": (Channels, "conv"),
    "conv-transpose": (lambda: Channels(True), "conv"),
    "columns": (columns, "0"),
    "embedding": (Words, "table"),
    "cell": (Cell, "cell"),
    "lstm": (Recurrent, "rnn"),
    "attention": (Attention, "attention"),
    "bare": (Bare, "w"),
    "graph": (lambda: torch.fx.symbolic_trace(Bare()), "w"),
    "graph-linear": (lambda: torch.fx.symbolic_trace(mlp()), "*"),
}


@dataclass
class Case:
    model: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def fullgraph(self) -> bool:
        """Torch compiles no plain LSTM either, and 2.9 no plain attention of another batch size."""
        old = torch.__version__.startswith("2.9.")
        return self.model not in (("lstm", "attention") if old else ("lstm",))

    def operated(self) -> nn.Module:
        make, target = MODELS[self.model]
        torch.manual_seed(0)
        model = apply_dropconnect(make(), target, p=0.5, **self.options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
        return model


def few() -> Iterator[Case]:
    """Each kind, sampling, inference, unit and toward at least once."""
    yield Case("linear", {"sampling": "gaussian", "inference": "moments", "toward": "pretrained"})
    yield Case("conv", {"sampling": "example", "unit": "input", "toward": "pretrained"})
    yield Case("graph", {"sampling": "example", "inference": "moments", "samples": 2})
    yield Case("graph-linear", {"sampling": "example", "inference": "sample", "unit": "output"})
    yield Case("cell", {"inference": "sample"})


def every() -> Iterator[Case]:
    """All that a plan accepts; anchors with one model for each way that they take."""
    for name, sampling, unit, toward, inference in itertools.product(
        MODELS,
        ("batch", "example", "gaussian"),
        ("element", "input", "output", "tensor"),
        ("zero", "pretrained"),
        ("mean", "moments", "sample"),
    ):
        options = {"sampling": sampling, "unit": unit, "toward": toward, "inference": inference}
        case = Case(name, options)
        if toward == "pretrained" and name not in ("linear", "conv", "graph", "attention"):
            continue
        try:
            case.operated()
        except ValueError:
            continue
        yield case


def life(
    model: nn.Module, run: Callable[[Tensor], Any], note: Callable[[str], None]
) -> list[Tensor]:
    """What the life of a model gives: outputs and gradients."""
    found: list[Tensor] = []

    def step(rows: int, seed: int) -> None:
        torch.manual_seed(seed)
        x = torch.randn(rows, 6)
        model.zero_grad()
        out = run(x)
        out.square().sum().backward()
        found.extend([out.detach(), *(p.grad.clone() for p in model.parameters())])

    def look(rows: int, seed: int) -> None:
        torch.manual_seed(seed)
        with torch.no_grad():
            found.append(run(torch.randn(rows, 6)))

    step(4, 1)
    look(4, 2)
    step(6, 3)
    model.eval()
    look(6, 4)
    look(4, 5)
    model.train()
    step(4, 6)
    note("before set_p")
    set_p(model, 0.2)
    step(4, 7)
    set_p(model, 0.9)
    step(6, 8)
    note("after set_p")
    with set_inference(model, "sample"):
        model.eval()
        look(4, 9)
    look(4, 10)
    model.train()
    step(6, 11)
    return found


def check(case: Case) -> None:
    """Compiled in a cold process, then eager: the same."""
    model = case.operated()
    backend = CompileCounterWithBackend("eager")
    counts: dict[str, int] = {}

    def note(when: str) -> None:
        counts[when] = backend.frame_count

    run = torch.compile(model, backend=backend, fullgraph=case.fullgraph)
    compiled = life(model, run, note)
    assert counts["before set_p"] == counts["after set_p"], f"set_p recompiles: {counts}"
    again = case.operated()
    for index, (one, other) in enumerate(
        zip(compiled, life(again, again, lambda when: None), strict=True)
    ):
        # Gradients of noise are as large as 700, and sums round in units of the largest.
        atol = max(1e-6, 4 * 2**-24 * float(other.detach().abs().max()))
        torch.testing.assert_close(
            one, other, rtol=1e-5, atol=atol, msg=lambda m, i=index: f"{i}: {m}"
        )


def forked(case: Case) -> str | None:
    """What goes wrong with a case in a process of its own."""
    read, write = os.pipe()
    child = fork()
    if child == 0:
        os.close(read)
        os.dup2(write, 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            check(case)
        except BaseException:
            os.write(1, traceback.format_exc()[-3000:].encode())
        os._exit(0)
    os.close(write)
    with open(read, errors="replace") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return text or (None if status == 0 else f"died with status {status}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    todo = list(every() if "all" in sys.argv else few())
    found = [(f"{case.model} {case.options}", forked(case)) for case in todo]
    json.dump({"cases": len(todo), "wrong": [one for one in found if one[1]]}, sys.stdout)
