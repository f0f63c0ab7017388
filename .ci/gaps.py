"""Print what tests have not reached: a table of the rooms, then lines and branches, file by file.

    coverage json -o - | python .ci/gaps.py

`12-15` are lines; `12>20` is a branch, from a line that was reached to one that was not reached from it
(`12>out`: the end of the function).
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any


def room(path: str) -> str:
    """The folder of a file."""
    return str(PurePath(path).parent)


def ranges(lines: Iterable[int]) -> list[str]:
    """Numbers as text, neighbours together."""
    found: list[list[int]] = []
    for line in sorted(lines):
        if found and line == found[-1][1] + 1:
            found[-1][1] = line
        else:
            found.append([line, line])
    return [str(first) if first == last else f"{first}-{last}" for first, last in found]


def gaps(file: dict[str, Any]) -> list[str]:
    """What was not reached of one file. Branches to lines that are named themselves are left out."""
    lines = set(file["missing_lines"])
    branches = [pair for pair in file["missing_branches"] if not lines & {*map(abs, pair)}]
    return ranges(lines) + [f"{at}>{to if to > 0 else 'out'}" for at, to in branches]


def row(name: str, files: list[dict[str, Any]]) -> str:
    """A row of the table: what there is, and what was not reached."""
    of = ("num_statements", "missing_lines", "num_branches", "missing_branches")
    lines, no_lines, branches, no_branches = (
        sum(one["summary"][key] for one in files) for key in of
    )
    share = 1 - (no_lines + no_branches) / max(1, lines + branches)
    return f"| {name} | {lines} | {no_lines} | {branches} | {no_branches} | {share:.1%} |"


def main() -> None:
    files = json.load(sys.stdin)["files"]
    rooms: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path, file in sorted(files.items()):
        rooms[room(path)].append(file)
    print("| room | lines | not reached | branches | not reached | reached |")
    print("|---|---|---|---|---|---|")
    for name, inside in rooms.items():
        print(row(name, inside))
    print(row("all", list(files.values())))
    for path, file in sorted(files.items()):
        if found := gaps(file):
            print(f"{path}:", ", ".join(found))


if __name__ == "__main__":
    main()
