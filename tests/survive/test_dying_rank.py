"""Under DDP one of two processes is killed: the other gets an error, its model and files are whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .dying_worker import LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("where", ["forward", "backward", "strip", "save"])
def test_the_other_rank_goes_on_whole(where: str, tmp_path: Path) -> None:
    arguments = [str(tmp_path / "store"), str(tmp_path), where]
    worker = [sys.executable, "-m", "tests.survive.dying_worker"]
    ranks = [subprocess.Popen([*worker, str(rank), *arguments]) for rank in range(2)]
    try:
        assert ranks[1].wait(240) == -9
        ranks[0].wait(240)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    found = json.loads((tmp_path / "result").read_text())
    assert found["error"]
    assert found["seconds"] < LIMIT.total_seconds()
    assert found["whole"]
    assert found["same"]
    assert found["plain"]
    assert found["read"] == ["0.weight", "2.weight"]
