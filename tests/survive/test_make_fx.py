"""Graphs of operations: `make_fx`, AOTAutograd; and modes that look at each operation.

A graph draws its masks when it runs: the ones that the model draws after the same seed. What a mode
has seen is the whole computation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import pytest
import torch
from functorch.compile import aot_module, nop
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, linearize
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from surgery import SurgeryError, apply_dropconnect, hold_masks

from ..steps import assert_same, raw, step_gradients
from ..zoo.subjects import BY_NAME, Subject

Mode = Literal["real", "fake", "symbolic"]
MODES: tuple[Mode, ...] = ("real", "fake", "symbolic")

OPTIONS = (
    {"sampling": "example"},
    {"sampling": "example", "unit": "output", "toward": "pretrained", "bias": True},
    {"sampling": "gaussian"},
    {"unit": "input", "toward": "pretrained"},
    {"inference": "moments"},
    {"inference": "moments", "samples": 3},
)

Values = dict[str, Tensor]


def graph_of(model: nn.Module, x: Tensor, mode: Mode, **options: Any) -> Callable[[], Tensor]:
    """The model as a graph of operations. Parameters and buffers are inputs, as fake ones must be."""
    values: Values = {name: tensor.detach() for name, tensor in model.named_parameters()}
    values |= dict(model.named_buffers())

    def call(values: Values, x: Tensor) -> Tensor:
        found: Tensor = functional_call(model, values, (x,))
        return found

    graph = make_fx(call, tracing_mode=mode, **options)(values, x)
    return partial(graph, values, x)


def seeded(run: Callable[[], Tensor], seed: int) -> Tensor:
    torch.manual_seed(seed)
    return run()


def assert_draws_as(graph: Callable[[], Tensor], model: Callable[[], Tensor]) -> None:
    """The same values after the same seed, and others after another one."""
    for seed in (7, 8):
        torch.testing.assert_close(seeded(graph, seed), seeded(model, seed))
    assert not torch.equal(seeded(graph, 7), seeded(graph, 8))


@pytest.mark.parametrize("mode", [MODES[0], pytest.param(MODES[1], marks=pytest.mark.slow)])
def test_a_graph_draws_its_masks_when_it_runs(subject: Subject, mode: Mode) -> None:
    model, x = subject.moved(), subject.inputs()
    recorded = subject.name in ("linear", "attention")
    with torch.set_grad_enabled(recorded):
        assert_draws_as(graph_of(model, x, mode), lambda: model(x))


@pytest.mark.parametrize("name", ["linear", "lstm", "conv"])
def test_parameters_of_the_model_may_be_constants_of_the_graph(name: str) -> None:
    model, x = BY_NAME[name].moved(toward="pretrained"), BY_NAME[name].inputs()
    graph = make_fx(model)(x)
    assert_draws_as(lambda: graph(x), lambda: model(x))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("mode", MODES[::2])
def test_every_way_to_sample_and_to_infer(mode: Mode, options: dict[str, Any]) -> None:
    model, x = BY_NAME["linear"].moved(**options), BY_NAME["linear"].inputs()
    model.train("inference" not in options)
    graph = graph_of(model, x, mode)
    torch.testing.assert_close(seeded(graph, 7), seeded(lambda: model(x), 7))
    draws = options != {"inference": "moments"}
    assert torch.equal(seeded(graph, 7), seeded(graph, 8)) != draws


def test_noise_of_a_convolution() -> None:
    model, x = BY_NAME["conv"].moved(sampling="gaussian"), BY_NAME["conv"].inputs()
    assert_draws_as(graph_of(model, x, "real"), lambda: model(x))


@pytest.mark.parametrize("mode", MODES[:2])
def test_a_graph_from_before_the_dispatcher(mode: Mode) -> None:
    model, x = BY_NAME["linear"].moved(), BY_NAME["linear"].inputs()
    assert_draws_as(graph_of(model, x, mode, pre_dispatch=True), lambda: model(x))


def test_a_graph_of_a_graph_with_a_node() -> None:
    subject = BY_NAME["parent-read"]
    model = apply_dropconnect(torch.fx.symbolic_trace(subject.plain()), "proj", p=0.5)
    assert isinstance(model, GraphModule)
    x = subject.inputs()
    assert_draws_as(graph_of(model, x, "fake"), lambda: model(x))


def test_inference_mode_is_no_hindrance() -> None:
    model, x = BY_NAME["attention"].moved(), BY_NAME["attention"].inputs()
    with torch.inference_mode():
        graph = make_fx(model)(x)
        assert_draws_as(lambda: graph(x), lambda: model(x))


def test_a_generator_of_its_own_is_part_of_the_graph() -> None:
    subject, x = BY_NAME["linear"], BY_NAME["linear"].inputs()
    generator = torch.Generator().manual_seed(3)
    model = subject.operated(generator=generator)
    if torch.__version__.startswith("2.9."):
        with pytest.raises(SurgeryError, match=r"0\.weight has .*puts no generator into a graph.*"):
            graph_of(model, x, "fake")
        return
    graph = graph_of(model, x, "fake")

    def started_again(run: Callable[[], Tensor]) -> Tensor:
        generator.manual_seed(3)
        return run()

    torch.testing.assert_close(started_again(graph), started_again(lambda: model(x)))
    assert not torch.equal(graph(), graph())


@pytest.mark.parametrize("mode", MODES)
def test_masks_that_are_held_are_constants(mode: Mode) -> None:
    model, x = BY_NAME["gru-cell"].moved(), BY_NAME["gru-cell"].inputs()
    with hold_masks(model):
        graph = graph_of(model, x, mode)
        expected = model(x)
        torch.testing.assert_close(graph(), expected)
    torch.testing.assert_close(graph(), expected)


@pytest.mark.parametrize("mode", MODES[:2])
def test_masks_may_be_held_inside_of_the_graph(mode: Mode) -> None:
    model, x = BY_NAME["linear"].moved(), BY_NAME["linear"].inputs()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            with hold_masks(model):
                return torch.stack([model(x), model(x)])

    graph = graph_of(Twice(), x, mode)
    first, second = graph()
    assert torch.equal(first, second)
    assert not torch.equal(first, graph()[0])


@pytest.mark.parametrize("mode", MODES[::2])
def test_a_graph_may_have_the_backward(mode: Mode) -> None:
    model, x = BY_NAME["linear"].operated(toward="pretrained"), BY_NAME["linear"].inputs()
    expected = step_gradients(model, x)
    values = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}

    def step(values: Values, buffers: Values, x: Tensor) -> tuple[Tensor, ...]:
        out = functional_call(model, (values, buffers), (x,))
        return torch.autograd.grad(out.square().sum(), list(values.values()))

    given = values, dict(model.named_buffers()), x
    graph = make_fx(step, tracing_mode=mode)(*given)
    torch.manual_seed(7)
    found = dict(zip(values, graph(*given)))
    for site in BY_NAME["linear"].sites:
        torch.testing.assert_close(found[raw(site)], expected[site])


AOT = [
    *((name, {}) for name in ("linear", "conv", "embedding", "attention", "gru-cell")),
    *(("linear", options) for options in OPTIONS[:3]),
]


@pytest.mark.parametrize(("name", "options"), AOT, ids=str)
def test_aot_autograd(name: str, options: dict[str, Any]) -> None:
    """It traces once, and draws at every step."""
    subject = BY_NAME[name]
    model, x = subject.operated(**options), subject.inputs()
    traced = aot_module(model, fw_compiler=nop, bw_compiler=nop)

    def step(run: Callable[[Tensor], Tensor], seed: int) -> Values:
        model.zero_grad()
        torch.manual_seed(seed)
        out = run(x)
        out.square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {**grads, "output": out.detach()}

    for seed in (7, 8):
        assert_same(step(traced, seed), step(model, seed), rounding=1e-5)


def test_fake_inputs_are_enough_for_shapes() -> None:
    """And leave nothing in the model."""
    model, x = BY_NAME["linear"].operated(), BY_NAME["linear"].inputs()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(torch.randn(5, 4)).shape == (5, 3)
    assert type(model(x)) is Tensor
    expected = BY_NAME["linear"].operated()
    assert torch.equal(seeded(lambda: model(x), 7), seeded(lambda: expected(x), 7))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
def test_a_linear_map_of_held_masks() -> None:
    """`linearize` makes a graph inside of a transform."""
    model, x = BY_NAME["linear"].moved(), BY_NAME["linear"].inputs()
    v = torch.randn_like(x)
    with hold_masks(model):
        found, of_tangents = linearize(model, x)
        expected, tangent = torch.func.jvp(model, (x,), (v,))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(of_tangents(v), tangent)


class Tape(TorchDispatchMode):
    """Records each operation, and can do all of them again."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, out))
        return out

    def again(self, wanted: list[Tensor]) -> list[Tensor]:
        """What `wanted` becomes. Memory that is only reserved holds NaN, or a large number."""
        made: dict[int, Any] = {}

        def now(value: Any) -> Any:
            return made.get(id(value), value) if isinstance(value, Tensor) else value

        for func, args, kwargs, out in self.done:
            result = func(*tree_map(now, args), **tree_map(now, kwargs))
            if "empty" in str(func):
                result.fill_(float("nan") if result.is_floating_point() else 77)
            for old, new in zip(tree_leaves(out), tree_leaves(result)):
                made[id(old)] = new
        return [now(one) for one in wanted]


WATCHED = [
    *((name, {}) for name in ("linear", "conv", "embedding", "attention", "gru-cell", "experts")),
    *(("linear", options) for options in OPTIONS[:4]),
]


@pytest.mark.parametrize(("name", "options"), WATCHED, ids=str)
def test_a_mode_sees_all_that_is_computed(name: str, options: dict[str, Any]) -> None:
    """Done again from what it has seen, forward and backward give the same."""
    subject = BY_NAME[name]
    model, x = subject.operated(**options), subject.inputs()

    def step(mode: AbstractContextManager[Any]) -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(7)
        with mode:
            out = model(x)
            out.square().sum().backward()
        return [out, *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = [one.detach().clone() for one in step(nullcontext())]
    tape = Tape()
    watched = step(tape)
    torch.testing.assert_close([one.detach() for one in watched], expected)
    torch.manual_seed(7)
    with torch.no_grad():
        torch.testing.assert_close(tape.again(watched), expected)


def save_all(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


def save_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if "mm" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE


NEW = "respect_saved_tensors_hooks"
RESPECTING: list[dict[str, Any]] = (
    [{NEW: True}] if NEW in inspect.signature(checkpoint).parameters else []
)
"""Since torch 2.14."""


@pytest.mark.parametrize("policy", [save_all, save_products])
@pytest.mark.parametrize("options", [{}, *OPTIONS[:4]], ids=str)
@pytest.mark.parametrize("given", [{}, *RESPECTING], ids=str)
def test_checkpoints_that_keep_some_operations(
    options: dict[str, Any], policy: Any, given: dict[str, Any]
) -> None:
    """Nothing writes to what they keep."""
    subject = BY_NAME["linear"]
    model, x = subject.operated(**options), subject.inputs()
    contexts = partial(create_selective_checkpoint_contexts, policy)
    expected = step_gradients(model, x)
    model.zero_grad()
    torch.manual_seed(7)
    out = checkpoint(model, x, use_reentrant=False, context_fn=contexts, **given)
    out.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        plain = name.removesuffix("_raw")
        torch.testing.assert_close(parameter.grad, expected[plain])


def test_products_are_counted() -> None:
    subject = BY_NAME["linear"]

    def flops(model: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            model(subject.inputs()).sum().backward()
        return int(counter.get_total_flops())

    assert flops(subject.operated()) == flops(subject.plain()) > 0
