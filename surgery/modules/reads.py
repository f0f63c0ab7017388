"""Which parameters a module's forward reads, found in its source.

Some modules read the weights of their children instead of calling them: `nn.MultiheadAttention` uses
`self.out_proj.weight`, Mamba's mixer `self.dt_proj.weight`. A mask that is drawn in the child's
forward would then silently never act. The source of the class tells: `reads(cls)` lists the attribute
chains that start at `self` in `forward` and in every method it mentions.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..caching import cached

_METADATA = frozenset(
    {
        "data_ptr",
        "device",
        "dim",
        "dtype",
        "is_meta",
        "ndim",
        "numel",
        "requires_grad",
        "shape",
        "size",
    }
)
"""Attributes of a tensor that do not depend on its values: reading them is not reading the weight."""

_ONLY_INSPECTS: tuple[type[nn.Module], ...] = (nn.TransformerEncoder,)
"""Classes that look at their children's weights (to choose a path) but always call the children."""

ANY = "*"
"""Component of a chain that stands for any index: `self.experts[i].weight`."""


@dataclass(frozen=True)
class Reads:
    """What the forward of a class reads of `self`."""

    chains: frozenset[tuple[str, ...]]
    complete: bool
    """False if the source is missing, or reads attributes whose names are computed."""

    def reads(self, path: tuple[str, ...]) -> bool:
        """Whether a chain reads the value found at `path`."""
        return any(_reads(chain, path) for chain in self.chains)


def _reads(chain: tuple[str, ...], path: tuple[str, ...]) -> bool:
    if len(chain) < len(path) or _METADATA.intersection(chain[len(path) : len(path) + 1]):
        return False
    return all(have in (want, ANY) for have, want in zip(chain, path))


@cached
def reads(cls: type[nn.Module]) -> Reads:
    """The chains that `cls.forward`, and the methods it mentions, read from `self`."""
    if issubclass(cls, _ONLY_INSPECTS):
        return Reads(frozenset(), complete=True)
    chains: set[tuple[str, ...]] = set()
    complete = True
    todo, done = ["forward"], set[str]()
    while todo:
        name = todo.pop()
        done.add(name)
        for function in _methods(cls, name):
            visitor = _visit(function)
            if visitor is None:
                complete = False
                continue
            complete = complete and not visitor.computed
            chains |= visitor.chains
            todo += [chain[0] for chain in visitor.chains if chain[0] not in done]
    return Reads(frozenset(chains), complete)


def _methods(cls: type, name: str) -> list[Callable[..., Any]]:
    """Every definition of a method in the class and its parents (for `super()`), nn.Module's not."""
    found = []
    for base in cls.__mro__:
        if base in (nn.Module, object):
            continue
        function = base.__dict__.get(name)
        if inspect.isfunction(function):
            found.append(inspect.unwrap(function))
    return found


@cached
def _visit(function: Callable[..., Any]) -> _Visitor | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or not definition.args.args:
        return None
    visitor = _Visitor(definition.args.args[0].arg)
    visitor.visit(definition)
    return visitor


_Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


def _loops(target: ast.expr, call: ast.Call) -> list[tuple[ast.expr, ast.expr]]:
    """(loop variable, what it runs over) pairs of `for target in call(...)`."""
    names = target.elts if isinstance(target, ast.Tuple) else [target]
    match call.func:
        case ast.Name(id="reversed" | "list" | "tuple" | "iter") if call.args:
            return [(target, call.args[0])]
        case ast.Name(id="enumerate") if call.args:
            return [(names[-1], call.args[0])]
        case ast.Name(id="zip"):
            return list(zip(names, call.args))
        case ast.Attribute(value=owner, attr="values" | "items"):
            return [(names[-1], owner)]
        case _:
            return []


class _Visitor(ast.NodeVisitor):
    def __init__(self, self_name: str) -> None:
        self.self_name = self_name
        self.chains: set[tuple[str, ...]] = set()
        self.aliases: dict[str, tuple[str, ...]] = {}
        self.computed = False

    def chain(self, node: ast.expr) -> tuple[str, ...] | None:
        """The chain of an expression such as `self.a[i].b`, or None if it does not start at self."""
        if isinstance(node, ast.Name):
            return () if node.id == self.self_name else self.aliases.get(node.id)
        if isinstance(node, ast.Attribute):
            base = self.chain(node.value)
            return None if base is None else (*base, node.attr)
        if isinstance(node, ast.Subscript):
            base = self.chain(node.value)
            if not base:
                return None
            index = node.slice
            fixed = isinstance(index, ast.Constant) and isinstance(index.value, int)
            return (*base, str(index.value) if fixed else ANY)  # type: ignore[attr-defined]
        return None

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._expression(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self._expression(node)
        self.visit(node.slice)

    def _expression(self, node: ast.Attribute | ast.Subscript) -> None:
        chain = self.chain(node)
        if chain:
            self.chains.add(chain)
        else:
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        chain = self.chain(node.value)
        if chain and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            self.aliases[node.targets[0].id] = chain
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self._bind(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._bind(node.target, node.iter)
        self.generic_visit(node)

    def _comprehension(self, node: _Comprehension) -> None:
        """The loops first: they bind the names that the element reads."""
        for loop in node.generators:
            self.visit(loop)
        self.generic_visit(node)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension

    def _bind(self, target: ast.expr, iterable: ast.expr) -> None:
        """Alias the names of a loop over something of self, also inside zip, enumerate, ..."""
        if isinstance(iterable, ast.Call):
            for part, source in _loops(target, iterable):
                self._bind(part, source)
            return
        chain = self.chain(iterable)
        if chain and isinstance(target, ast.Name):
            self.aliases[target.id] = (*chain, ANY)

    def visit_Call(self, node: ast.Call) -> None:
        named = node.func.id if isinstance(node.func, ast.Name) else None
        if named in ("getattr", "vars") or self._lists_parameters(node.func):
            self.computed = True
        self.generic_visit(node)

    def _lists_parameters(self, function: ast.expr) -> bool:
        chain = self.chain(function)
        return bool(chain) and chain[-1] in ("parameters", "named_parameters")  # type: ignore[index]
