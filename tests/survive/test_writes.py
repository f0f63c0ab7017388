"""A write that is cut off, by a signal or by an error of the system, leaves the old files or the new.

`python -m tests.survive.writes --count N` tries any number.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from random import Random

import pytest

from .writes import at_event, fresh, kill, no_larger_than, run, trials
from .written import WRITES, Write

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")

every_write = pytest.mark.parametrize("name", WRITES)


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process dies here, and not the machine."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@every_write
def test_cut_off_here_and_there(name: str, tmp_path: Path) -> None:
    tried, wrong = trials(WRITES[name], tmp_path / "work", 4, Random(1))
    assert tried.total() == 4
    assert not wrong


@pytest.mark.slow
@every_write
def test_cut_off_often(name: str, tmp_path: Path) -> None:
    assert not trials(WRITES[name], tmp_path / "work", 150, Random(2))[1]


def careless(folder: Path) -> None:
    """Writes in place."""
    (folder / "file").write_bytes(bytes(100_000))


def test_the_faults_strike(tmp_path: Path) -> None:
    """The check itself: what a careless write leaves is seen, and an error that is no `OSError`."""

    def prepare(folder: Path) -> None:
        (folder / "file").write_bytes(bytes(100_000))

    write = Write(prepare, careless, lambda folder: (folder / "file").stat().st_size)
    fresh(write, tmp_path / "work")
    assert run(write, tmp_path / "work", at_event(0, kill)) is None
    assert run(write, tmp_path / "work", no_larger_than(10)) == 0
    assert write.read(tmp_path / "work") == 10
    assert "full: neither the old nor the new" in trials(write, tmp_path / "work", 20, Random(3))[1]
    assert run(Write(prepare, lambda folder: 1 / 0, write.read), tmp_path / "work") == 3
