"""`torch.compile(fullgraph=True)`: the eager bits, new masks at each call, one graph for every p."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from surgery import apply_dropconnect, set_p, strip_dropconnect
from surgery.ops import keep_mask, key_from_seed

from ..internals import live_masks, states_of, without_operators
from ..steps import assert_same, gradients, step, step_gradients
from ..zoo.subjects import BY_NAME, SUBJECTS, Subject

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
"""Of inductor's own modules, when they are imported."""

COMPILED = [subject for subject in SUBJECTS if subject.name != "lstm"]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=COMPILED, ids=lambda subject: subject.name)
def subject(request: pytest.FixtureRequest) -> Subject:
    return request.param


class Compiled:
    """A compiled model and a count of its graphs."""

    def __init__(self, model: nn.Module, backend: str = "aot_eager") -> None:
        self.model = model
        self.counter = CompileCounterWithBackend(backend)
        self.run: Callable[[Tensor], Tensor] = torch.compile(
            model, backend=self.counter, fullgraph=True
        )

    @property
    def graphs(self) -> int:
        return self.counter.frame_count

    def step_gradients(self, x: Tensor, seed: int | None = 7) -> dict[str, Tensor]:
        self.model.zero_grad()
        out = step(self.run, x, seed)
        return {**gradients(self.model), "output": out}


def assert_no_mask_is_left(model: nn.Module) -> None:
    assert list(live_masks(model)) == []


@pytest.mark.parametrize("toward", ["zero", pytest.param("pretrained", marks=pytest.mark.slow)])
def test_the_eager_bits_and_one_graph_for_every_p(subject: Subject, toward: str) -> None:
    model, x = subject.moved(toward=toward), subject.inputs()
    compiled = Compiled(model)
    for seed, p in enumerate((0.5, 0.25, 0.0, 1.0, 0.3)):
        set_p(model, p)
        assert_same(compiled.step_gradients(x, seed), step_gradients(model, x, seed))
    assert compiled.graphs == 1
    assert_no_mask_is_left(model)


def test_one_graph_for_different_p_at_each_site() -> None:
    subject = BY_NAME["transformer"]
    model, x = subject.operated(), subject.inputs()
    compiled = Compiled(model)
    compiled.run(x)
    for p, target in ((0.1, "linear1"), (0.2, "linear2"), (0.1, "self_attn")):
        set_p(model, p, target)
        assert_same(compiled.step_gradients(x), step_gradients(model, x))
    assert compiled.graphs == 1


FEW = pytest.mark.parametrize(
    "subject", [BY_NAME["linear"], BY_NAME["attention"]], ids=lambda subject: subject.name
)


@FEW
def test_applied_at_p_zero_is_not_frozen_in_the_graph(subject: Subject) -> None:
    model, x = subject.operated(p=0.0), subject.inputs()
    compiled = Compiled(model)
    assert_same(compiled.step_gradients(x), step_gradients(subject.plain(), x))
    set_p(model, 0.5)
    assert_same(compiled.step_gradients(x), step_gradients(model, x))
    assert compiled.graphs == 1


@FEW
def test_every_call_draws_again(subject: Subject) -> None:
    model, x = subject.operated(), subject.inputs()
    compiled = Compiled(model)
    torch.manual_seed(1)
    outs = [compiled.run(x) for _ in range(4)]
    for i, out in enumerate(outs):
        assert not any(torch.equal(out, other) for other in outs[:i])
    torch.manual_seed(1)
    assert all(torch.equal(compiled.run(x), out) for out in outs)


def test_train_and_eval_are_two_graphs_and_no_more(subject: Subject) -> None:
    model, x = subject.operated(), subject.inputs()
    plain = subject.plain().eval()
    compiled = Compiled(model)
    for _ in range(3):
        model.train()
        assert_same(compiled.step_gradients(x), step_gradients(model, x))
        model.eval()
        assert torch.equal(compiled.run(x), plain(x))
    assert compiled.graphs == 2


@FEW
def test_state_dict_load_does_not_recompile(subject: Subject) -> None:
    model, x = subject.operated(), subject.inputs()
    compiled = Compiled(model)
    compiled.run(x)
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
    assert_same(compiled.step_gradients(x), step_gradients(model, x))
    model.load_state_dict(subject.plain().state_dict())
    assert_same(compiled.step_gradients(x), step_gradients(subject.operated(), x))
    assert compiled.graphs == 1


@pytest.mark.parametrize("change", ["double", "meta"])
def test_one_graph_after_a_move(change: str) -> None:
    """The law follows the weight when it moves, not in the next trace."""
    subject = BY_NAME["linear"]
    x = subject.inputs()
    if change == "double":
        model, x = subject.operated().double(), x.double()
    else:
        with torch.device("meta"):
            model = subject.make()
        apply_dropconnect(model, "*", p=0.5)
        model.load_state_dict(subject.plain().state_dict(), assign=True)
    compiled = Compiled(model)
    compiled.run(x)
    first = compiled.graphs  # torch traces float64 scalars twice
    for p in (0.5, 0.2):
        set_p(model, p)
        assert_same(compiled.step_gradients(x), step_gradients(model, x))
    assert compiled.graphs == first


@FEW
def test_strip_under_compile(subject: Subject) -> None:
    model, plain, x = subject.operated(), subject.plain(), subject.inputs()
    compiled = Compiled(nn.Sequential(model))
    compiled.run(x)
    strip_dropconnect(model)
    assert_same(compiled.step_gradients(x), step_gradients(nn.Sequential(plain), x))


class Twice(nn.Module):
    """Two calls of one module, and two modules with the same weight values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.b.load_state_dict(self.a.state_dict())

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.a(x), self.a(x), self.b(x)]


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.compiler)]
)
def test_no_two_draws_are_merged(backend: str) -> None:
    """Common-subexpression elimination must leave each draw its own."""
    torch.manual_seed(0)
    model = apply_dropconnect(Twice(), "*", p=0.5)
    run = torch.compile(model, backend=backend, fullgraph=True)
    outs = run(torch.eye(16))
    dropped = [(out - model.a.bias).abs() < 1e-6 for out in outs]
    for i, first in enumerate(dropped):
        assert 0.3 < first.float().mean() < 0.7
        for second in dropped[:i]:
            assert 0.3 < (first == second).float().mean() < 0.7


@pytest.mark.compiler
@torch._inductor.config.patch(fallback_random=True)
@pytest.mark.parametrize(
    "subject",
    [
        BY_NAME[name] if name == "linear" else pytest.param(BY_NAME[name], marks=pytest.mark.slow)
        for name in ("linear", "conv", "embedding", "gru-cell", "transformer", "experts")
    ],
    ids=lambda subject: subject.name,
)
def test_inductor_agrees_with_eager(subject: Subject) -> None:
    """The same masks, values up to inductor's rounding."""
    model, x = subject.operated(), subject.inputs()
    compiled = Compiled(model, "inductor")
    for p in (0.5, 0.2, 0.0):
        set_p(model, p)
        found, expected = compiled.step_gradients(x), step_gradients(model, x)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
    assert compiled.graphs == 1


@pytest.mark.compiler
def test_inductor_hashes_every_lane() -> None:
    """Shapes known to the compiler let it reason about the overflow of a loop index: once it left
    whole vectors unhashed. One graph for all sizes around the widths of its vectors."""
    key, threshold = key_from_seed(5), torch.tensor(0, dtype=torch.int32)
    shapes = [(1,), (7,), (16,), (17,), (60,), (777,), (5, 1), (3, 1, 21)]

    def masks(key: Tensor) -> list[Tensor]:
        return [keep_mask(shape, key, threshold) for shape in shapes]

    compiled = torch.compile(masks, fullgraph=True, dynamic=False)
    for found, expected in zip(compiled(key), masks(key)):
        assert torch.equal(found, expected)


def test_rnn_runs_as_the_plain_one_does() -> None:
    """torch does not compile an RNN; without `fullgraph` both run, and agree with eager."""
    subject = BY_NAME["lstm"]
    model, x = subject.operated(), subject.inputs()
    run = torch.compile(model, backend="aot_eager")
    for p in (0.5, 0.2):
        set_p(model, p)
        model.zero_grad()
        out = step(run, x)
        assert_same({**gradients(model), "output": out}, step_gradients(model, x))


@FEW
@pytest.mark.parametrize("fullgraph", [False, True], ids=["breaks", "fullgraph"])
def test_a_checkpoint_inside_the_compiled_region(subject: Subject, fullgraph: bool) -> None:
    """Exact. A live mask is an attribute set for the length of a forward, which dynamo takes for a
    side effect: with `fullgraph` it asks for the flag below, without it breaks the graph there."""
    model, x = subject.moved(), subject.inputs()

    def run(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)

    name = "skip_fwd_side_effects_in_bwd_under_checkpoint"
    if fullgraph and not hasattr(torch._dynamo.config, name):
        pytest.skip(f"torch {torch.__version__} has no {name}")
    with torch._dynamo.config.patch({name: True} if fullgraph else {}):
        compiled = torch.compile(run, backend="aot_eager", fullgraph=fullgraph)
        for p in (0.5, 0.1):
            set_p(model, p)
            model.zero_grad()
            out = step(compiled, x)
            assert_same({**gradients(model), "output": out}, step_gradients(model, x))


@FEW
def test_a_checkpoint_around_the_compiled_region(subject: Subject) -> None:
    model, x = subject.moved(), subject.inputs()
    compiled = Compiled(model)
    model.zero_grad()
    out = step(lambda x: checkpoint(compiled.run, x, use_reentrant=False), x)
    assert_same({**gradients(model), "output": out}, step_gradients(model, x))
    assert compiled.graphs == 1


def kept_for_backward(model: nn.Module, x: Tensor) -> int:
    """Bytes that the compiled graph hands from forward to backward."""
    kept = 0

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal kept
        (outputs,) = graph.graph.find_nodes(op="output")[0].args
        kept = sum(node.meta["val"].nbytes for node in outputs[1:])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=count,
        bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    torch.compile(model, backend=backend, fullgraph=True)(x).sum().backward()
    return kept


@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_a_compiled_graph_keeps_16_bytes_a_site(toward: str) -> None:
    """The key, and where its law is. Anchors, and the table of laws that all sites share, exist
    anyway."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    x = torch.randn(16, 64, requires_grad=True)
    plain = kept_for_backward(model, x)
    apply_dropconnect(model, "*", p=0.3, toward=toward)
    torch._dynamo.reset()
    anchors = sum(buffer.nbytes for buffer in model.buffers())
    table = states_of(model[0])[0].row.table
    kept = kept_for_backward(model, x) - plain - anchors
    assert kept - table.thresholds.nbytes - table.scales.nbytes <= 2 * 16


def test_a_checkpoint_of_a_graph_that_runs_as_it_is() -> None:
    """Autograd follows its operators then, and a checkpoint gives what they keep a single time."""
    layer = apply_dropconnect(nn.Linear(4, 3), nn.Linear, p=0.5)
    run, x, grads = torch.compile(layer, backend="eager"), torch.randn(2, 4), []
    for checkpointed in (False, True):
        torch.manual_seed(4)
        layer.zero_grad()
        output = checkpoint(run, x, use_reentrant=False) if checkpointed else run(x)
        output.sum().backward()
        grads.append(layer.weight.grad)
    assert torch.equal(*grads)


def targets(model: nn.Module, x: Tensor) -> list[list[str]]:
    """The operators of ours in the compiled graphs of a step: forward, and backward."""
    found: list[list[str]] = []

    def note(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        names = (str(node.target) for node in graph.graph.nodes)
        found.append([name for name in names if name.startswith("surgery")])
        return make_boxed_func(graph.forward)

    torch.compile(model, backend=aot_autograd(fw_compiler=note), fullgraph=True)(x).sum().backward()
    return found


@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_a_linear_is_one_operator_and_its_backward_is_one(toward: str) -> None:
    model = apply_dropconnect(nn.Linear(6, 4), nn.Linear, p=0.5, toward=toward)
    forward, backward = targets(model, torch.randn(3, 6, requires_grad=True))
    assert forward == ["surgery.masked_linear.default"]
    assert backward == ["surgery.masked_linear_backward.default"]


@pytest.mark.parametrize("name", ["linear", pytest.param("transformer", marks=pytest.mark.slow)])
@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_the_eager_bits_where_no_operator_stands_for_the_formula(
    name: str, toward: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in graphs for a GPU where there is no extension."""
    without_operators(monkeypatch)
    subject = BY_NAME[name]
    model, x = subject.moved(toward=toward), subject.inputs()
    assert targets(model, x)[0] == []
    torch._dynamo.reset()
    compiled = Compiled(model)
    for seed, p in enumerate((0.5, 0.0, 1.0)):
        set_p(model, p)
        assert_same(compiled.step_gradients(x, seed), step_gradients(model, x, seed))
    assert compiled.graphs == 1


def test_a_linear_inside_a_transform_of_compiled_code() -> None:
    layer = apply_dropconnect(nn.Linear(6, 4), nn.Linear, p=0.5)
    x = torch.randn(3, 6)

    def slopes(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: layer(x).square().sum())(x)

    torch.manual_seed(0)
    expected = slopes(x)
    torch.manual_seed(0)
    torch.testing.assert_close(torch.compile(slopes, backend="aot_eager")(x), expected)


def test_what_a_linear_refuses_is_refused_in_its_graph() -> None:
    run = torch.compile(apply_dropconnect(nn.Linear(6, 4), "*", p=0.5), backend="aot_eager")
    with pytest.raises(RuntimeError, match="same reduction dim"):
        run(torch.randn(3, 5))
