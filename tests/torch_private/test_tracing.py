"""Canaries of the questions what follows the calling code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from functorch.compile import aot_function, nop
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from surgery.torch_private import tracing

from .canary import canary

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def _asked_by(
    question: Callable[[], object], run: Callable[[Callable[[Tensor], Tensor]], object]
) -> list[object]:
    """What a function finds that `run` is given."""
    found = []

    def asks(x: Tensor) -> Tensor:
        found.append(question())
        return x.sin()

    run(asks)
    return found


ONES = torch.ones(2, 2)
TRANSFORMS = {
    "vmap": lambda f: torch.func.vmap(f)(ONES),
    "grad": lambda f: torch.func.grad(lambda x: f(x).sum())(ONES),
    "jvp": lambda f: torch.func.jvp(f, (ONES,), (ONES,)),
    "vjp": lambda f: torch.func.vjp(f, ONES),
    "functionalize": lambda f: torch.func.functionalize(f)(ONES),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@canary(tracing, "torch._C._are_functorch_transforms_active")
def test_transforms_are_seen(name: str) -> None:
    assert not tracing.is_traced()
    assert _asked_by(tracing.is_traced, TRANSFORMS[name]) == [True]
    assert _asked_by(torch._C._are_functorch_transforms_active, TRANSFORMS[name]) == [True]
    assert not tracing.is_traced()


@canary(tracing, "torch.autograd.forward_ad._current_level")
def test_forward_mode_is_seen() -> None:
    """Also of tensors that have no tangent."""
    assert not tracing.is_traced()
    with forward_ad.dual_level():
        assert tracing.is_traced()
    assert not tracing.is_traced()


def _on_fakes(f: Callable[[Tensor], Tensor]) -> None:
    with FakeTensorMode() as mode:
        f(mode.from_tensor(ONES))


def _exported(f: Callable[[Tensor], Tensor]) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return f(x)

    torch.export.export(Model(), (ONES,), strict=False)


GRAPHS = {
    "real": lambda f: make_fx(f)(ONES),
    "symbolic": lambda f: make_fx(f, tracing_mode="symbolic")(ONES),
    "before the dispatcher": lambda f: make_fx(f, pre_dispatch=True)(ONES),
    "aot": lambda f: aot_function(f, fw_compiler=nop)(ONES),
    "fakes": _on_fakes,
    "export": _exported,
}


@pytest.mark.parametrize("name", GRAPHS)
@canary(
    tracing,
    "torch._C._get_dispatch_mode",
    "torch._C._TorchDispatchModeKey",
    "torch.fx._symbolic_trace._get_is_fx_tracing (_is_fx_tracing_flag)",
    "torch.compiler._is_compiling_flag",
)
def test_graphs_are_seen(name: str) -> None:
    for question in (tracing.is_graphed, tracing.is_traced):
        assert not question()
        assert set(_asked_by(question, GRAPHS[name])) == {True}
        assert not question()


@canary(tracing, "torch._C._get_dispatch_mode")
def test_a_mode_that_looks_on_makes_no_graph() -> None:
    with TorchDispatchMode():
        assert not tracing.is_graphed()
        assert not tracing.is_traced()


def test_compiled_code_is_seen() -> None:
    compiled = torch.compile(
        lambda x: x + tracing.is_graphed() + 2 * tracing.is_traced(),
        backend="eager",
        fullgraph=True,
    )
    assert torch.equal(compiled(ONES), ONES + 3)


@canary(tracing, "torch._C._is_tracing")
def test_torch_jit_trace_is_seen() -> None:
    """As by the public question."""
    assert not tracing.is_scripted()
    trace = _asked_by(tracing.is_scripted, lambda f: torch.jit.trace(f, ONES, check_trace=False))
    public = _asked_by(torch.jit.is_tracing, lambda f: torch.jit.trace(f, ONES, check_trace=False))  # type: ignore[attr-defined]
    assert trace == public == [True]
    assert not tracing.is_scripted()


@canary(tracing, "torch._C._current_graph_task_id")
def test_a_recomputation_runs_in_a_backward() -> None:
    def run(f: Callable[[Tensor], Tensor]) -> None:
        x = torch.ones(2, requires_grad=True)
        checkpoint(f, x, use_reentrant=False).sum().backward()

    first, again = _asked_by(tracing.backward_number, run)
    assert first == -1 != again
    assert tracing.backward_number() == -1


def test_nothing_is_captured() -> None:
    """Asked in every forward, also where there is no CUDA."""
    assert not tracing.is_capturing()
