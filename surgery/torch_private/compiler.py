"""What `torch.compile` is told, and what can be seen of a trace while it is made.

Importing dynamo takes seconds, so that nothing here does before something is compiled.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, fx

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_traces(function: Function) -> Function:
    """What `torch.compiler.assume_constant_result` does: dynamo calls the function while it traces, and
    takes what it returns for a constant. That one imports dynamo."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_traces
def is_exporting() -> bool:
    """`torch.compiler.is_exporting()`, to which the dynamo of torch 2.9 answers yes in all compiled
    code."""
    return torch.compiler.is_exporting()


def has_dynamo() -> bool:
    """Whether dynamo was imported, without which nothing is compiled; `torch.compiler.set_stance`
    imports it."""
    return "torch._dynamo" in sys.modules


def stance_back() -> Callable[[], None]:
    """A call that gives `torch.compile` the stance back that it has now. `torch.compiler.set_stance`
    does not tell which that is; as a context it puts it back in Python code, before which an interrupt
    can come, and then nothing would be compiled any more."""
    before = _stance_now()

    def put_back() -> None:
        now = _stance_now()
        if now is not before:
            kept = type(now)() if before is None else before
            sys.modules["torch._dynamo.eval_frame"]._stance = kept  # type: ignore[attr-defined]

    return put_back


def _stance_now() -> Any:
    """None without dynamo, which then has the default one when it is imported."""
    return getattr(sys.modules.get("torch._dynamo.eval_frame"), "_stance", None)


def memory_budget() -> float:
    """`torch._functorch.config.activation_memory_budget`, which users set there: below 1, the backward
    of a compiled graph may compute again, and draw anew, what its forward has drawn."""
    import torch._functorch.config as config

    return float(config.activation_memory_budget)


def look_in_trace(
    look: Callable[[Any], None],
    otherwise: Callable[..., None],
    reader: Any,
    state: Any,
    used: Any,
    version: int,
) -> None:
    """Let `look` see what dynamo knows at this point of a trace; nothing is left in the graph. Without
    it, writes into a masked weight could not be refused in compiled code.

    Args:
        look: is given a context, for the functions below. They know the others by their names here.
        otherwise: called with the others where `look` breaks the graph: there the code goes on in
            eager mode.
        reader, state, used, version: what it is about.
    """
    from torch._dynamo.comptime import comptime

    comptime(look, lambda: otherwise(reader, state, used, version))


def fake_of(context: Any, name: str) -> Any:
    """The fake tensor that stands for a tensor in a trace. It has a version as real ones."""
    return context.get_local(name).as_fake()


def node_of(context: Any, name: str) -> fx.Node:
    """The node of the graph whose result a tensor is."""
    node: fx.Node = context.get_local(name).as_proxy().node
    return node


def object_of(context: Any, name: str) -> Any:
    """The object that something else in a trace stands for."""
    variable = context.get_local(name)
    return variable._i_will_not_complain_if_bc_breaks_VariableTracker().value


def nodes_from_the_end(context: Any) -> Iterator[fx.Node]:
    """The nodes of the graph as it is by now, the last one first."""
    yield from reversed(context.graph().nodes)


def result_of(node: Any) -> Tensor | Any:
    """The fake tensor that a node makes, or what else it makes; None if that is not known."""
    return node.meta.get("example_value")


def break_graph(context: Any, why: str) -> NoReturn:
    """End the graph here; with `fullgraph=True` that is an error which says why."""
    context.graph_break(why)
    raise AssertionError("a break of the graph returns nowhere")
