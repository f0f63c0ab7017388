"""What one function does with `self`, and with what it finds there, as its source tells."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from types import CodeType
from typing import Any, NamedTuple

from ..base.caching import cached_weakly
from .expressions import AttributeChain, Bindings, Call, Given, Visitor, uses_value


class Source(NamedTuple):
    """What a function reads and passes on."""

    chains: frozenset[AttributeChain]
    calls: tuple[Call, ...]
    methods: frozenset[AttributeChain]
    """Methods of children that it calls, other than the forward."""
    computed: bool
    """Whether it reads attributes whose names are computed."""


@cached_weakly
def source_of(function: Callable[..., Any], bindings: Bindings) -> Source | None:
    """What a function does with what its arguments stand for; None if it has no source."""
    definition = _definition(function)
    if definition is None:
        return None
    visitor = Visitor(function, bindings)
    visitor.look_at(definition)
    chains, methods = frozenset(visitor.chains), frozenset(visitor.methods)
    return Source(chains, tuple(visitor.calls), methods, visitor.computed)


def bound(function: Callable[..., Any], given: Given) -> Bindings:
    """What the arguments of a function stand for in a call that is given these."""
    definition = _definition(function)
    if definition is None:
        return frozenset()
    names = [one.arg for one in (*definition.args.posonlyargs, *definition.args.args)]
    found = []
    for key, chain in given:
        if isinstance(key, str):
            found.append((key, chain))
        elif key < len(names):
            found.append((names[key], chain))
    return frozenset(found)


@functools.lru_cache(maxsize=1024)
def line_uses_value(code: CodeType, line: int, name: str) -> bool:
    """Whether a line that reads a parameter uses its value, and not only its form; True if there is no
    source.

    Args:
        code: the function that the line is part of.
        line: its number in the file.
        name: of the parameter. The line has `<anything>.name` or `getattr(<anything>, "name")`. Where
            it only gives that to a local name, the uses of the local name count.
    """
    parsed = _parsed(code)
    if parsed is None:
        return True
    tree, first = parsed
    here = line - max(first, 1) + 1
    starts = {node for node in ast.walk(tree) if _is_at_line(node, here) and _names(node, name)}
    visitor = Visitor(None, frozenset(), {node: (name,) for node in starts})
    visitor.look_at(tree)
    return not starts or any(uses_value(chain[1:]) for chain in visitor.chains)


def _is_at_line(node: ast.AST, line: int) -> bool:
    first, last = getattr(node, "lineno", None), getattr(node, "end_lineno", None)
    return first is not None and last is not None and bool(first <= line <= last)


def _names(node: ast.AST, name: str) -> bool:
    """Whether an expression reads an attribute with this name."""
    match node:
        case ast.Attribute(attr=found, ctx=ast.Load()):
            return found == name
        case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=found), *_]):
            return bool(found == name)
        case _:
            return False


@cached_weakly
def _definition(function: Callable[..., Any]) -> ast.FunctionDef | None:
    parsed = _parsed(function)
    definition = None if parsed is None else parsed[0].body[0]
    return definition if isinstance(definition, ast.FunctionDef) else None


def _parsed(function: Callable[..., Any] | CodeType) -> tuple[ast.Module, int] | None:
    """The source of a function and the number of its first line; None if there is none."""
    try:
        lines, first = inspect.getsourcelines(function)
        return ast.parse(textwrap.dedent("".join(lines))), first
    except (OSError, TypeError, SyntaxError):
        return None
