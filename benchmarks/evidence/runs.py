"""Results as lines of a file: a unit of work is one line, and what is there is not done again."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

Unit = dict[str, Any]
"""What tells one training from the others: its seed, its method, ..."""

Result = dict[str, Any]
"""What it found, ready for JSON."""


@dataclass(frozen=True)
class Experiment:
    """Trainings that belong together."""

    name: str
    settings: Any
    """A dataclass: what all units have in common. Results of other settings are not mixed in."""
    units: Callable[[Any, int], list[Unit]]
    """Of the settings and a seed, in the order in which they are done."""
    run: Callable[[Unit, Any, torch.device], Result]
    """Do one unit."""
    tables: Callable[[list[Row], Any], str]
    """The section of the page: Markdown, from the rows that are there and the settings."""


@dataclass(frozen=True)
class Row:
    """A line of a file of results."""

    unit: Unit
    result: Result
    seconds: float
    where: str
    """Device and release of torch."""


def file_of(experiment: Experiment, folder: Path) -> Path:
    return folder / f"{experiment.name}.jsonl"


def load(experiment: Experiment, folder: Path) -> list[Row]:
    """The results that are there.

    Raises:
        ValueError: they were made with other settings, or the file is none of these.
    """
    path = file_of(experiment, folder)
    if not path.exists():
        return []
    lines = whole_lines(path.read_bytes()).splitlines()
    if not lines:
        return []
    try:
        head, *rows = [json.loads(line) for line in lines]
        found = head["settings"]
        rows = [Row(**row) for row in rows]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no file of results: {error}") from error
    wanted = json.loads(json.dumps(asdict(experiment.settings)))
    if found != wanted:
        other = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
        raise ValueError(
            f"{path} has results of other settings ({', '.join(other)}): give another folder with "
            "--results, or move the file away"
        )
    return rows


def whole_lines(content: bytes) -> bytes:
    """Without a last line that a killed process left unfinished."""
    return content[: content.rfind(b"\n") + 1]


def do_missing(
    experiment: Experiment,
    seeds: Sequence[int],
    folder: Path,
    device: torch.device,
    only: Sequence[tuple[str, str]] = (),
) -> Iterator[tuple[Unit, Row]]:
    """Do the units that have no line yet, seeds outermost, and write a line after each.

    Args:
        only: fields and values of theirs, as text: units with other values of these are left out.

    Raises:
        RuntimeError: another process does the same experiment in this folder.
    """
    if not seeds:  # then others may work on it
        return
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder / f".{experiment.name}.lock"):
        done = [row.unit for row in load(experiment, folder)]
        for seed in seeds:
            for unit in experiment.units(experiment.settings, seed):
                if unit in done or any((k, str(unit.get(k))) not in only for k, _ in only):
                    continue
                begun = time.perf_counter()
                result = experiment.run(unit, experiment.settings, device)
                row = Row(unit, result, round(time.perf_counter() - begun, 1), where(device))
                append(experiment, folder, row)
                yield unit, row


@contextmanager
def alone(path: Path) -> Iterator[None]:
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another process works on this experiment: {path}") from None
        yield


def append(experiment: Experiment, folder: Path, row: Row) -> None:
    """Add one line, after the last that is whole, and see that it is on disk."""
    with open(file_of(experiment, folder), "ab+") as file:
        file.seek(0)
        end = len(whole_lines(file.read()))
        file.truncate(end)
        if end == 0:
            file.write(_line({"settings": asdict(experiment.settings)}))
        file.write(_line(asdict(row)))
        file.flush()
        os.fsync(file.fileno())


def _line(content: Any) -> bytes:
    return (json.dumps(content) + "\n").encode()


def where(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}"
