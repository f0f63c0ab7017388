"""A graph of any model, by the first way that works."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx, nn

from surgery.spec.errors import SurgeryError

from .inputs import Inputs, dummy_inputs, given_inputs
from .record import record_run
from .untouched import untouched

Way = Literal["symbolic_trace", "export", "record"]

_KEY = "dropconnect_capture"


class CaptureError(SurgeryError):
    """No way of capturing a model works, or its inputs do not. The model is as it was."""


@dataclass(frozen=True, kw_only=True)
class Capture:
    """How a graph was captured."""

    way: Way
    """The way that worked: `torch.fx.symbolic_trace`, `torch.export.export`, or `record`."""

    reasons: Mapping[str, str] = field(default_factory=dict)
    """Why each way that was tried before it failed."""

    def __str__(self) -> str:
        lines = [f"captured by {self.way}"]
        lines += [f"  {way} failed: {reason}" for way, reason in self.reasons.items()]
        return "\n".join(lines)


def capture(model: nn.Module, example_inputs: Any = None) -> fx.GraphModule:
    """The graph of a model; `capture_of(graph)` tells which way it was taken.

    In this order: `torch.fx.symbolic_trace`, which needs no inputs; `torch.export.export` in
    evaluation mode, without labels and without a cache; `record`, one run. The graph shares the
    model's parameters. The last two bake in evaluation mode. The model is left as it was.

    Args:
        model: any module. A `GraphModule` is returned as it is.
        example_inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
            Not needed for a model that can be traced symbolically, nor for a transformers model with
            text or images as its input: dummies are made from its config.

    Raises:
        CaptureError: no way works; the message has the reason of each.
        TypeError: `example_inputs` is none of these.
    """
    if isinstance(model, fx.GraphModule):
        return model
    inputs = inputs_for(model, example_inputs)
    ways: dict[Way, Callable[[], fx.GraphModule]] = {
        "symbolic_trace": lambda: symbolic(model),
        "export": lambda: _export(model, inputs),
        "record": lambda: record_run(model, _needed(inputs).for_one_pass(model)),
    }
    return first_of(ways, model, inputs)


def capture_of(graph: fx.GraphModule) -> Capture | None:
    """How `capture` came by a graph; None for a graph of other origin."""
    made = graph.meta.get(_KEY)
    return made if isinstance(made, Capture) else None


def inputs_for(model: nn.Module, example_inputs: Any) -> Inputs | None:
    """The inputs given, or dummies; None if there are neither.

    Raises:
        CaptureError: inputs of one batch have different leading sizes.
        TypeError: `example_inputs` is none of the kinds.
    """
    if example_inputs is None:
        return dummy_inputs(model)
    inputs = given_inputs(example_inputs)
    if disagreement := inputs.disagreement(every=False):
        raise CaptureError(
            f"cannot run {type(model).__name__} on these example_inputs: their leading sizes differ: "
            f"{disagreement}; give one row for each example in all of them"
        )
    return inputs


def first_of(
    ways: Mapping[Way, Callable[[], fx.GraphModule]], model: nn.Module, inputs: Inputs | None
) -> fx.GraphModule:
    """The graph by the first way that works, marked with that way.

    Raises:
        CaptureError: none does.
    """
    reasons: dict[str, str] = {}
    for way, take in ways.items():
        try:
            graph = take()
        except Exception as error:
            reasons[way] = _first_line(error)
        else:
            graph.meta[_KEY] = Capture(way=way, reasons=reasons)
            return graph
    failed = [f"  - {way}: {reason}" for way, reason in reasons.items()]
    lines = [f"cannot capture {type(model).__name__}:", *failed, f"fix: {_fix(model, inputs)}"]
    raise CaptureError(*lines)


def symbolic(model: nn.Module) -> fx.GraphModule:
    """`torch.fx.symbolic_trace` in the mode that the model is in."""
    return untouched(model, lambda: fx.symbolic_trace(model), evaluate=False)


def _export(model: nn.Module, inputs: Inputs | None) -> fx.GraphModule:
    run = _needed(inputs).without_labels(model).for_one_pass(model)

    def export() -> nn.Module:
        with _silent():
            return torch.export.export(model, run.args, dict(run.kwargs), strict=False).module()

    graph = untouched(model, export)
    assert isinstance(graph, fx.GraphModule)
    return graph


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """torch.export prints and logs whole graphs when it fails, and here another way follows."""
    before = logging.root.manager.disable
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


def _needed(inputs: Inputs | None) -> Inputs:
    if inputs is None:
        raise CaptureError("it needs inputs, and none were given")
    return inputs


def _first_line(error: Exception) -> str:
    """The kind of an error and its first line; errors of torch.export go on for pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, CaptureError):
        return lines[0]
    return ": ".join([type(error).__name__, *lines[:1]])


def _fix(model: nn.Module, inputs: Inputs | None) -> str:
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        return "the model is on the meta device; load its weights first (to_empty, from_pretrained)"
    if inputs is None:
        return "give example_inputs, the arguments of one forward call (a tensor, a tuple or a mapping)"
    if disagreement := inputs.disagreement(every=True):
        return f"give example_inputs of one batch; their leading sizes differ: {disagreement}"
    return "give example_inputs with which model(...) runs in evaluation mode"
