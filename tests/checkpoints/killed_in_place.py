"""Kill `surgery strip` in place at every event, and say what it left: `python -m
tests.checkpoints.killed_in_place GOOD FOLDER`, with a raw checkpoint GOOD and a place to work in.

In a process without torch, which can be forked many times.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

from surgery.checkpoints.strip import strip_checkpoint
from surgery.checkpoints.weights import read_weights
from surgery.spec.errors import NotOperatedError

from ..killing import kills


def content(folder: Path) -> Any:
    """What a reader finds: of every tensor its dtype, shape and bytes."""
    weights = read_weights(folder)
    files = {name: (folder / name).read_bytes() for name in weights.headers}
    return {
        key: (
            *(entry.dtype, entry.shape),
            hashlib.sha256(
                files[name][weights.headers[name].data_at :][entry.start : entry.end]
            ).digest(),
        )
        for name, key, entry in weights.entries()
    }


def restored(folder: Path, good: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)


def main(good: Path, folder: Path) -> dict[str, Any]:
    before = content(good)
    restored(folder, good)
    strip_checkpoint(folder)
    after, names = content(folder), sorted(os.listdir(good))
    found: dict[str, Any] = {"old": 0, "new": 0, "wrong": []}
    for event in kills(partial(strip_checkpoint, folder), partial(restored, folder, good)):
        now = content(folder)
        found["old"] += now == before
        found["new"] += now == after
        if now not in (before, after):
            found["wrong"].append(f"{event}: neither")
        with contextlib.suppress(NotOperatedError):
            strip_checkpoint(folder)
        if content(folder) != after:
            found["wrong"].append(f"{event}: the next call does not finish")
        if sorted(os.listdir(folder)) != names:
            found["wrong"].append(f"{event}: left over {set(os.listdir(folder)) ^ set(names)}")
    return {**found, "torch": "torch" in sys.modules}


if __name__ == "__main__":
    os.fsync = lambda fd: None  # a process dies here, and not the machine
    print(json.dumps(main(*map(Path, sys.argv[1:]))))
