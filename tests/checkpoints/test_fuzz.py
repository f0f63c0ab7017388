"""Changed files by the thousand, see `fuzz`: refused or done, and nothing else."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from surgery import SurgeryError

from . import fuzz
from .mutations import MARK, change_pickle

ROOT = Path(__file__).parents[2]


def test_some_changed_files() -> None:
    trials = fuzz.run(250, seed=1)
    assert trials.faults == []
    counts = [sum(trials.found[verb, what] for verb in fuzz.VERBS) for what in fuzz.OUTCOMES]
    assert sum(counts[:2]) == 250
    assert min(counts[:2]) > 25


@pytest.mark.slow
def test_ten_thousand_changed_files() -> None:
    """In a process of its own: whatever happens in C would end it."""
    command = [sys.executable, "-m", "tests.checkpoints.fuzz", "--count", "10000"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr[-2000:]}"
    print(run.stdout)


@pytest.mark.parametrize("verb", ["strip", "strip in place"])
def test_the_harness_sees_what_should_not_be(verb: str, monkeypatch) -> None:
    """Each of these faults, planted, is one that it names."""

    def trials(work: fuzz.Work) -> str:
        monkeypatch.setattr(fuzz, "VERBS", {verb: work})
        return "\n".join(fuzz.run(1, seed=5).faults)

    def reads(source: Path, out: Path, rng: object) -> None:
        (source.parent.parent / "outside" / "secret.json").read_bytes()

    def writes(source: Path, out: Path, rng: object) -> None:
        (source.parent / "more").write_text("")

    def fails(source: Path, out: Path, rng: object) -> None:
        raise KeyError("w_raw")

    def leaves(source: Path, out: Path, rng: object) -> None:
        out.mkdir()
        raise SurgeryError("refused")

    def copies(source: Path, out: Path, rng: object) -> None:
        target = source if verb == "strip in place" else out
        target.mkdir(exist_ok=True)
        (target / "model.safetensors").write_bytes(MARK)

    def runs(source: Path, out: Path, rng: object) -> None:
        subprocess.run(["true"], check=True)

    def says_much(source: Path, out: Path, rng: object) -> None:
        raise SurgeryError("one", "two")

    assert trials(lambda source, out, rng: None) == ""
    assert "it did ['open " in trials(reads)
    assert "left over" in trials(writes)
    assert "KeyError: 'w_raw'" in trials(fails)
    assert "refused, and yet there is an OUT" in trials(leaves)
    assert "has what lies outside" in trials(copies)
    assert "subprocess.Popen" in trials(runs)
    assert "a message of 2 lines" in trials(says_much)


def on_two_disks() -> bytes:
    """Refused by `is_zipfile` itself."""
    return b"PK\6\7" + struct.pack("<LQL", 0, 0, 2) + b"PK\5\6" + bytes(18)


def packed_badly() -> bytes:
    """Refused by zlib."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.pkl", "a" * 100)
        start = archive.infolist()[0].header_offset + 30 + len("a.pkl")
    content = bytearray(file.getvalue())
    content[start] = 255
    return bytes(content)


@pytest.mark.parametrize("archive", [on_two_disks, packed_badly])
def test_archives_that_cannot_be_read_are_left_as_they_are(archive: Callable[[], bytes]) -> None:
    files = {"model.pt": archive()}
    change_pickle(files, random.Random(0))
    assert files == {"model.pt": archive()}
