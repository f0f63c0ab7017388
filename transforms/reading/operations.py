"""The operations of a graph, whatever its dialect: their names, and where a weight sits in each.

`torch.fx.symbolic_trace` writes torch functions, Tensor methods and leaf modules, `torch.export` writes
aten overloads, the recorder writes what it saw. `function_of` gives all of them one name, and
`OPERATIONS` tells for such a name what the arguments mean.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx, nn

from surgery.base.torch_names import name_of, of_two, spelling, writes
from surgery.modules.node import DropConnectNode, Slot
from surgery.moments.torch_functions import ATTRIBUTES, QUERIES
from surgery.torch_private.graphs import GUARDS


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One way in which functions take a weight."""

    name: str
    """The canonical name, as in `Use.op`."""

    functions: tuple[str, ...]
    """Names of the functions, as `function_of` gives them."""

    arguments: tuple[str, ...]
    """Names of the leading arguments, in order."""

    weight: str
    """Name of the argument that is the weight, or the list of them."""

    input: str | None = None
    """Name of the argument that the weight acts on; None if there is none."""

    bias: str | None = None
    """Name of the argument that is added to the result."""

    order: Literal["out_in", "in_out"] | None = None
    """Order of the weight's two feature dimensions as this function takes it; None if it has no such
    order. `out_in` is that of `nn.Linear`. With `"in_out"` the output feature comes last."""

    affine: bool = True
    """Whether the result is linear in the weight, so that "the activation that follows" means
    something."""

    def argument(self, node: fx.Node, name: str | None) -> Any:
        """The argument of that name in a call; None if the call does not give it."""
        slot = self.slot(node, name)
        if slot is None:
            return None
        return node.kwargs[slot] if isinstance(slot, str) else node.args[slot]

    def slot(self, node: fx.Node, name: str | None) -> Slot | None:
        """Where a call has the argument of that name; None if it does not give it."""
        if name is None or name in node.kwargs:
            return name
        position = self.arguments.index(name)
        return position if position < len(node.args) else None


def _family(name: str, functions: str, arguments: str, weight: str, **fields: Any) -> Operation:
    return Operation(
        name=name,
        functions=tuple(functions.split()),
        arguments=tuple(arguments.split()),
        weight=weight,
        **fields,
    )


_CONV: dict[str, Any] = {"weight": "weight", "input": "input", "bias": "bias"}
_RNN: dict[str, Any] = {"weight": "params", "input": "input", "affine": False}
_CELL: dict[str, Any] = {"input": "input", "bias": "b_hh", "affine": False}

OPERATIONS: tuple[Operation, ...] = (
    _family("linear", "linear", "input weight bias", "weight", input="input", bias="bias",
            order="out_in"),
    _family("addmm", "addmm", "input mat1 mat2", "mat2", input="mat1", bias="input",
            order="in_out"),
    _family("addmm", "addmm", "input mat1 mat2", "mat1", input="mat2", bias="input",
            order="out_in"),
    _family("addmm", "baddbmm", "input batch1 batch2", "batch2", input="batch1", bias="input",
            order="in_out"),
    _family("addmm", "baddbmm", "input batch1 batch2", "batch1", input="batch2", bias="input",
            order="out_in"),
    _family("matmul", "matmul mm bmm", "input other", "other", input="input", order="in_out"),
    _family("matmul", "matmul mm bmm mv", "input other", "input", input="other", order="out_in"),
    _family("matmul", "rmatmul", "other input", "other", input="input", order="in_out"),
    _family("matmul", "rmatmul", "other input", "input", input="other", order="out_in"),
    _family("matmul", "einsum", "equation operands", "operands"),
    _family("matmul", "tensordot inner dot", "input other", "other", input="input"),
    _family("matmul", "tensordot inner dot", "input other", "input", input="other"),
    _family("grouped_mm", "grouped_mm grouped_mm_fallback", "input weight", "weight",
            input="input", order="in_out"),
    _family("bilinear", "bilinear", "input1 input2 weight bias", "weight", input="input1",
            bias="bias"),
    _family("conv", "conv1d conv2d conv3d convolution", "input weight bias", order="out_in",
            **_CONV),
    _family("conv", "conv_transpose1d conv_transpose2d conv_transpose3d", "input weight bias",
            order="in_out", **_CONV),
    _family("embedding", "embedding embedding_bag", "input weight", "weight", input="input",
            order="in_out"),
    _family("embedding", "embedding embedding_bag", "weight input", "weight", input="input",
            order="in_out"),
    _family("lstm", "lstm", "input hx params", **_RNN),
    _family("lstm", "lstm", "input batch_sizes hx params", **_RNN),
    _family("gru", "gru", "input hx params", **_RNN),
    _family("gru", "gru", "input batch_sizes hx params", **_RNN),
    _family("rnn", "rnn rnn_tanh rnn_relu", "input hx params", **_RNN),
    _family("rnn", "rnn rnn_tanh rnn_relu", "input batch_sizes hx params", **_RNN),
    _family("lstm_cell", "lstm_cell", "input hx w_ih w_hh b_ih b_hh", "w_hh", **_CELL),
    _family("gru_cell", "gru_cell", "input hx w_ih w_hh b_ih b_hh", "w_hh", **_CELL),
    _family("rnn_cell", "rnn_tanh_cell rnn_relu_cell", "input hx w_ih w_hh b_ih b_hh", "w_hh",
            **_CELL),
    _family("attention", "multi_head_attention_forward native_multi_head_attention",
            "query key value embed_dim num_heads in_proj_weight in_proj_bias", "in_proj_weight",
            input="query", affine=False),
    _family("attention", "scaled_dot_product_attention", "query key value", "key",
            input="query", affine=False),
    _family("norm", "layer_norm group_norm rms_norm", "input shape weight bias", "weight",
            input="input", bias="bias"),
    _family("norm", "batch_norm instance_norm", "input weight bias", "weight", input="input",
            bias="bias"),
    _family("norm", "batch_norm instance_norm", "input mean var weight bias", "weight",
            input="input", bias="bias"),
    _family("scale", "mul", "input other", "other", input="input"),
    _family("scale", "mul", "input other", "input", input="other"),
    _family("add", "add sub", "input other", "other", input="input"),
    _family("add", "add sub", "input other", "input", input="other"),
    _family("prelu", "prelu", "input weight", "weight", input="input", affine=False),
    _family("cat", "cat stack", "tensors", "tensors", affine=False),
)  # fmt: skip
"""Every way of taking a weight that has a name. Where two rows have a function, the weight's place in
the call tells which one holds."""

OTHER = Operation(name="other", functions=(), arguments=("input",), weight="input", affine=False)
"""What any other function does with a parameter."""


def operations(function: str) -> tuple[Operation, ...]:
    """The rows of the table for a function; `OTHER` alone if there is none."""
    return tuple(op for op in OPERATIONS if function in op.functions) or (OTHER,)


def operation(node: fx.Node, root: nn.Module, holds: Callable[[Any], bool]) -> Operation:
    """What a node does with a weight. `holds` tells whether an argument is (or lists) that weight; if
    the weight is none of the arguments that the table calls so (a bias), the first row is given."""
    rows = operations(function_of(node, root))
    return next((op for op in rows if holds(op.argument(node, op.weight))), rows[0])


INSPECTING = QUERIES | ATTRIBUTES | {"guards_fn", "output"}
"""Names of nodes that do not depend on the values that they are given."""


def function_of(node: fx.Node, root: nn.Module) -> str:
    """The name of what a node calls, the same in every dialect: see `surgery.base.torch_names`. A leaf
    module has the name of its function, `getattr(x, "T")` that of the attribute, and a node that calls
    nothing that of its `op`.

    Args:
        node: of a graph of `root`.
        root: the module whose submodules the node may call.
    """
    if node.op == "call_module":
        return _function_of_module(str(node.target), root)
    if node.op not in ("call_function", "call_method"):
        return node.op
    if node.target is builtins.getattr:
        return str(node.args[1])
    return of_two(name_of(node.target), node.args)


def _function_of_module(path: str, root: nn.Module) -> str:
    if path == GUARDS:
        return "guards_fn"
    module = root.get_submodule(path)
    if isinstance(module, DropConnectNode):
        return "dropconnect" if module.call is None else module.call.function
    return name_of(module)


def in_place(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node writes its result into its first argument."""
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    return writes(spelling(node.target)) or node.kwargs.get("inplace") is True


def leaves(argument: Any) -> list[fx.Node]:
    """The nodes in an argument, also in lists, tuples, dicts and slices."""
    found: list[fx.Node] = []
    fx.map_arg(argument, found.append)
    return found


def submodule(root: nn.Module, path: str) -> nn.Module | None:
    """The module of this dotted name; None if there is none."""
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None
