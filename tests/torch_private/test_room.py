"""What torch does not promise is used in one room, and each name there has a canary."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from surgery.torch_private.modules import COMMON

ROOT = Path(__file__).parents[2]
ROOM = ROOT / "surgery" / "torch_private"
HOUSE = [
    path
    for folder in ("surgery", "transforms", "adapters")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.parent != ROOM
]

OF_PYTHON = ("_getframe", "_is_owned", "_fields", "_replace")
"""Of `sys`, of locks and of named tuples."""

OF_OTHERS = ("_save", "_compiler_ctx", "_average_model", "_load_raw_module_state")
"""Of `transformers.Trainer` and of Lightning; canaries are in tests/adapters and tests/libraries."""

ASKING = ("getattr", "hasattr", "setattr", "delattr", "attrgetter", "methodcaller")


Node = ast.expr | ast.Import | ast.ImportFrom


def is_private(name: object) -> bool:
    return isinstance(name, str) and bool(re.fullmatch(r"_(?!_)[A-Za-z]\w*", name))


def names_in(tree: ast.AST) -> Iterator[tuple[str, Node]]:
    """The private names of other objects than `self` that a file uses: attributes, those that it asks
    for by a string, and imports of torch and triton."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr, node.value
        elif isinstance(node, ast.Call):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
            name = function.id if isinstance(function, ast.Name) else function
            for given in node.args if name in ASKING else ():
                if isinstance(given, ast.Constant) and is_private(given.value):
                    yield given.value, node
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            dotted = [f"{module}.{alias.name}".strip(".") for alias in node.names]
            for part in (part for one in dotted for part in one.split(".")):
                if dotted[0].startswith(("torch", "triton")) and is_private(part):
                    yield part, node


def strings_in(tree: ast.AST) -> set[str]:
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {value for value in constants if is_private(value)}


def own_names(tree: ast.AST) -> set[str]:
    """What a file defines: functions, classes, and attributes that it assigns or annotates."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


TREES = {path: ast.parse(path.read_text()) for path in (*HOUSE, *sorted(ROOM.glob("*.py")))}

OF_TORCH = {
    name
    for path in ROOM.glob("*.py")
    for name in {*(name for name, _ in names_in(TREES[path])), *strings_in(TREES[path])}
    if name not in COMMON
}
"""The private names that the room uses."""


def strangers(tree: ast.AST) -> Iterator[str]:
    """The private names that a file should not use, with their lines. Fine are those of `self`, those
    that surgery gave, and those that are listed."""
    allowed, own = {*COMMON, *OF_PYTHON, *OF_OTHERS}, own_names(tree)
    for name, owner in names_in(tree):
        is_own = isinstance(owner, ast.Name) and owner.id in ("self", "cls") and name in own
        if not (is_own or name in allowed or name.startswith("_dropconnect")):
            yield f"line {owner.lineno}: {name}"
    yield from strings_in(tree) & OF_TORCH


def test_no_other_file_uses_private_names() -> None:
    """What is of torch belongs into surgery/torch_private, in the file of its concern."""
    found = {str(path.relative_to(ROOT)): list(strangers(TREES[path])) for path in HOUSE}
    assert not {path: names for path, names in found.items() if names}


@pytest.mark.parametrize(
    "line",
    [
        "x = torch._C._is_tracing()",
        "x = tensor._version",
        "x = getattr(module, '_is_replica', False)",
        "table['_flat_weights'] = []",
        "from torch.utils import _pytree as pytree",
        "import torch._dynamo.config as config",
    ],
)
def test_strangers_are_found(line: str) -> None:
    assert list(strangers(ast.parse(line)))


@pytest.mark.parametrize("path", sorted(ROOM.glob("*.py")), ids=lambda path: path.stem)
def test_every_name_has_a_canary(path: Path) -> None:
    """In the test file of the same name."""
    if path.name == "__init__.py":
        return
    used = {name for name, _ in names_in(TREES[path])} | strings_in(TREES[path])
    tests = ast.parse((Path(__file__).parent / f"test_{path.name}").read_text())
    sung: set[str] = set()
    for node in ast.walk(tests):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            for part in ast.walk(node) if node.func.id == "canary" else ():
                if isinstance(part, ast.Constant):
                    sung |= set(re.findall(r"\w+", str(part.value)))
    assert used - own_names(TREES[path]) <= sung


def test_the_page_of_the_room_names_its_files() -> None:
    page = ast.get_docstring(TREES[ROOM / "__init__.py"]) or ""
    files = {path.name for path in ROOM.glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"^\s+(\w+\.py) ", page, re.MULTILINE)) == files
