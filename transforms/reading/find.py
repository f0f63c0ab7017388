"""Find which operations use each parameter of a model, and which activation follows."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from surgery.ops.part_mask import is_sharded
from surgery.planning.runs import Run

from ..capture.capture import CaptureError, capture, first_of, inputs_for, symbolic
from ..capture.inputs import Inputs, dummy_inputs
from ..capture.record import record_run
from ..capture.untouched import plain
from .findings import Findings, Shape
from .parameters import findings_of


def find(
    model: nn.Module, example_inputs: Any = None, *, graph: fx.GraphModule | None = None
) -> Findings:
    """Which operations use each parameter, how often, run by which module, and what follows.

    The model is run once by `record` if there are inputs (given, or dummies for a transformers model):
    that sees every model, in milliseconds, as it really runs. Without inputs, or if the model does not
    run with dummies, the graph is that of `capture`. The model is left as it was.

    Args:
        model: any module, operated on or not, also a `GraphModule`.
        example_inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        graph: look at this graph of the model (from `capture` or `record`) instead.

    Raises:
        CaptureError: the model does not run with `example_inputs`, or there are none and it can not be
            traced without; the message has the reason of each way.
        TypeError: `example_inputs` is none of these.
    """
    if graph is not None:
        return plain(model, lambda: findings_of(model, graph))
    return _findings(model, inputs_for(model, example_inputs), example_inputs is not None)


def watch_run(model: nn.Module, example_inputs: Any = None) -> Run | None:
    """What `find` tells, in the form in which the core asks for it; None if there is nothing to run the
    model with.

    Raises:
        CaptureError: the model does not run with `example_inputs`.
    """
    if example_inputs is None:
        try:
            dummies = None if _is_sharded(model) else dummy_inputs(model)
            return None if dummies is None else _as_run(_findings(model, dummies, False), ())
        except Exception:  # dummies are a guess, and a model may do anything with them
            return None
    inputs = inputs_for(model, example_inputs)
    assert inputs is not None  # they were given
    findings = _findings(model, inputs, True)
    given = (*inputs.args, *inputs.kwargs.values())
    shapes = tuple(tuple(one.shape) for one in given if isinstance(one, torch.Tensor))
    return _as_run(findings, shapes)


def _findings(model: nn.Module, inputs: Inputs | None, are_given: bool) -> Findings:
    """What `find` tells of a run with inputs that are made already."""
    return plain(model, lambda: findings_of(model, _graph(model, inputs, are_given)))


def _as_run(findings: Findings, given: tuple[Shape, ...]) -> Run:
    return Run(findings, findings.acts, given, findings.running)


def _is_sharded(model: nn.Module) -> bool:
    """Whether a run of the model would be a conversation with other processes."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def _graph(model: nn.Module, inputs: Inputs | None, are_given: bool) -> fx.GraphModule:
    if inputs is not None:
        needed = inputs.for_one_pass(model)
        try:
            return first_of({"record": lambda: record_run(model, needed)}, model, inputs)
        except CaptureError:
            if are_given:
                raise
    if isinstance(model, fx.GraphModule) and _calls_graphs(model):
        return first_of({"symbolic_trace": lambda: symbolic(model)}, model, inputs)
    return capture(model)


def _calls_graphs(graph: fx.GraphModule) -> bool:
    """Whether a graph calls others, which must be written out for data to flow through all of them."""
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    return any(isinstance(graph.get_submodule(target), fx.GraphModule) for target in targets)
