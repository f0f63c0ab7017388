"""The table of operations: one name in every dialect, and where the weight sits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from surgery.transforms.capture.record import record
from surgery.transforms.reading.operations import (
    OTHER,
    function_of,
    in_place,
    leaves,
    operation,
    operations,
)

aten = torch.ops.aten


class Uses(nn.Module):
    """One function of an input and a weight."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.w, self.function = nn.Parameter(torch.randn(shape)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w)


def node_of(graph: fx.GraphModule) -> tuple[fx.Node, fx.Node]:
    """The node that reads the weight, and the node of the weight."""
    (weight,) = graph.graph.find_nodes(op="get_attr", target="w")
    (user,) = weight.users
    return user, weight


X = (2, 4)
PRODUCTS: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], str, str | None]] = {
    "F.linear": (F.linear, X, (3, 4), "linear", "out_in"),
    "F.linear by keyword": (lambda x, w: F.linear(x, weight=w), X, (3, 4), "linear", "out_in"),
    "aten.linear": (aten.linear.default, X, (3, 4), "linear", "out_in"),
    "torch.addmm": (lambda x, w: torch.addmm(x.sum(), x, w), X, (4, 3), "addmm", "in_out"),
    "Tensor.addmm": (lambda x, w: x.sum().addmm(x, w), X, (4, 3), "addmm", "in_out"),
    "aten.addmm": (lambda x, w: aten.addmm(x.sum(), x, w), X, (4, 3), "addmm", "in_out"),
    "torch.addmm, left": (lambda x, w: torch.addmm(x.sum(), w, x), X, (3, 2), "addmm", "out_in"),
    "@": (lambda x, w: x @ w, X, (4, 3), "matmul", "in_out"),
    "@, left": (lambda x, w: w @ x, X, (3, 2), "matmul", "out_in"),
    "Tensor.__rmatmul__": (lambda x, w: w.__rmatmul__(x), X, (4, 3), "matmul", "in_out"),
    "torch.matmul": (torch.matmul, X, (4, 3), "matmul", "in_out"),
    "torch.mm": (torch.mm, X, (4, 3), "matmul", "in_out"),
    "aten.mm": (aten.mm.default, X, (4, 3), "matmul", "in_out"),
    "torch.bmm": (torch.bmm, (3, 2, 4), (3, 4, 5), "matmul", "in_out"),
    "torch.mv": (lambda x, w: torch.mv(w, x), (4,), (3, 4), "matmul", "out_in"),
    "F.conv1d": (F.conv1d, (2, 4, 8), (3, 4, 3), "conv", "out_in"),
    "aten.conv2d": (aten.conv2d.default, (2, 4, 8, 8), (3, 4, 3, 3), "conv", "out_in"),
    "F.conv_transpose1d": (F.conv_transpose1d, (2, 4, 8), (4, 3, 3), "conv", "in_out"),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_where_input_and_weight_sit(name: str) -> None:
    function, shape, weight_shape, op, layout = PRODUCTS[name]
    graph = record(Uses(function, *weight_shape), torch.randn(shape))
    node, weight = node_of(graph)
    found = operation(node, graph, lambda argument: weight in leaves(argument))
    assert (found.name, found.order, found.affine) == (op, layout, True)
    assert found.argument(node, found.weight) is weight
    assert found.argument(node, found.input).op == "placeholder"
    bias = found.argument(node, found.bias)
    assert (bias is not None) == ("addmm" in name)
    output = node.meta["shape"]
    rows_last = op == "matmul" or op == "addmm"
    axis = {"out_in": -2, "in_out": -1}[layout] if rows_last else 1
    if op != "linear" and len(output) > 1:
        size = (
            weight_shape[{"out_in": 0, "in_out": 1}[layout]] if op == "conv" else weight_shape[axis]
        )
        assert output[axis] == size


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.Linear(4, 4), "linear"),
        (nn.ReLU(), "relu"),
        (nn.GELU(), "gelu"),
        (nn.Dropout(), "dropout"),
        (nn.Identity(), "identity"),
        (nn.Flatten(), "flatten"),
        (nn.SiLU(), "silu"),
        (nn.Softmax(-1), "softmax"),
        (nn.LayerNorm(4), "layer_norm"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_module_has_the_name_of_its_function(module: nn.Module, name: str) -> None:
    symbolic = fx.symbolic_trace(nn.Sequential(module))
    (node,) = symbolic.graph.find_nodes(op="call_module", target="0")
    assert function_of(node, symbolic) == name


SPELLINGS: dict[str, list[Callable[[Tensor], Any]]] = {
    "add": [
        lambda x: x + 1, lambda x: 1 + x, lambda x: x.add(1), lambda x: torch.add(x, 1),
        lambda x: aten.add.Tensor(x, 1), lambda x: x.clone().add_(1), lambda x: x.__iadd__(1),
    ],
    "mul": [lambda x: x * 2, lambda x: 2 * x, lambda x: torch.multiply(x, 2), lambda x: x.mul_(2)],
    "div": [lambda x: x / 2, lambda x: torch.true_divide(x, 2), lambda x: x.divide(2)],
    "relu": [F.relu, torch.relu, lambda x: x.relu(), lambda x: F.relu_(x), aten.relu.default],
    "silu": [F.silu, aten.silu.default, lambda x: aten.silu(x)],
    "softmax": [lambda x: x.softmax(-1), lambda x: F.softmax(x, -1), lambda x: aten.softmax.int(x, -1),
                lambda x: aten._softmax.default(x, -1, False)],
    "T": [lambda x: x.T],
    "clamp": [lambda x: x.clamp(0), lambda x: torch.clip(x, 0)],
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_one_name_for_every_spelling(name: str) -> None:
    class Call(nn.Module):
        def __init__(self, function: Callable[[Tensor], Any]) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: Tensor) -> Any:
            return self.function(x)

    for function in SPELLINGS[name]:
        for graph in (record(Call(function), torch.ones(2, 2)), fx.symbolic_trace(Call(function))):
            last = graph.graph.output_node().all_input_nodes[0]
            assert function_of(last, graph) == name


@pytest.mark.parametrize(
    ("function", "writes"),
    [
        (lambda x: x.relu_(), True),
        (lambda x: F.relu(x, inplace=True), True),
        (lambda x: x.__iadd__(1), True),
        (lambda x: x + 1, False),
        (lambda x: x.relu(), False),
    ],
)
def test_what_writes_in_place(function: Callable[[Tensor], Tensor], writes: bool) -> None:
    graph = record(Uses(lambda x, w: function(x), 1), torch.ones(2, 2))
    (last,) = graph.graph.output_node().all_input_nodes
    assert in_place(last, graph) is writes


def test_a_function_that_is_not_in_the_table() -> None:
    assert operations("exp") == (OTHER,)
    assert [op.name for op in operations("lstm")] == ["lstm", "lstm"]
