"""Canaries of what a graph of torch.fx is made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from surgery.base.journal import at_once
from surgery.torch_private import graphs
from surgery.transforms.operating.graph_image import image_with_graphs

from .canary import canary


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.unused = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(x)) + x


def _traced() -> fx.GraphModule:
    return fx.symbolic_trace(Net())


@canary(graphs, *(f"torch.fx.Node.{name}" for name in graphs.NODE_FIELDS))
def test_these_are_all_attributes_of_a_node() -> None:
    """What is set by them is all that a node has: in its `__dict__`, and in the C part of it."""
    node = next(iter(_traced().graph.nodes))
    ours = set(graphs.NODE_FIELDS)
    assert set(vars(node)) <= ours, "torch keeps more in a node"
    members = {
        name
        for cls in type(node).__mro__
        for name, value in vars(cls).items()
        if type(value).__name__ in ("member_descriptor", "getset_descriptor")
        and not name.startswith("__")
    }
    assert members <= ours, "torch keeps more in a node"
    assert all(hasattr(node, name) for name in ours)


@canary(
    graphs,
    "torch.fx.Node._prev",
    "_next",
    "_erased",
    "_sort_key",
    "_input_nodes",
    "_args",
    "_kwargs",
    "_repr_fn",
)
def test_fields_written_back_undo_an_edit() -> None:
    traced = _traced()
    graph, before, names = traced.graph, traced.code, [node.name for node in traced.graph.nodes]
    put_back = at_once(image_with_graphs([traced]))
    (relu,) = graph.find_nodes(op="call_function", target=F.relu)
    with graph.inserting_before(relu):
        new = graph.call_function(torch.sin, relu.args)
    relu.replace_all_uses_with(new)
    graph.erase_node(relu)
    traced.recompile()
    put_back()
    graph.lint()
    assert graph.find_nodes(op="call_function", target=F.relu) == [relu]
    assert not graph.find_nodes(op="call_function", target=torch.sin)
    assert [node.name for node in graph.nodes] == names
    traced.recompile()
    assert traced.code == before


@canary(graphs, "torch.fx.Graph._root")
def test_the_root_is_between_the_ends() -> None:
    graph = _traced().graph
    root, *nodes = graphs.all_nodes(graph)
    assert nodes == list(graph.nodes)
    assert root not in nodes
    assert root._next is nodes[0]
    assert root._prev is nodes[-1]


@canary(graphs, "torch.fx.Graph._graph_namespace", "torch.fx.Graph._find_nodes_lookup_table")
def test_tables_of_a_graph() -> None:
    """What one of them does not know, has no name, or is not found."""
    graph = _traced().graph
    names, lookup = graphs.tables(graph)
    assert vars(graph).keys() >= {"_graph_namespace", "_find_nodes_lookup_table"}
    assert all(isinstance(vars(one), dict) for one in (names, lookup))
    (relu,) = graph.find_nodes(op="call_function", target=F.relu)
    held = [table for table in vars(lookup).values() if isinstance(table, dict)]
    assert any(relu in nodes for table in held for nodes in table.values())
    held = [table for table in vars(names).values() if isinstance(table, dict)]
    assert any(relu in table for table in held)


@canary(graphs, "torch.fx.Node._rename", "torch.fx.graph._Namespace._used_names")
def test_names_are_given_once_and_free_again() -> None:
    graph = _traced().graph
    node = next(node for node in graph.nodes if node.op == "call_module")
    graphs.set_name(node, "other")
    assert node.name == "other"
    graphs.set_name(node, "fc")
    assert node.name == "fc_1"  # since it was taken
    graphs.free_name(graph, "fc")
    graphs.set_name(node, "fc")
    assert node.name == "fc"
    graphs.set_name(node, "relu")
    assert node.name == "relu_1"


@canary(graphs, "torch.fx.Graph._target_to_str")
@pytest.mark.parametrize(
    "target", [F.linear, torch.matmul, torch.ops.aten.addmm.default, torch.Tensor.add]
)
def test_the_usual_name_of_a_new_node(target: Any) -> None:
    graph = fx.Graph()
    usual = graphs.usual_name(graph, target)
    assert graph.call_function(target).name == usual.replace(".", "_")
    assert graphs.usual_name(graph, "addmm") == "addmm"


@canary(graphs, "torch.fx.GraphModule._wrapped_call")
def test_recompiling_writes_these_to_the_class() -> None:
    """And a call goes by them."""
    traced = _traced()
    cls = type(traced)
    assert all(name in vars(cls) for name in graphs.CLASS_FIELDS)
    before = dict(vars(cls))
    traced.graph.owning_module = traced
    traced.recompile()
    changed = {name for name, value in vars(cls).items() if before.get(name) is not value}
    assert changed <= set(graphs.CLASS_FIELDS)


@canary(graphs, "torch.fx: _is_impure")
def test_an_impure_module_is_no_dead_code() -> None:
    for impure in (True, False):
        net = Net()
        net.fc = type("Marked", (nn.Linear,), {"_is_impure": impure})(2, 2)
        graph = fx.Graph()
        graph.call_module("fc", (graph.placeholder("x"),))
        graph.output(None)
        traced = fx.GraphModule(net, graph)
        traced.graph.eliminate_dead_code()
        assert len(traced.graph.find_nodes(op="call_module")) == impure


@canary(graphs, "torch.export: _guards_fn")
def test_exported_programs_check_their_inputs_by_this_name() -> None:
    """From torch 2.10 on; before, there is none."""
    batch = torch.export.Dim("batch", min=2, max=9)
    program = torch.export.export(Net().eval(), (torch.ones(3, 2),), dynamic_shapes=({0: batch},))
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    called = {str(node.target) for node in module.graph.find_nodes(op="call_module")}
    assert called <= {graphs.GUARDS}
