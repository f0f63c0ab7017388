"""How rooms and files may refer to each other, and what docs/architecture.md says of them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"surgery": "surgery", "transforms": "surgery.transforms", "adapters": "surgery.adapters"}

CORE = (
    "base",
    "torch_private",
    "spec",
    "stored",
    "ops",
    "moments",
    "travel",
    "kinds",
    "modules",
    "planning",
    "operating",
    "verbs",
    "compat",
    "checkpoints",
    "cli",
)
"""The rooms of the core from the ground up: each imports only those before it."""
GRAPHS = ("capture", "reading", "operating", "drawing")
"""Those of `transforms`, in the same way."""


def dotted(path: Path) -> str:
    """The name by which a file is imported."""
    first, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[first], *(part for part in rest if part != "__init__")])


PATHS = {dotted(path): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}


def targets(name: str, node: ast.Import | ast.ImportFrom) -> set[str]:
    """The modules of ours that one import statement of module `name` takes, by dotted name."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names} & PATHS.keys()
    base = node.module or ""
    if node.level:
        package = name.split(".")
        if PATHS[name].name != "__init__.py":
            package = package[:-1]
        base = ".".join([*package[: len(package) - node.level + 1], *base.split(".")]).strip(".")
    found = {f"{base}.{alias.name}" for alias in node.names} & PATHS.keys()
    return found or {base} & PATHS.keys()


def imports(name: str) -> list[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import statement of a module, and whether it stands inside of something."""
    tree = ast.parse(PATHS[name].read_text())
    statements = (ast.Import, ast.ImportFrom)
    return [
        (node, node not in tree.body) for node in ast.walk(tree) if isinstance(node, statements)
    ]


ARROWS = {
    name: {target for node, _ in imports(name) for target in targets(name, node)} - {name}
    for name in PATHS
}


def room(name: str) -> tuple[str, int] | None:
    """The root folder of a module and the floor of its room; None outside of rooms."""
    parts = name.split(".")[1:]
    if parts[:1] == ["transforms"]:
        return ("transforms", GRAPHS.index(parts[1])) if len(parts) > 1 else None
    return ("surgery", CORE.index(parts[0])) if parts and parts[0] in CORE else None


def test_every_folder_is_a_room() -> None:
    folders = {path.parent.name for path in ROOT.glob("surgery/*/__init__.py")}
    assert folders == set(CORE)
    assert {path.parent.name for path in ROOT.glob("transforms/*/__init__.py")} == set(GRAPHS)


def test_rooms_import_only_what_stands_below() -> None:
    for name, found in ARROWS.items():
        mine = room(name)
        for target in found if mine is not None else ():
            other = room(target)
            if other is not None and other[0] == mine[0]:
                assert other[1] <= mine[1], f"{name} imports {target}, which stands above it"


def test_there_is_no_circle() -> None:
    """Not even one that an import inside of a function hides."""
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for target in ARROWS[name]:
                visit(target, (*above, name))
            done.add(name)

    for name in PATHS:
        visit(name, ())


def test_the_core_imports_at_the_top_of_its_files() -> None:
    """An import of ours elsewhere would hide an arrow."""
    for name in PATHS:
        if name == "surgery" or name.startswith(("surgery.adapters", "surgery.cli")):
            continue  # what they import is slow, or needs a library that may be missing
        late = [
            ast.unparse(node) for node, inside in imports(name) if inside and targets(name, node)
        ]
        assert not late, name


def test_who_may_import_whom() -> None:
    """The core imports neither of the others, and they do not import each other."""
    forbidden = {
        "surgery": ("surgery.transforms", "surgery.adapters"),
        "transforms": ("surgery.adapters",),
        "adapters": ("surgery.transforms",),
    }
    for name, found in ARROWS.items():
        if name.startswith("surgery.cli"):
            continue  # it stands on all three
        others = forbidden[PATHS[name].relative_to(ROOT).parts[0]]
        assert not [target for target in found if target.startswith(others)], name


def test_no_bare_imports_of_our_folders() -> None:
    """They would load a second copy, or somebody else's package of that name."""
    for name in PATHS:
        for node, _ in imports(name):
            if isinstance(node, ast.ImportFrom):
                bare = {(node.module or "").split(".")[0]} if not node.level else set()
            else:
                bare = {alias.name.split(".")[0] for alias in node.names}
            assert not {"transforms", "adapters"} & bare, name


def test_relative_imports_stay_inside_their_folder() -> None:
    for name, path in PATHS.items():
        depth = len(path.relative_to(ROOT).parts) - 1
        levels = [node.level for node, _ in imports(name) if isinstance(node, ast.ImportFrom)]
        assert all(level <= depth for level in levels), name


@pytest.mark.parametrize("folder", ["surgery", "transforms"])
def test_the_page_names_every_file_and_no_other(folder: str) -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    named: set[str] = set()
    for row in re.findall(r"^\| (`.*?) \| ", page, re.MULTILINE):
        place = ""
        for file in re.findall(r"`([\w/]+\.py)`", row):
            place = file.rpartition("/")[0] or place  # "`a/b.py`, `c.py`" are in one folder
            named.add(f"{place}/{file.rpartition('/')[2]}")
    rooms = CORE if folder == "surgery" else GRAPHS
    paths = [path for one in rooms for path in (ROOT / folder / one).glob("*.py")]
    found = {f"{path.parent.name}/{path.name}" for path in paths if path.name != "__init__.py"}
    assert found <= named
    assert not {file for file in named if not (ROOT / folder / file).exists()} - {
        file for file in named if any((ROOT / other / file).exists() for other in FOLDERS)
    }


def private_names(path: Path) -> list[str]:
    """What a file takes of ours by a name that begins with an underscore."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    imported = [
        alias
        for node in nodes
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "surgery"
        for alias in node.names
    ]
    ours = {alias.asname or alias.name for alias in imported}
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    return [alias.name for alias in imported if alias.name.startswith("_")] + [
        ast.unparse(node)
        for node in attributes
        if node.attr == "_dropconnect"
        or (node.attr[0] == "_" != node.attr[1] and ast.unparse(node.value) in ours)
    ]


def test_tests_name_the_inside_of_the_package_in_one_file() -> None:
    """`tests/internals.py`, so that a new name there changes one line here."""
    found = {path.name: private_names(path) for path in (ROOT / "tests").rglob("*.py")}
    assert found.pop("internals.py")
    assert {name: names for name, names in found.items() if names} == {}
