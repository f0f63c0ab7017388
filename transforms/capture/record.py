"""Record one run of a model as a graph."""

from __future__ import annotations

import functools
import operator
import re
from collections import OrderedDict
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from surgery.base.journal import restoring
from surgery.torch_private.compiler import has_dynamo
from surgery.torch_private.trees import tree_leaves

from .inputs import Inputs, given_inputs
from .untouched import untouched


def record(model: nn.Module, example_inputs: Any) -> fx.GraphModule:
    """Run a model once, in evaluation mode and without gradients, and return what it called.

    Every model that runs can be recorded, with data-dependent branches, caches and labels: the graph
    is of the branch that these inputs took. It has one node for each torch function called, as the
    model called it (`F.linear`, `Tensor.view`, ...), in `meta["nn_module_stack"]` the modules whose
    forward was running, in `meta["module_input"]` the shape of what the innermost of them got, and in
    `meta["shape"]` the shape of the result. It shares the model's
    parameters and buffers, takes the tensors among the inputs, in order, and returns the tensors in
    the model's output as a tuple. Sizes and numbers that depended on the inputs are constants.

    Args:
        model: any module. It is left as it was: training flags, buffers, attributes, random state.
        example_inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.

    Raises:
        TypeError: `example_inputs` is none of these.
        Exception: whatever the model raises for these inputs.
    """
    return record_run(model, given_inputs(example_inputs))


def record_run(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    """`record` for inputs that have been taken apart."""

    def run() -> fx.GraphModule:
        recorder = _Recorder(model)
        recorder.take(inputs)
        for name, module in model.named_modules():
            _watch(module, name, recorder.stack)
        # The code of compiled modules runs as it is written.
        eager = torch.compiler.set_stance("force_eager") if has_dynamo() else nullcontext()

        def recorded() -> fx.GraphModule:
            with eager, recorder:
                output = model(*inputs.args, **inputs.kwargs)
            return recorder.finish(output)

        return restoring(recorder.stop, recorded)

    return untouched(model, run)


_Running = tuple[str, type, "tuple[int, ...] | None"]
"""A module whose forward is running: its name, its class, and the shape of the first tensor it got."""


def _watch(module: nn.Module, name: str, stack: list[_Running]) -> None:
    """Note in `stack` while the module's forward runs, also if it is called as `module.forward(x)`."""
    forward = module.forward

    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        given = (tuple(one.shape) for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
        stack.append((name, type(module), next(given, None)))
        try:
            return forward(*args, **kwargs)
        finally:
            stack.pop()

    module.__dict__["forward"] = watched


class _Recorder(TorchFunctionMode):
    """Writes each call of a torch function that gives tensors into a graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.stack: list[_Running] = []
        self._stopped = False
        self._graph = fx.Graph()
        self._attributes: dict[str, Any] = {}
        self._type = type(model).__name__
        self._nodes: Any = WeakTensorKeyDictionary()
        """The node whose result a tensor is; weak, so that a run needs no more memory than without."""
        self._names: Any = WeakTensorKeyDictionary()
        """Dotted names of the parameters and buffers."""
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._names[tensor] = name

    def take(self, inputs: Inputs) -> None:
        """A placeholder for every tensor among the inputs."""
        for name, tensor in inputs.tensors():
            self._made(self._graph.placeholder(re.sub(r"\W+", "_", name).strip("_")), tensor)

    def stop(self) -> None:
        """Write nothing any more: an interrupt where torch takes the mode away for a moment makes torch
        put it back, for good."""
        self._stopped = True

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._stopped:
            return result
        if func in _WRITES or any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            node = self._call(func, *fx.node.map_aggregate((args, kwargs), self._argument))
            node.meta["nn_module_stack"] = OrderedDict(
                (name, (name, module_type)) for name, module_type, _ in self.stack
            )
            node.meta["module_input"] = self.stack[-1][2] if self.stack else None
            self._made(node, result)
        return result

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        owner, _, name = getattr(func, "__qualname__", "").rpartition(".")
        if name == "__get__":
            return self._graph.call_function(getattr, (args[0], func.__self__.__name__))
        if owner in ("Tensor", "TensorBase") and hasattr(Tensor, name):
            return self._graph.call_method(name, args, kwargs)
        return self._graph.call_function(func, args, kwargs)

    def _made(self, node: fx.Node, result: Any) -> None:
        """The node stands for its result from now on; its items get nodes of their own."""
        if isinstance(result, Tensor):
            node.meta["shape"] = result.shape
            self._nodes[result] = node
        elif isinstance(result, (tuple, list)):
            for index, item in enumerate(result):
                if any(isinstance(leaf, Tensor) for leaf in tree_leaves(item)):
                    part = self._graph.call_function(operator.getitem, (node, index))
                    part.meta["nn_module_stack"] = node.meta["nn_module_stack"]
                    self._made(part, item)

    def _argument(self, value: Any) -> Any:
        """A value that is no container, as a graph can hold it."""
        if isinstance(value, Tensor):
            return self._nodes[value] if value in self._nodes else self._attribute(value)
        if value is None or value is Ellipsis or isinstance(value, fx.node.base_types):
            return value
        return self._attribute(value)

    def _attribute(self, value: Any) -> fx.Node:
        """A node that reads a parameter, a buffer or a constant."""
        name = self._names.get(value) if isinstance(value, Tensor) else None
        name = name or f"_constant{len(self._attributes)}"
        self._attributes[name] = value
        node = self._graph.get_attr(name)
        if isinstance(value, Tensor):
            self._made(node, value)
        return node

    def finish(self, output: Any) -> fx.GraphModule:
        """The graph, which returns the tensors in the model's output."""
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self._graph.output(tuple(self._argument(tensor) for tensor in tensors))
        recorded = fx.GraphModule(self._attributes, self._graph, self._type)
        recorded.train(False)
        return recorded


_WRITES = (Tensor.__setitem__,)
"""Functions that write into their first argument and return nothing."""
