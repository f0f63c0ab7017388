"""Every block of Python on a page runs, and prints what the page says it prints.

A page is one program: its blocks run in order and share their names. A block that the reader need not
see stands in a comment (`<!--- invisible-code-block: python ... -->`); a block of `text` that follows
one of Python is what that one prints.
"""

from __future__ import annotations

import io
import os
import random
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from sybil import Document, Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser

from . import given

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
    if "```python" in page.read_text()
)


PYTHON = PythonEvaluator()


def run(example: Example) -> None:
    """Run a block, and keep what it prints for the block of text that follows."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(io.StringIO()):
        PYTHON(example)
    example.namespace["_printed"] = printed.getvalue()


def compare(example: Example) -> str | None:
    """A block of text is what the block before it printed."""
    printed = example.namespace.pop("_printed", None)
    if printed is None or printed.strip() == str(example.parsed).strip():
        return None
    return f"the page says\n{example.parsed}\nand printed was\n{printed}"


SYBIL = Sybil(
    parsers=[SkipParser(), CodeBlockParser("python", run), CodeBlockParser("text", compare)]
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_of_the_page_runs(page: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    random.seed(0)
    document: Document = SYBIL.parse(page)
    monkeypatch.setitem(sys.modules, "given", given)
    with warnings.catch_warnings():
        for kind in (DeprecationWarning, FutureWarning):  # of libraries, and of what they call
            warnings.simplefilter("ignore", kind)
        warnings.filterwarnings("ignore", "'pin_memory'")  # Trainer's default, without a GPU
        for example in document.examples():
            example.evaluate()
    assert os.getcwd() == str(tmp_path)
