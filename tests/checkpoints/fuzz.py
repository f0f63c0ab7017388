"""Files from anywhere, by the thousand: `python -m tests.checkpoints.fuzz --count 10000 --seed 0`, or
`make fuzz COUNT=10000`.

Each trial changes a good checkpoint here and there and gives it to one function. The function does its
work, or raises an error that it documents; whatever it does,

    nothing outside of the folder is read or written, nor a link followed that leads out
    no code in a file runs
    no memory is taken for sizes that a file only claims
    what was refused is as it was, and nothing half-written is left
    what was accepted is a checkpoint that safetensors reads
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import _TYPES
from torch import nn

from surgery import (
    SurgeryError,
    bake_checkpoint,
    convert_checkpoint,
    inspect_checkpoint,
    load_dropconnect,
    strip_checkpoint,
)
from surgery.checkpoints.conventions import CONVENTIONS
from surgery.checkpoints.weights import is_index
from surgery.stored.header import TensorType, encoded, placed, read_header

from .mutations import MARK, MUTATIONS, Files, good
from .raw import Net

Work = Callable[[Path, Path, random.Random], Any]
"""Takes the checkpoint, a path for a new one, and what it may choose by."""

UNCHANGED = "cannot put DropConnect in place; the model is unchanged:"
"""The first line of errors about a model, which list their reasons."""

DOCUMENTED = (SurgeryError, OSError)

MEMORY = 1 << 29
"""Bytes that a trial may take beyond what the process had at its beginning: all files are small."""


def _convert(source: Path, out: Path, rng: random.Random) -> Any:
    return convert_checkpoint(source, out, rng.choice([*CONVENTIONS]))


def _bake(source: Path, out: Path, rng: random.Random) -> Any:
    options: tuple[dict[str, Any], ...] = ({}, {"p": 0.5}, {"p": 0.5, "toward": source})
    return bake_checkpoint(source, out, 1, **rng.choice(options))


def _load(source: Path, out: Path, rng: random.Random) -> nn.Module:
    return load_dropconnect(Net(), source)


VERBS: dict[str, Work] = {
    "inspect": lambda source, out, rng: inspect_checkpoint(source),
    "strip in place": lambda source, out, rng: strip_checkpoint(source),
    "strip": lambda source, out, rng: strip_checkpoint(source, out),
    "convert": _convert,
    "bake": _bake,
    "load": _load,
}
OUTCOMES = ("refused", "accepted", "foreign", "faults")
"""What becomes of a trial; faults beside one of these."""

FROM_FILES = ("inspect", "strip in place", "strip", "convert", "bake")
"""Those that are also given a file in place of its folder."""


class Watch:
    """What code of Python opens and runs, while a trial does."""

    def __init__(self) -> None:
        self.outside: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._event)

    def _event(self, name: str, args: Any) -> None:
        if self.outside is None:
            return
        if name in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn"):
            self.seen.append(f"{name} {args}")
        elif name == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
            path = os.path.realpath(os.fsdecode(args[0]))
            if Path(path).is_relative_to(self.outside) or path == "/etc/passwd":
                self.seen.append(f"open {path}")

    @contextmanager
    def over(self, outside: Path) -> Iterator[list[str]]:
        self.outside, self.seen = outside, []
        try:
            yield self.seen
        finally:
            self.outside = None


def lay_out(files: Files, folder: Path, rng: random.Random, outside: Path) -> None:
    """Write a checkpoint; now and then one of its files is a link that leads out."""
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if files and rng.random() < 0.1:
        name = rng.choice(sorted(files))
        ending = next(
            (end for end in (".safetensors", ".json", ".pt", ".bin") if name.endswith(end)), ""
        )
        (folder / name).unlink()
        (folder / name).symlink_to(outside / f"secret{ending}")


def outsiders(folder: Path) -> Path:
    """A folder beside, whose files nobody may read."""
    folder.mkdir()
    for kind in ("raw", "pickle"):
        for file, content in good()[kind].items():
            ending = file.rpartition(".")[2]
            (folder / f"secret.{ending}").write_bytes(content)
            (folder / file).write_bytes(content)
    (folder / "secret.bin").write_bytes((folder / "secret.pt").read_bytes())
    content = encoded(placed({"secret_raw": TensorType("U8", (len(MARK),))}), None) + MARK
    for name in ("secret.safetensors", "model.safetensors"):
        (folder / name).write_bytes(content)
    return folder


def state(folder: Path) -> dict[str, Any]:
    """Every path in a folder, and what is there."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def check_readable(path: Path) -> None:
    """Raise unless safetensors reads a new checkpoint, and its index names what is there."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    keys = {}
    for file in files:
        with open(file, "rb") as ours:
            header = read_header(ours, file.name)
        keys[file.name] = set(header.entries)
        if {entry.dtype for entry in header.entries.values()} <= _TYPES.keys():  # that it knows
            with safe_open(file, "pt") as theirs:
                assert set(theirs.keys()) == keys[file.name]
    for index in [one for one in files[0].parent.iterdir() if is_index(one.name)] if files else []:
        if path.is_dir():
            for key, name in json.loads(index.read_text())["weight_map"].items():
                assert key in keys[name], f"{key} is not in {name}"


class Trials:
    """Trials in one folder, and what became of them."""

    def __init__(self, home: Path) -> None:
        self.home, self.good, self.watch = home, good(), Watch()
        self.outside, self.elsewhere = outsiders(home / "outside"), home / "elsewhere"
        self.elsewhere.mkdir()  # where the process is: code in a pickle would leave its file there
        self.secrets = state(self.outside)
        self.found: Counter[tuple[str, str]] = Counter()
        self.faults: list[str] = []

    def run(self, number: int, seed: int) -> None:
        """One of them: a good checkpoint, up to four changes, and one function."""
        rng = random.Random(f"{seed}:{number}")
        kind, verb = rng.choice(sorted(self.good)), rng.choice([*VERBS])
        files, applied = dict(self.good[kind]), []
        for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
            mutation = rng.choice(MUTATIONS)
            if files:
                mutation(files, rng)
                applied.append(mutation.__name__)
        box = self.home / "box"
        box.mkdir()
        source, out = box / "in", box / rng.choice(("out", "out.safetensors"))
        lay_out(files, source, rng, self.outside)
        given = source
        if verb in FROM_FILES and files and rng.random() < 0.3:
            given = source / rng.choice(sorted(files))
        linked = given.is_symlink()  # who names a link wants it followed
        before = state(source)
        outcome, error = self._call(verb, given, out, rng)
        self.found[verb, outcome] += 1
        where = f"seed {seed}, trial {number}: {verb} of {kind} after {applied}"
        if outcome == "foreign":
            self.faults.append(f"{where}\n{error}")
        for fault in self._faults(outcome, verb, source, out, before, linked):
            self.found[verb, "faults"] += 1
            self.faults.append(f"{where}: {fault}")
        shutil.rmtree(box)

    def _call(self, verb: str, given: Path, out: Path, rng: random.Random) -> tuple[str, str]:
        with self.watch.over(self.outside):
            try:
                VERBS[verb](given, out, rng)
            except DOCUMENTED as error:
                lines = str(error).split("\n")
                if all(map(str.isprintable, lines)) and (len(lines) == 1 or lines[0] == UNCHANGED):
                    return "refused", ""
                return "foreign", f"a message of {len(lines)} lines: {error!r}"
            except Exception:
                return "foreign", traceback.format_exc(limit=-4)
            return "accepted", ""

    def _faults(
        self, outcome: str, verb: str, source: Path, out: Path, before: dict[str, Any], linked: bool
    ) -> Iterator[str]:
        if self.watch.seen and not linked:
            yield f"it did {self.watch.seen[:3]}"
        if state(self.outside) != self.secrets or any(self.elsewhere.iterdir()):
            yield "something outside was changed"
        written = [
            path for path in (self.home / "box").iterdir() if path.name not in ("in", out.name)
        ]
        if written or [name for name in state(source) if ".unfinished" in name]:
            yield f"left over: {written}"
        if outcome == "accepted" and verb == "strip in place":
            target: Path | None = source
        else:
            target = out if out.exists() else None
            if state(source) != before:
                yield "the source was changed"
        if target is None:
            return
        if outcome != "accepted":
            yield "refused, and yet there is an OUT"
            return
        files = [target] if target.is_file() else target.iterdir()
        contents = [path.read_bytes() for path in files if not path.is_symlink()]
        if not linked and any(MARK in content for content in contents):
            yield "the new checkpoint has what lies outside"
        if verb != "strip in place":
            try:
                check_readable(target)
            except Exception as error:
                yield f"the new checkpoint cannot be read: {error!r}"

    def report(self) -> str:
        """A line for each function, and one for all."""
        rows: list[tuple[str, ...]] = [("", "tried", *OUTCOMES)]
        for verb in (*VERBS, "all"):
            verbs = [*VERBS] if verb == "all" else [verb]
            counts = [sum(self.found[one, outcome] for one in verbs) for outcome in OUTCOMES]
            rows.append((verb, str(sum(counts[:3])), *map(str, counts)))
        return "\n".join("  ".join(cell.rjust(14) for cell in row) for row in rows)


def run(count: int, seed: int = 0, first: int = 0) -> Trials:
    """So many trials, in a folder that is gone afterwards."""
    fsync, here = os.fsync, os.getcwd()
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trials = Trials(Path(name).resolve())
        os.chdir(trials.elsewhere)
        os.fsync = lambda fd: None  # the machine does not die, and it takes most of the time
        try:
            for number in range(first, first + count):
                trials.run(number, seed)
        finally:
            os.fsync = fsync
            os.chdir(here)
    return trials


def main() -> None:
    """Trials in a process that may not take much memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    args = parser.parse_args()
    run(20)  # what is imported and compiled at the first call
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    trials = run(args.count, args.seed, args.first)
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(trials.report())
    print(f"{more / 1e6:.0f} MB more memory than before")
    for fault in trials.faults[:20]:
        print(fault)
    if trials.faults or more > MEMORY:
        sys.exit(1)


if __name__ == "__main__":
    main()
