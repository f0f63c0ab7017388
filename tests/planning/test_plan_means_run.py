"""What a plan with inputs accepts, a run does not refuse; and what runs, the plan does not refuse."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import SurgeryError, apply_dropconnect, plan_dropconnect


class Columns(nn.Module):
    """As transformers' Conv1D reads its weight: of a view with all rows in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.inner = Conv1D(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Functional(nn.Module):
    """A weight that is read by its name: of no known kind as a module, a product in a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class First(nn.Module):
    """The first of what a module returns."""

    def __init__(self, inner: nn.Module, calls: int = 1) -> None:
        super().__init__()
        self.inner, self.calls = inner, calls

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(*[x] * self.calls)[0]


KINDS = {
    "linear": (lambda: nn.Linear(6, 5), "site"),
    "columns": (Columns, "site.inner"),
    "functional": (Functional, "site.weight"),
    "conv": (lambda: nn.Conv1d(6, 5, 1), "site"),
    "transposed": (lambda: nn.ConvTranspose1d(6, 5, 1), "site"),
    "embedding": (lambda: nn.Embedding(9, 5), "site"),
    "lstm": (lambda: First(nn.LSTM(6, 5)), "site.inner"),
    "cell": (lambda: First(nn.LSTMCell(6, 5)), "site.inner"),
    "attention": (lambda: First(nn.MultiheadAttention(6, 2), 3), "site.inner"),
}

THEN: dict[str, Any] = {
    "nothing": lambda u: u,
    "relu": F.relu,
    "norm": lambda u: F.layer_norm(u, u.shape[-1:]),
    "glu": lambda u: F.glu(torch.cat([u, u], -1)),
    "softmax": lambda u: u.softmax(-1),
    "log softmax": lambda u: F.log_softmax(u, -1),
    "logsumexp": lambda u: torch.logsumexp(u, -1),
    "method logsumexp": lambda u: u.logsumexp(-1),
    "gumbel": F.gumbel_softmax,
    "softmin": lambda u: F.softmin(u, -1),
    "scaled": lambda u: (u / 2 + 1).neg().softmax(-1),
    "from a number": lambda u: (1 - u).softmax(-1),
    "in place": lambda u: u.mul_(2).softmax(-1),
    "moved": lambda u: u.roll(1, -1).flip(-1).unsqueeze(0).repeat(2, *[1] * u.ndim).softmax(-1),
    "of a part": lambda u: u.split(1, -1)[0].softmax(0),
    "joined": lambda u: torch.stack([u, u]).softmax(0),
    "cast": lambda u: u.double().float().clone().softmax(-1),
    "one of two": lambda u: u.relu() + u.softmax(-1),
    "dropped": lambda u: F.dropout(u, 0.1, False).softmax(-1),
    "normed": lambda u: F.batch_norm(u, torch.zeros(u.shape[1]), torch.ones(u.shape[1])).softmax(
        -1
    ),
    "masked": lambda u: u.masked_fill(u.detach() > 0, -1.0).softmax(-1),
    "activated": lambda u: u.relu().softmax(-1),
    "with itself": lambda u: (u + u.tanh()).softmax(-1),
    "squared": lambda u: (u * u).softmax(-1),
    "weighted": lambda u: torch.add(u, torch.ones(()), alpha=2).softmax(-1),
    "product": lambda u: (u @ torch.ones(u.shape[-1], 3)).softmax(-1),
    "loss": lambda u: F.cross_entropy(u.flatten(0, -2), torch.zeros(u[..., 0].numel()).long()),
}

TURNS: dict[str, Any] = {
    "as it is": lambda x: x,
    "turned": lambda x: x.transpose(0, 1),
    "one row": lambda x: x[0],
    "flat": lambda x: x.flatten(0, 1),
}


class Net(nn.Module):
    def __init__(self, kind: str, turn: str, then: str) -> None:
        super().__init__()
        self.site, self.turn, self.then = KINDS[kind][0](), TURNS[turn], THEN[then]

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.site(self.turn(x)))


AXES: dict[str, Any] = {
    "kind": list(KINDS),
    "graph": [False, True],
    "turn": list(TURNS),
    "then": list(THEN),
    "sampling": ["batch", "example", "gaussian"],
    "unit": ["element", "input", "output", "tensor"],
    "inference": ["mean", "moments", "sample"],
    "samples": [None, 2],
    "bias": [False, True],
    "example_dim": [0, 1, -2, "all"],
}


def run(model: nn.Module, x: Tensor) -> None:
    for training in (True, False):
        nn.Module.train(model, training)
        model(x)


def attempt(function: Any, *args: Any, **options: Any) -> tuple[Any, str | None]:
    try:
        return function(*args, **options), None
    except (SurgeryError, RuntimeError) as error:
        return None, f"{type(error).__name__}: {error}"


def check(case: dict[str, Any]) -> str:
    """Whether a case was `accepted` or `refused`; or why it is none."""
    options = {name: case[name] for name in list(AXES)[4:]}
    x = torch.randint(9, (3, 4)) if case["kind"] == "embedding" else torch.randn(3, 6, 6)
    torch.manual_seed(0)
    make = lambda: Net(case["kind"], case["turn"], case["then"])  # noqa: E731
    try:
        run(make(), x)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return "does not run"
    model: nn.Module = make()
    target = KINDS[case["kind"]][1]
    if case["graph"]:
        try:
            model = torch.fx.symbolic_trace(model)
        except (torch.fx.proxy.TraceError, TypeError):  # it looks at shapes
            return "does not run"
    try:
        plan, refused = attempt(plan_dropconnect, model, target, 0.3, example_inputs=x, **options)
    except ValueError:
        return "no such options"
    made, later = attempt(apply_dropconnect, model, target if refused else plan,
                          **({"p": 0.3, **options} if refused else {}))  # fmt: skip
    if later is None:
        _, later = attempt(run, made, x)
    assert refused is not None or later is None, f"{case}: planned, but {later}"
    noticed_in_plans_only = case["graph"] and options["sampling"] == "example"
    if not noticed_in_plans_only:
        assert refused is None or later is not None, f"{case}: runs, but {refused}"
    return "accepted" if refused is None else "refused"


def cases(**fixed: Any) -> list[dict[str, Any]]:
    axes = {**AXES, **{name: [value] for name, value in fixed.items()}}
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def some(count: int, **fixed: Any) -> list[dict[str, Any]]:
    """So many cases, the same each time."""
    chance = random.Random(0)
    axes = {**AXES, **{name: [value] for name, value in fixed.items()}}
    return [{name: chance.choice(values) for name, values in axes.items()} for _ in range(count)]


@pytest.mark.parametrize("graph", [False, True], ids=["module", "graph"])
@pytest.mark.parametrize("kind", ["linear", "functional", "columns"])
def test_what_follows_a_product(kind: str, graph: bool) -> None:
    if kind == "columns" and graph:
        pytest.skip("transformers' Conv1D reads sizes, which symbolic tracing does not")
    found = {
        check({**base, "then": then, "samples": samples})
        for then in THEN
        for samples in (None, 2)
        for base in cases(kind=kind, graph=graph, turn="as it is", then=then, samples=samples,
                          sampling="batch", unit="element", inference="moments", bias=False,
                          example_dim=0)
    }  # fmt: skip
    assert {"accepted", "refused"} & found


@pytest.mark.parametrize("example_dim", [0, 1, -2, "all"])
def test_where_examples_lie(example_dim: Any) -> None:
    found = [
        check(case)
        for kind in ("linear", "columns", "conv")
        for turn in TURNS
        for unit in ("element", "output")
        for case in cases(kind=kind, graph=False, turn=turn, then="relu", samples=None, unit=unit,
                          sampling="example", inference="mean", bias=False,
                          example_dim=example_dim)
    ]  # fmt: skip
    assert {"accepted", "refused"} <= set(found)


def test_any_combination() -> None:
    found = [check(case) for kind in KINDS for case in some(12, kind=kind)]
    assert {"accepted", "refused"} <= set(found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_combinations(kind: str) -> None:
    for case in some(800, kind=kind):
        check(case)


class Flattened(nn.Module):
    """Rows of all examples in one dimension: where the examples lie cannot be told any more."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(0, 1))


def test_only_masks_per_example_ask_where_examples_lie() -> None:
    x = torch.randn(4, 6, 8)
    with pytest.raises(SurgeryError, match="takes dimension 0 of its input for the examples"):
        plan_dropconnect(Flattened(), "fc", sampling="example", example_inputs=x)
    model = apply_dropconnect(Flattened(), "fc", sampling="gaussian", example_inputs=x)
    assert model(x).shape == (24, 4)
