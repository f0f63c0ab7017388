"""The table of docs/libraries.md names everything that adapters teach, and nothing else."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest

from surgery.verbs.savers import taught

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "libraries.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ENTRIES = PROJECT["project"]["entry-points"]["surgery.plugins"]
LIBRARIES = {
    "PEFT": "peft",
    "sentence-transformers": "sentence_transformers",
    "Lightning": "lightning",
}
ALSO = {"pytorch_lightning": "lightning"}
"""The same library by another name."""
ROWS = {
    LIBRARIES.get(row.split("|")[1].strip(), row.split("|")[1].strip()): row
    for row in re.findall(r"^\| \w.*$", PAGE.partition("## A warning")[0], re.M)[1:]
}
BY_OTHERS = {
    "from_pretrained", "load_checkpoint_and_dispatch", "push_to_hf_hub", "resume_checkpoint",
    "checkpoint",
}  # fmt: skip
"""What the table names and what works by something that is taught, or by itself."""


def has(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def names_in(library: str) -> set[str]:
    """The last parts of what a row names."""
    return {name.rpartition(".")[2] for name in re.findall(r"`([\w.]+)`", ROWS[library])}


def test_every_library_with_an_adapter_has_a_row() -> None:
    names = (name.partition(".")[0] for name in ENTRIES)
    with_rows = {ALSO.get(name, name) for name in names}
    assert with_rows == ROWS.keys()


@pytest.mark.parametrize("library", ROWS)
def test_the_table_is_what_is_taught(library: str) -> None:
    if not has(library):
        pytest.skip(f"{library} is not installed")
    for name, target in ENTRIES.items():
        if name.partition(".")[0] == library:
            importlib.import_module(target)
    if library == "transformers":
        importlib.import_module("surgery.adapters.transformers.arguments")
    own = {name.rpartition(".")[2] for name in taught if name.partition(".")[0] == library}
    assert own - names_in(library) == set()
    assert names_in(library) - own <= BY_OTHERS
