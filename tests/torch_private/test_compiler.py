"""Canaries of what `torch.compile` is told, and of what is seen of a trace."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery.torch_private import compiler
from surgery.torch_private.tensors import counter

from .canary import canary


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(function, backend="eager", **options)


@canary(compiler, "torch._dynamo: _dynamo_marked_constant")
def test_a_marked_function_is_called_in_the_trace_alone() -> None:
    """The mark is that of the public function."""
    calls = []

    @compiler.constant_in_traces
    def asks() -> int:
        calls.append(id(sys))
        return len(calls)

    function = _compiled(lambda x: x * asks(), fullgraph=True)
    assert [function(torch.ones(1)).item() for _ in range(3)] == [1, 1, 1]
    assert len(calls) == 1
    public = torch.compiler.assume_constant_result(lambda: 1)
    assert vars(public) == vars(compiler.constant_in_traces(lambda: 1))


@canary(compiler, "sys.modules['torch._dynamo']")
def test_dynamo_is_there_once_something_is_compiled() -> None:
    code = """
import torch
from surgery.torch_private import compiler
assert not compiler.has_dynamo()
torch.compile(lambda x: x, backend="eager")(torch.ones(1))
assert compiler.has_dynamo()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@canary(compiler, "torch._functorch.config.activation_memory_budget")
def test_the_memory_budget_is_what_users_set() -> None:
    import torch._functorch.config as config

    assert compiler.memory_budget() == 1
    with config.patch(activation_memory_budget=0.25):
        assert compiler.memory_budget() == 0.25


class Told:
    """An object of no torch class, as our modules and states are for these functions."""

    seen: Any = None


def _looking(look: Callable[[Any], None], told: Told) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        used = x * 2
        used.add_(1)
        compiler.look_in_trace(look, _otherwise, told, told, used, 7)
        return used.view(-1) + 1

    return function


CALLED: list[Any] = []


def _otherwise(reader: Any, state: Any, used: Tensor, version: int) -> None:
    CALLED.append((reader, state, used.tolist(), version))


@canary(
    compiler,
    "torch._dynamo.comptime.comptime",
    "ComptimeVar.as_fake",
    "ComptimeVar.as_proxy",
    "torch._dynamo: node.meta['example_value']",
    "ComptimeContext.graph",
)
def test_a_trace_can_be_looked_into() -> None:
    found: dict[str, Any] = {}

    def look(context: Any) -> None:
        node = compiler.node_of(context, "used")
        found["version"] = counter(compiler.fake_of(context, "used"))
        found["same"] = compiler.result_of(node) is compiler.fake_of(context, "used")
        found["nodes"] = [one.op for one in compiler.nodes_from_the_end(context)]
        found["place"] = node in list(compiler.nodes_from_the_end(context))

    function = _compiled(_looking(look, Told()), fullgraph=True)
    assert function(torch.ones(2)).tolist() == [4, 4]
    assert found == {
        "version": 1,
        "same": True,
        "nodes": ["call_method", "call_function", "placeholder"],
        "place": True,
    }
    assert not CALLED


@canary(
    compiler, "torch._dynamo: VariableTracker._i_will_not_complain_if_bc_breaks_VariableTracker"
)
def test_objects_in_a_trace_are_the_real_ones() -> None:
    told = Told()

    def look(context: Any) -> None:
        compiler.object_of(context, "reader").seen = compiler.object_of(context, "state")

    _compiled(_looking(look, told), fullgraph=True)(torch.ones(2))
    assert told.seen is told


@canary(compiler, "ComptimeContext.graph_break")
def test_a_graph_can_be_broken_where_it_is_looked_into() -> None:
    """Then the other function is called with the values."""

    def look(context: Any) -> None:
        compiler.break_graph(context, "because of this")

    told = Told()
    CALLED.clear()
    assert _compiled(_looking(look, told))(torch.ones(2)).tolist() == [4, 4]
    assert [(told, told, [3, 3], 7)] == CALLED
    CALLED.clear()
    torch.compiler.reset()
    with pytest.raises(Exception, match="because of this"):
        _compiled(_looking(look, told), fullgraph=True)(torch.ones(2))
    assert not CALLED


@canary(compiler, "torch._dynamo.eval_frame._stance")
def test_the_stance_is_put_back() -> None:
    """Also the one that the user has set."""

    def stance() -> Any:
        return torch._dynamo.eval_frame._stance

    for before in ("default", "eager_on_recompile"):
        torch.compiler.set_stance(before)
        put_back = compiler.stance_back()
        torch.compiler.set_stance("force_eager")
        assert stance().stance == "force_eager"
        put_back()
        assert stance().stance == before
    torch.compiler.set_stance("default")


@canary(compiler, "torch._dynamo.eval_frame._stance")
def test_the_stance_is_put_back_where_dynamo_came_meanwhile() -> None:
    code = """
import sys, torch
from surgery.torch_private import compiler
put_back = compiler.stance_back()
assert "torch._dynamo" not in sys.modules
put_back()
torch.compiler.set_stance("force_eager")
put_back()
assert torch._dynamo.eval_frame._stance.stance == "default"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
