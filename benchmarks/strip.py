"""`surgery strip` on a long file, beside `cp`: time and peak memory. Without torch.

python -m benchmarks.strip                                # a table
python -m benchmarks.strip --page docs/command-line.md    # make bench-strip
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from surgery.checkpoints.inspection import inspect_checkpoint
from surgery.stored.header import TensorType, encoded, placed

TENSORS = 200
BEGIN, END = "<!-- strip -->", "<!-- end -->"

STRIP = """
import sys
from surgery.checkpoints.strip import strip_checkpoint
strip_checkpoint(sys.argv[1], sys.argv[2], verify=sys.argv[3] == "verify")
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""
"""Prints the peak of the memory of its process, in kB."""


class Way(NamedTuple):
    """One way to have the file again."""

    name: str
    source: str
    """Which file it reads."""
    command: list[str]
    """What is run, before the names of the two files and the `rest`."""
    rest: list[str]


PYTHON = [sys.executable, "-c", STRIP]
WAYS = (
    Way("`cp`, `sync`", "raw", ["sh", "-c", 'cp "$1" "$2" && sync "$2"', "cp"], []),
    Way("`surgery strip`", "raw", PYTHON, ["verify"]),
    Way("`surgery strip --no-verify`", "raw", PYTHON, ["no"]),
    Way("`surgery strip`, half of it anchors", "anchored", PYTHON, ["verify"]),
)


def write(path: Path, size: int, anchored: bool) -> None:
    """A file whose plain tensors have so many bytes in all, and as much again of anchors."""
    entries = size // TENSORS // 4
    keys = [f"layers.{number}.weight_raw" for number in range(TENSORS)]
    if anchored:
        keys = [key for raw in keys for key in (raw, raw.replace("_raw", "_anchor"))]
    types = dict.fromkeys(keys, TensorType("F32", (entries,)))
    head = encoded(placed(types), {"format": "pt"})
    block = os.urandom(1 << 24)
    left = 4 * entries * len(keys)
    with open(path, "wb") as file:
        file.write(head)
        while left:
            left -= file.write(block[: min(left, len(block))])


def run(way: Way, folder: Path) -> tuple[float, int | None]:
    """Seconds, and the peak of memory in kB if it says so."""
    out = folder / "out.safetensors"
    out.unlink(missing_ok=True)
    os.sync()
    begun = time.perf_counter()
    command = [*way.command, str(folder / f"{way.source}.safetensors"), str(out), *way.rest]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - begun
    if way.command == PYTHON and inspect_checkpoint(out).count("plain") != TENSORS:
        raise RuntimeError(f"{way.name} did not make the file plain")
    return seconds, int(done.stdout) if done.stdout.strip() else None


def measure(folder: Path, size: int, rounds: int) -> list[str]:
    """The rows of the table: the ways take turns, and the fastest of each counts."""
    for name in ("raw", "anchored"):
        write(
            folder / f"{name}.safetensors", size // (2 if name == "anchored" else 1), name != "raw"
        )
    found: dict[str, list[tuple[float, int | None]]] = {way.name: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            found[way.name].append(run(way, folder))
    load = os.getloadavg()[0]
    rows = [
        f"| {size / 1e9:g} GB | seconds, best of {rounds} (median) | peak memory |",
        "|---|---|---|",
    ]
    for name, runs in found.items():
        times = [seconds for seconds, _ in runs]
        peaks = [peak for _, peak in runs if peak is not None]
        memory = f"{max(peaks) * 1024 / 1e6:.0f} MB" if peaks else "–"
        rows.append(f"| {name} | {min(times):.1f} ({statistics.median(times):.1f}) | {memory} |")
    busy = f"{os.cpu_count()} cores, with a load of {load:.0f}"
    return [
        *rows,
        "",
        f"(Linux, {busy}. To compare takes time of a core, to copy that of the disk.)",
    ]


def into_page(page: Path, rows: list[str]) -> None:
    """Put the table between the marks of a page."""
    head, mark, rest = page.read_text().partition(BEGIN)
    if not mark or END not in rest:
        raise ValueError(f"{page} needs a line {BEGIN!r} and after it a line {END!r}")
    tail = rest.partition(END)[2]
    page.write_text("\n".join([f"{head}{BEGIN}", *rows, END]) + tail)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write; three times as much room")
    parser.add_argument("--page", type=Path, help="put the table into this page")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        rows = measure(folder, int(options.gigabytes * 1e9), options.rounds)
    finally:
        shutil.rmtree(folder)
    print("\n".join(rows))
    if options.page is not None:
        into_page(options.page, rows)


if __name__ == "__main__":
    main()
