"""The table of `surgery strip` beside `cp` is made, on a small file, and has its place on the page."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks import strip

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, calls cp and sync")
def test_the_table(tmp_path: Path) -> None:
    rows = strip.measure(tmp_path, 4_000_000, 1)
    assert len(rows) == 4 + len(strip.WAYS)
    for row in rows[3:-2]:
        assert re.fullmatch(r"\| .* \| [\d.]+ \([\d.]+\) \| \d+ MB \|", row), row
    page = shutil.copy(ROOT / "docs" / "command-line.md", tmp_path)
    strip.into_page(Path(page), rows)
    assert "\n".join([strip.BEGIN, *rows, strip.END]) in Path(page).read_text()
