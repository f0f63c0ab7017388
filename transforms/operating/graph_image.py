"""What graphs are made of, written down so that a pass which does not end can be taken back."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import fx, nn

from surgery.base.journal import Step, content, image
from surgery.torch_private.graphs import CLASS_FIELDS, FILLED, NODE_FIELDS, all_nodes, tables


def image_with_graphs(modules: Iterable[nn.Module]) -> list[Step]:
    """Steps that make modules, and the graphs among them, what they are now: the same nodes with the
    same names, in the same order."""
    modules = list(modules)
    steps = image(modules)
    for module in modules:
        if isinstance(module, fx.GraphModule):
            cls = type(module)
            steps += [
                partial(setattr, cls, name, vars(cls)[name])
                for name in CLASS_FIELDS
                if name in vars(cls)
            ]
            steps += _of_graph(module.graph)
    return steps


def _of_graph(graph: fx.Graph) -> list[Step]:
    steps = content(vars(graph))
    for part in tables(graph):
        steps += content(vars(part))
        for table in vars(part).values():
            steps += _with_tables(table)
    for node in all_nodes(graph):
        for name in NODE_FIELDS:
            value = getattr(node, name)
            # Node's own __setattr__ is Python, and keeps the tables above, which are put back anyway.
            steps.append(partial(object.__setattr__, node, name, value))
            if name in FILLED:
                steps += content(value)
    return steps


def _with_tables(table: Any) -> list[Step]:
    """The content of a dict, and of the dicts in it."""
    steps = content(table)
    for inner in table.values() if isinstance(table, dict) else ():
        steps += content(inner)
    return steps
