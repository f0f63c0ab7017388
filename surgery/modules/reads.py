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
        return any(_reads(chain, path) for chain in self.chains if len(chain) >= len(path))


def _reads(chain: tuple[str, ...], path: tuple[str, ...]) -> bool:
    if _METADATA.intersection(chain[len(path) : len(path) + 1]):
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
        if isinstance(function, property):
            function = function.fget
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


Chain = tuple[str, ...]


class _Visitor(ast.NodeVisitor):
    def __init__(self, self_name: str) -> None:
        self.chains: set[Chain] = set()
        self.aliases: dict[str, set[Chain]] = {self_name: {()}}
        """What a local name may stand for; order of execution is not looked at."""
        self.computed = False

    def chains_of(self, node: ast.expr) -> set[Chain]:
        """The chains that an expression such as `self.a[i].b` may be; empty if none starts at self."""
        match node:
            case ast.Name(id=name):
                return self.aliases.get(name, set())
            case ast.Attribute(value=owner, attr=name):
                return {(*chain, name) for chain in self.chains_of(owner)}
            case ast.Subscript(value=owner, slice=index):
                return {_item(chain, index) for chain in self.chains_of(owner) if chain}
            case ast.IfExp(body=one, orelse=other):
                return self.chains_of(one) | self.chains_of(other)
            case ast.NamedExpr(value=value):
                return self.chains_of(value)
            case ast.Call(
                func=ast.Name(id="getattr"), args=[owner, ast.Constant(value=str(name)), *_]
            ):
                return {(*chain, name) for chain in self.chains_of(owner)}
            case ast.Call(
                func=ast.Attribute(value=owner, attr="get_submodule" | "get_parameter"),
                args=[ast.Constant(value=str(path))],
            ):
                return {(*chain, *path.split(".")) for chain in self.chains_of(owner)}
            case _:
                return set()

    def visit(self, node: ast.AST) -> None:
        """Record the longest chains; what is inside one is not looked at again, but for indices."""
        found: set[Chain] = set()
        if isinstance(node, ast.expr) and not isinstance(getattr(node, "ctx", None), ast.Store):
            found = {chain for chain in self.chains_of(node) if chain}
        self.chains |= found
        if found and isinstance(node, (ast.Attribute, ast.Name)):
            if isinstance(node, ast.Attribute) and not isinstance(
                node.value, (ast.Attribute, ast.Name)
            ):
                self.visit(node.value)
            return
        super().visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._assign(target, node.value)
        self.generic_visit(node)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self._assign(node.target, node.value)
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

    def visit_Compare(self, node: ast.Compare) -> None:
        """`self.bias is None` asks for no value."""
        if all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
            self._ask(node.left, *node.comparators)
        else:
            self.generic_visit(node)

    def _ask(self, *parts: ast.expr) -> None:
        """What looks at objects and not at their values."""
        for part in parts:
            if not isinstance(part, (ast.Attribute, ast.Name)):
                self.visit(part)

    def visit_Call(self, node: ast.Call) -> None:
        match node.func:
            case ast.Name(id="isinstance" | "hasattr" | "type"):
                self._ask(*node.args)
                return
            case ast.Name(id="getattr") if not self.chains_of(node):
                self.computed = True
            case ast.Name(id="vars"):
                self.computed = True
            case ast.Attribute(value=owner, attr="parameters" | "named_parameters"):
                self.computed = self.computed or bool(self.chains_of(owner))
        self.generic_visit(node)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        """Alias `a` in `a = self.b`, and each name in `a, b = self.c, self.d`."""
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for part, source in zip(target.elts, value.elts):
                self._assign(part, source)
        elif isinstance(target, ast.Name):
            self._alias(target.id, self.chains_of(value))

    def _bind(self, target: ast.expr, iterable: ast.expr) -> None:
        """Alias the names of a loop over something of self, also inside zip, enumerate, ..."""
        if isinstance(iterable, ast.Call):
            for part, source in _loops(target, iterable):
                self._bind(part, source)
        elif isinstance(iterable, (ast.Tuple, ast.List)):
            for source in iterable.elts:
                self._assign(target, source)
        elif isinstance(target, ast.Name):
            items = {(*chain, ANY) for chain in self.chains_of(iterable) if chain}
            self._alias(target.id, items)

    def _alias(self, name: str, chains: set[Chain]) -> None:
        found = {chain for chain in chains if chain}
        if found:
            self.aliases.setdefault(name, set()).update(found)


def _item(chain: Chain, index: ast.expr) -> Chain:
    """The chain of `<chain>[index]`; `self._modules["fc"]` is `self.fc`."""
    fixed = index.value if isinstance(index, ast.Constant) else None
    if isinstance(fixed, str):
        return (*chain[:-1], fixed) if chain[-1] in _TABLES else (*chain, fixed)
    return (*chain, str(fixed) if isinstance(fixed, int) and fixed >= 0 else ANY)


_TABLES = ("_modules", "_parameters")
