"""Which attributes of `self` a function reads, and how it uses them.

The rules here say which expressions name something of `self` (`self.experts[i].weight`), and which of
these use the value of a tensor (`x @ self.weight`), and not only its form (`self.weight.dtype`) or the
place where it is stored (`self.weight.data = x`).
"""

from __future__ import annotations

import ast
import builtins
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

AttributeChain = tuple[str, ...]
"""The names in an expression that starts at `self`: `("proj", "weight")` for `self.proj.weight`. `self`
is the empty chain."""

ANY_ITEM = "*"
"""In a chain, an index that is not known: `("experts", "*", "weight")` for `self.experts[i].weight`."""

_FORM = frozenset(
    {
        "data_ptr",
        "device",
        "dim",
        "dtype",
        "grad",
        "is_meta",
        "ndim",
        "numel",
        "requires_grad",
        "shape",
        "size",
    }
)
"""Attributes of a tensor that do not depend on its values."""

_OF_QUANTISED = frozenset({"SCB", "quant_state"})
"""What bitsandbytes hangs on a weight."""

_KNOWN = (Tensor, nn.Module, nn.ModuleList, nn.ModuleDict, str)
"""A method that one of these has is taken for theirs: it reads no weight, or calls the forward."""

Bindings = frozenset[tuple[str, AttributeChain]]
"""What the arguments of a function stand for inside: (name, chain) pairs."""

Given = tuple[tuple[int | str, AttributeChain], ...]
"""What a call is given: (position or name, chain) pairs."""


class Call(NamedTuple):
    """A call that is given something of `self`, or `self` itself."""

    method: AttributeChain | None
    """The chain of what is called, if that starts at `self`."""
    function: Any
    """Else the object that is called; None if the source does not tell."""
    name: str
    """How the source calls it, for one that is a plain name."""
    given: Given


def uses_value(rest: AttributeChain) -> bool:
    """Whether an expression uses the value of a parameter.

    Args:
        rest: what it reads of the parameter: `()` for `self.weight`, `("T",)` for `self.weight.T`. No
            value is used by `self.weight.dtype`, by `self.weight.data.dtype`, and by what is no
            attribute of tensors and was hung on this one: `self.weight.quant_state`.
    """
    if rest[:1] == ("data",):
        rest = rest[1:]
    if not rest or not rest[0].isidentifier():
        return True
    return rest[0] not in _FORM and hasattr(Tensor, rest[0])


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


class Visitor(ast.NodeVisitor):
    """Collects the chains that a function reads, and the calls to which it gives some."""

    def __init__(
        self,
        function: Callable[..., Any] | None,
        bindings: Bindings,
        starts: Mapping[ast.AST, AttributeChain] = types.MappingProxyType({}),
    ) -> None:
        self._function = function
        """In which names that are not local are looked up; None to look up none."""
        self._starts = starts
        """Expressions that stand for something, beside local names."""
        self._aliases: dict[str, set[AttributeChain]] = {}
        """What a local name may stand for, anywhere in the function: `w` after `w = self.weight`."""
        for name, chain in bindings:
            self._aliases.setdefault(name, set()).add(chain)
        self._forget()

    def _forget(self) -> None:
        self.chains: set[AttributeChain] = set()
        self.calls: list[Call] = []
        self.methods: set[AttributeChain] = set()
        """Methods of children that are called, other than the forward."""
        self.computed = False

    def look_at(self, tree: ast.AST) -> None:
        """Look twice: a loop may use a local name above the line that gives it something."""
        self.visit(tree)
        self._forget()
        self.visit(tree)

    def chains_of(self, node: ast.expr) -> set[AttributeChain]:
        """The chains that an expression such as `self.a[i].b` may be; empty if none starts at self."""
        if node in self._starts:
            return {self._starts[node]}
        match node:
            case ast.Name(id=name):
                return self._aliases.get(name, set())
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
        found: set[AttributeChain] = set()
        if self._is_written(node):
            if isinstance(node, ast.Subscript):
                self.visit(node.slice)
            return
        if isinstance(node, ast.expr) and not isinstance(getattr(node, "ctx", None), ast.Store):
            found = {chain for chain in self.chains_of(node) if chain}
        self.chains |= found
        if found and isinstance(node, (ast.Attribute, ast.Name)):
            self._visit_inside(node)
        else:
            super().visit(node)

    def _visit_inside(self, node: ast.expr) -> None:
        """Look at what a chain computes on its way: `i` in `self.experts[i].weight`."""
        match node:
            case ast.Attribute(value=owner):
                self._visit_inside(owner)
            case ast.Call(func=ast.Name(id="getattr"), args=arguments):
                for argument in arguments:
                    self.visit(argument)
            case ast.Name():
                pass
            case _:
                self.visit(node)

    def _is_written(self, node: ast.AST) -> bool:
        """`self.weight[i] = x`, `self.weight.data = x`: values are written, none is read."""
        match node:
            case (
                ast.Subscript(value=owner, ctx=ast.Store())
                | ast.Attribute(value=owner, attr="data", ctx=ast.Store())
            ):
                return bool(self.chains_of(owner))
            case _:
                return False

    def visit_Expr(self, node: ast.Expr) -> None:
        """`self.weight.mul_(x)` as a statement writes, and so does `nn.init.zeros_(self.weight)`;
        `self.weight` alone does nothing."""
        match node.value:
            case ast.Attribute() as alone if self.chains_of(alone):
                self._visit_inside(alone)
                return
            case ast.Call(func=ast.Attribute(value=owner, attr=name) as function, args=given) if (
                name.endswith("_") and not name.startswith("_")
            ):
                if any(self.chains_of(owner)):
                    for argument in (*given, *node.value.keywords):
                        self.visit(argument)
                    return
                found = _resolved(function, self._function)
                if getattr(found, "__module__", "") == "torch.nn.init":
                    return  # the other arguments are numbers
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        """Branches for quantised weights are skipped: these are never sites."""
        match node.test:
            case ast.Call(func=ast.Name(id="hasattr"), args=[_, ast.Constant(value=name)]) if (
                name in _OF_QUANTISED
            ):
                for statement in node.orelse:
                    self.visit(statement)
            case _:
                self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        """`w = self.weight` gives it a local name: the uses of `w` count."""
        for target in node.targets:
            self._assign(target, node.value)
        if all(isinstance(target, ast.Name) for target in node.targets):
            self._ask(node.value)
        else:
            self.generic_visit(node)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self._assign(node.target, node.value)
        self.generic_visit(node)

    def _loop(self, node: ast.For | ast.comprehension) -> None:
        self._bind(node.target, node.iter)
        self.generic_visit(node)

    visit_For = visit_comprehension = _loop

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
        """Parts of an expression that looks at objects, and not at the values of tensors."""
        for part in parts:
            if self.chains_of(part):
                self._visit_inside(part)
            else:
                self.visit(part)

    def visit_Call(self, node: ast.Call) -> None:
        match node.func:
            case ast.Name(id="isinstance" | "hasattr" | "type" | "id" | "len"):
                self._ask(*node.args)
                return
            case ast.Name(id="getattr" | "vars") if not self.chains_of(node):
                self.computed = True
            case ast.Attribute(value=owner, attr="parameters" | "named_parameters"):
                self.computed = self.computed or bool(self.chains_of(owner))
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=name):
                self.chains.add((name,))  # a method of self, whatever it is called from
            case ast.Attribute(attr=name) if not any(hasattr(cls, name) for cls in _KNOWN):
                self.methods |= {chain for chain in self.chains_of(node.func) if len(chain) > 1}
        self._note_call(node)
        self.generic_visit(node)

    def _note_call(self, node: ast.Call) -> None:
        keyed: list[tuple[int | str, ast.expr]] = []
        for index, argument in enumerate(node.args):
            if isinstance(argument, ast.Starred):
                break
            keyed.append((index, argument))
        keyed += [(word.arg, word.value) for word in node.keywords if word.arg is not None]
        given = tuple((key, chain) for key, value in keyed for chain in self.chains_of(value))
        if given:
            chains = [chain for chain in self._called(node.func) if chain]
            methods: list[AttributeChain | None] = [*chains] or [None]
            function = _resolved(node.func, self._function)
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            self.calls += [Call(method, function, name, given) for method in methods]

    def _called(self, function: ast.expr) -> set[AttributeChain]:
        """Chains of what is called; `super().forward` is a method of self."""
        match function:
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=name):
                return {(name,)}
            case _:
                return self.chains_of(function)

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
            items = {(*chain, ANY_ITEM) for chain in self.chains_of(iterable) if chain}
            self._alias(target.id, items)

    def _alias(self, name: str, chains: set[AttributeChain]) -> None:
        found = {chain for chain in chains if chain}
        if found:
            self._aliases.setdefault(name, set()).update(found)


def _item(chain: AttributeChain, index: ast.expr) -> AttributeChain:
    """The chain of `<chain>[index]`; `self._modules["fc"]` is `self.fc`."""
    fixed = index.value if isinstance(index, ast.Constant) else None
    if isinstance(fixed, str):
        return (*chain[:-1], fixed) if chain[-1] in _TABLES else (*chain, fixed)
    return (*chain, str(fixed) if isinstance(fixed, int) and fixed >= 0 else ANY_ITEM)


_TABLES = ("_modules", "_parameters")


def _resolved(node: ast.expr, function: Callable[..., Any] | None) -> Any:
    """The object that an expression names in a function, if it is a global or from outside; or None."""
    if isinstance(node, ast.Attribute):
        owner = _resolved(node.value, function)
        return getattr(owner, node.attr, None) if isinstance(owner, types.ModuleType) else None
    code = getattr(function, "__code__", None)
    if function is None or code is None or not isinstance(node, ast.Name):
        return None
    if node.id in code.co_varnames or node.id in code.co_cellvars:
        return None
    if node.id in code.co_freevars:
        cells = dict(zip(code.co_freevars, function.__closure__ or ()))
        try:
            return cells[node.id].cell_contents
        except ValueError:
            return None
    found = function.__globals__.get(node.id)
    return getattr(builtins, node.id, None) if found is None else found
