"""kill -9 at any moment leaves the old checkpoint or the new one, and the next call cleans up."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from surgery import bake_checkpoint, convert_checkpoint, strip_checkpoint
from surgery.base.files import only_writer

from ..killing import kills
from .raw import names, operated, read, same, write

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("shards", "toward"), [(1, "zero"), (2, "pretrained")])
def test_in_place_it_is_the_old_one_or_the_new_one(
    shards: int, toward: str, tmp_path: Path
) -> None:
    good = write(operated(toward), tmp_path / "good", shards)
    command = [
        sys.executable,
        "-m",
        "tests.checkpoints.killed_in_place",
        str(good),
        str(tmp_path / "folder"),
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found.pop("wrong") == []
    assert found.pop("torch") is False
    print(f"killed at every event: {found}")
    assert min(found.values()) > 2


def test_a_new_checkpoint_is_not_there_or_whole(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # the machine does not die
    model = operated()
    source, out = write(model, tmp_path / "source", 2), tmp_path / "out" / "plain"
    torch.save(model.state_dict(), tmp_path / "model.pt")
    works: dict[str, Any] = {
        "bake": partial(bake_checkpoint, source, out, 1, p=0.5),
        "convert": partial(
            convert_checkpoint, tmp_path / "model.pt", f"{out}.safetensors", "surgery"
        ),
    }

    def empty() -> None:
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()

    for verb, work in works.items():
        empty()
        work()
        path = out if verb != "convert" else Path(f"{out}.safetensors")
        whole, files = read(path), names(out) if verb != "convert" else []
        seen = set()
        for _ in kills(work, empty):
            seen.add(path.exists())
            if path.exists():
                assert same(read(path), whole)
                assert not files or names(out) == files
        assert seen == {False, True}, verb


def test_a_kill_while_bytes_are_copied(tmp_path: Path) -> None:
    """At times, not at events: also in the middle of what the kernel does."""
    rng = random.Random(0)
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "model.safetensors"
    raw = {"w_raw": torch.arange(3_000_000).float(), "w_anchor": torch.zeros(3_000_000)}

    def run() -> int:
        child = os.fork()
        if child == 0:
            strip_checkpoint(folder)
            os._exit(0)
        return child

    save_file(raw, path)
    start = time.perf_counter()
    os.waitpid(run(), 0)
    whole = time.perf_counter() - start  # of the verb alone: a slow disk takes longer to save
    seen = set()
    for part in (0.0, *(rng.random() for _ in range(10)), None):
        save_file(raw, path)
        child = run()
        if part is not None:
            time.sleep(part * whole)
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        keys = tuple(read(folder))
        assert keys in (("w",), ("w_anchor", "w_raw"))
        seen.add(keys)
    assert torch.equal(read(folder)["w"].max(), torch.tensor(2_999_999.0))
    assert len(seen) == 2


def test_two_at_a_time_are_refused(tmp_path: Path) -> None:
    """One would take away what the other has written."""
    folder = write(operated(), tmp_path / "raw", shards=2)
    with only_writer(folder), pytest.raises(BlockingIOError, match="another process is writing in"):
        strip_checkpoint(folder)
    strip_checkpoint(folder)
