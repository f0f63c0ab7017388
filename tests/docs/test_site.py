"""The site has every page, once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def pages_of(menu: Any) -> Iterator[str]:
    """The pages in a menu of mkdocs.yml, which may be nested."""
    if isinstance(menu, str):
        yield menu
    for entry in (
        menu.values() if isinstance(menu, dict) else menu if isinstance(menu, list) else ()
    ):
        yield from pages_of(entry)


def test_the_menu_has_every_page_once() -> None:
    yaml = pytest.importorskip("yaml")
    menu = list(pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    docs = ROOT / "docs"
    assert sorted(menu) == sorted(str(page.relative_to(docs)) for page in docs.rglob("*.md"))
