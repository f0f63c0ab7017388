"""Put DropConnect nodes into graphs.

A parameter `fc.weight` that nodes read becomes `fc.weight_raw`, and beside it lies the module
`fc.weight_dropconnect`. Its node, `dropconnect_fc`,

* replaces the operation, if one matrix product is all that reads the weight, and has its arguments:
  `linear(x, w, b)` becomes `dropconnect_fc(x, w_raw, b)`; or else
* stands between the weight and all its readers: `conv2d(x, dropconnect_fc, b)`. Other `get_attr` nodes
  of the same parameter in that graph get a node that passes on the one mask.

A node that calls an operated module only gets a new name, `dropconnect_fc1`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from surgery.modules import DropConnectModule, SiteState
from surgery.modules.node import Call, DropConnectNode, Settle
from surgery.modules.places import states_of
from surgery.planning.graphs import Nodes
from surgery.spec.plan import join
from surgery.torch_private.graphs import set_name

from ..reading.uses import ParameterNode
from .model_graphs import ModelGraphs

SETTLE = "dropconnect_settle"
"""Name of the module, at the root of a graph, that makes plain tensors of what the graph returns."""

NAME = "dropconnect_name"
"""Key of `Node.meta`: the name that a node had before."""

States = dict[tuple[int, str], SiteState]
"""By the owner's id and the parameter's plain name."""


def insert(
    model_graphs: ModelGraphs,
    sites: Sequence[tuple[nn.Module, Mapping[str, SiteState]]],
    nodes: Nodes,
) -> list[PassResult]:
    """Put in the nodes of every site; one result for each graph."""
    states = {(id(owner), name): state for owner, named in sites for name, state in named.items()}
    inserter = _Inserter(model_graphs, states, nodes)
    inserter.run()
    results = []
    for graph_module in model_graphs.graphs:
        changed = graph_module in inserter.changed
        changed |= _name_calls(graph_module)
        changed |= _settle(graph_module)
        results.append(finish(graph_module, changed))
    return results


class _Inserter:
    def __init__(self, model_graphs: ModelGraphs, states: States, nodes: Nodes) -> None:
        self.model_graphs, self.states, self.nodes = model_graphs, states, nodes
        self.changed: dict[fx.GraphModule, None] = {}
        self.done = set[tuple[int, str]]()

    def run(self) -> None:
        groups = [
            [read for read in reads if read.key in self.states]
            for reads in self.model_graphs.reads.values()
        ]
        for (read,) in (mine for mine in groups if len(mine) == 1):
            replaced = self.model_graphs.replaced(read.owner, read.name)
            if replaced is not None:
                self._replace(replaced.read, replaced.node, replaced.call)
        for mine in groups:
            left = [read for read in mine if read.key not in self.done]
            for graph_module in dict.fromkeys(read.graph_module for read in left):
                self._mask([read for read in left if read.graph_module is graph_module])
        for read in chain.from_iterable(groups):
            retarget(read.node, join(read.path, self.states[read.key].raw))

    def _replace(self, read: ParameterNode, node: fx.Node, call: Call) -> None:
        """Let the node that computes become the DropConnect node, in its place."""
        states = {read.name: self.states[read.key]}
        kwargs = self._anchor_before(node, read, "anchor")
        bias = combined_bias(self.model_graphs, read.owner, read.name)
        if bias is not None and bias.key in self.states:
            states[bias.name] = self.states[bias.key]
            kwargs |= self._anchor_before(node, bias, "bias_anchor")
            self.done.add(bias.key)
        self.done.add(read.key)
        target = self._register(read, states, call)
        node.op, node.target = "call_module", target
        node.kwargs = {**node.kwargs, **kwargs}
        rename(node, node_name(read))
        self.changed[read.graph_module] = None

    def _mask(self, reads: list[ParameterNode]) -> None:
        """Put the node between a weight and its readers; between its other names and theirs, nodes
        that hand on the same masked weight."""
        graph = reads[0].graph_module.graph
        order = {node: i for i, node in enumerate(graph.nodes)}
        (last,) = graph.find_nodes(op="output")
        first = {r: min(r.node.users, key=order.__getitem__, default=last) for r in reads}
        primary: fx.Node | None = None
        for read in sorted(reads, key=lambda read: order[first[read]]):
            target = self._register(read, {read.name: self.states[read.key]}, None)
            known = () if primary is None else (primary,)
            kwargs = {} if known else self._anchor_before(first[read], read, "anchor")
            with graph.inserting_before(first[read]):
                args = (read.node, *known)
                node = graph.create_node("call_module", target, args, kwargs, name=node_name(read))
            node.meta = {k: v for k, v in read.node.meta.items() if k != NAME}
            for user in [user for user in read.node.users if user is not node]:
                user.replace_input_with(read.node, node)
            primary = node if primary is None else primary
        self.changed[reads[0].graph_module] = None

    def _anchor_before(self, node: fx.Node, read: ParameterNode, keyword: str) -> dict[str, Any]:
        anchor = self.states[read.key].anchor
        if anchor is None:
            return {}
        graph = read.graph_module.graph
        with graph.inserting_before(node):
            return {keyword: graph.create_node("get_attr", join(read.path, anchor))}

    def _register(
        self, read: ParameterNode, states: dict[str, SiteState], call: Call | None
    ) -> str:
        """The module of a site, beside its parameter; its dotted name."""
        name = node_module(read.name)
        if name not in read.owner._modules:
            module = self.nodes.get(read.key)
            if module is None:
                module = DropConnectNode(states, call)
                module.training = read.owner.training
            read.owner.add_module(name, module)
        return join(read.path, name)


def _name_calls(graph_module: fx.GraphModule) -> bool:
    """Let nodes that call operated modules show it."""
    changed = False
    for node in graph_module.graph.find_nodes(op="call_module"):
        module = graph_module.get_submodule(str(node.target))
        if not isinstance(module, DropConnectModule) or NAME in node.meta:
            continue
        if module._dropconnect or module._dropconnect_draws:
            rename(node, f"dropconnect_{node.name}")
            changed = True
    return changed


def _settle(graph_module: fx.GraphModule) -> bool:
    """Let the graph return plain tensors where a site may return a mean with its variance."""
    states = [state for state in called_states(graph_module) if state.product is not None]
    for state in states:
        state.settled = True
    (output,) = graph_module.graph.find_nodes(op="output")
    if not states or SETTLE in graph_module._modules:
        return False
    graph_module.add_module(SETTLE, Settle().train(graph_module.training))
    with graph_module.graph.inserting_before(output):
        node = graph_module.graph.create_node("call_module", SETTLE, output.args)
    output.args = (node,)
    return True


def called_states(graph_module: fx.GraphModule) -> Iterator[SiteState]:
    """The sites in modules that a graph calls, but not those of another graph."""
    for node in graph_module.graph.find_nodes(op="call_module"):
        module = graph_module.get_submodule(str(node.target))
        if isinstance(module, DropConnectNode):
            yield from module.states.values()
        elif not isinstance(module, fx.GraphModule):
            for part in module.modules():
                yield from states_of(part).values()


def finish(graph_module: fx.GraphModule, changed: bool) -> PassResult:
    """Check and recompile a graph, if a pass has changed it."""
    if changed:
        graph_module.graph.lint()
        graph_module.recompile()
    return PassResult(graph_module, changed)


def combined_bias(model_graphs: ModelGraphs, owner: nn.Module, name: str) -> ParameterNode | None:
    """The bias that the node which replaces a weight's product can drop too: nothing else reads it."""
    replaced, role = model_graphs.replaced(owner, name), model_graphs.role(owner, name)
    if replaced is None or replaced.call.bias is None or role.bias is None:
        return None
    reads = model_graphs.of(owner, role.bias)
    alone = len(reads) == 1 and list(reads[0].node.users) == [replaced.node]
    return reads[0] if alone else None


def node_module(name: str) -> str:
    """Name of the module of a site, beside its parameter."""
    return f"{name}_dropconnect"


def node_name(read: ParameterNode) -> str:
    """`dropconnect_fc` for `fc.weight`, `dropconnect_lstm_weight_hh_l0` for other names."""
    path = read.path if read.name == "weight" and read.path else join(read.path, read.name)
    return "dropconnect_" + path.replace(".", "_")


def rename(node: fx.Node, name: str) -> None:
    """Give a node another name, and note the one it had."""
    node.meta[NAME] = node.meta.get(NAME, node.name)
    set_name(node, name)


def retarget(node: fx.Node, target: str) -> None:
    """Let a `get_attr` node read under the raw name. Its own name goes along if it is the usual one."""
    if node.name == str(node.target).replace(".", "_"):
        rename(node, target.replace(".", "_"))
    node.target = target
