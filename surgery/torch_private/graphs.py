"""What a `torch.fx` graph is made of: the parts of nodes and tables, and who has which name.

Graph surgery takes back a pass that did not end, and gives nodes their old names when it is undone.
The public ways of torch.fx do neither: `deepcopy` makes other nodes, and a node has no setter for its
name.

`_is_impure = True` in a module class (`surgery/modules/node.py`) is of this kind too: it keeps torch.fx
from taking a call of the module out as dead code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

NODE_FIELDS = (
    "_args", "_erased", "_input_nodes", "_kwargs", "_next", "_prev", "_repr_fn", "_sort_key", "graph",
    "meta", "name", "op", "target", "type", "users",
)  # fmt: skip
"""All attributes of a node: written back, they make it what it was."""

FILLED = ("_input_nodes", "meta", "users")
"""Those of them that are changed in place."""

CLASS_FIELDS = ("forward", "_wrapped_call", "__call__")
"""What `GraphModule.recompile` writes to the class, of which every graph module has its own."""

GUARDS = "_guards_fn"
"""The child of an exported program's module that checks its inputs: a call of it is no operation."""


def tables(graph: fx.Graph) -> tuple[object, object]:
    """The objects beside the nodes that know of them: one has the names, one has the nodes by what they
    call."""
    return graph._graph_namespace, graph._find_nodes_lookup_table


def all_nodes(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """The nodes, and before them the one that holds the two ends of their list together."""
    return graph._root, *graph.nodes


def set_name(node: fx.Node, name: str) -> None:
    """Give a node another name. One that is taken, or was taken before, gets a number."""
    node._rename(name)


def free_name(graph: fx.Graph, name: str) -> None:
    """Mark a name as unused, so that a node may take it."""
    graph._graph_namespace._used_names.discard(name)


def usual_name(graph: fx.Graph, target: Callable[..., Any] | str) -> str:
    """The name that a new node with this target would ask for."""
    return graph._target_to_str(target)
