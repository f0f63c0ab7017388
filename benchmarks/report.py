"""The results as Markdown and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from surgery.base.files import whole_file

from .conditions import busy
from .growth import Curve
from .measure import Measured
from .rows import OURS, PLAIN, Row

VERDICTS = {True: "yes", False: "**no**", None: "–"}
HEADER = ("work", "plain", "ours", "goal", "reached (quartiles)", "met", "others (plain = 1)")


def number(value: float) -> str:
    """Three digits."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 6)}f}"


def table(rows: Sequence[Row]) -> str:
    """A Markdown table with a line for each row that was measured."""
    lines = [_line(HEADER), _line(["---"] * len(HEADER))]
    lines += [_line(_cells(row)) for row in rows if row.skipped is None]
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row) -> list[str]:
    return [
        row.work + (f" ({row.note})" if row.note else ""),
        _value(row, PLAIN),
        _value(row, OURS),
        "–" if row.goal is None else row.goal.text(row.unit),
        _reached(row),
        VERDICTS[row.met()],
        _others(row),
    ]


def _value(row: Row, name: str) -> str:
    value = row.values.get(name)
    return "–" if value is None else f"{number(value.median)} {row.unit}"


def _reached(row: Row) -> str:
    found = row.reached()
    if found is None:
        found = row.ratio(OURS)
    return "–" if found is None else f"{number(found)} {_spread(row)}".strip()


def _spread(row: Row) -> str:
    """The quartiles of what the goal is about; nothing for a single sample."""
    own = row.values[OURS]
    judge = row.goal.judge if row.goal else "ratio"
    if judge == "ratio":
        base = row.values.get(row.goal.against if row.goal else PLAIN)
        own = own if base is None else own.over(base)
    if judge == "faster" and row.peers:
        own = row.values[min(row.peers, key=lambda name: row.values[name].median)].over(own)
    return _quartiles(own)


def _quartiles(value: Measured) -> str:
    if len(value.samples) == 1:
        return ""
    low, high = value.quartiles
    return f"({number(low)} – {number(high)})"


def _others(row: Row) -> str:
    found = []
    for name in row.values:
        if name in (PLAIN, OURS):
            continue
        ratio = row.ratio(name)
        text = f"{number(row.values[name].median)} {row.unit}" if ratio is None else number(ratio)
        found.append(f"{name} {text}")
    found += [f"{name}: {reason}" for name, reason in row.missing.items()]
    return "<br>".join(found) or "–"


def skipped(rows: Sequence[Row]) -> str:
    """What was not measured, and why."""
    lines = [f"- {row.work}: {row.skipped}" for row in rows if row.skipped is not None]
    return "\n".join(lines) or "Nothing."


def markdown(
    rows: Sequence[Row],
    where: dict[str, Any],
    machine: dict[str, dict[str, Any]],
    seconds: float,
    plots: Sequence[str],
) -> str:
    """The table, what is missing in it, conditions and plots."""
    known = [f"- {name}: {shown(value)}" for name, value in where.items() if value is not None]
    warning = busy(machine["before"]["load"])
    doubt = [] if warning is None else [f"**Warning: {warning}.**", ""]
    changed = [
        f"- {name}: {shown(value)} before, {shown(machine['after'][name])} after"
        for name, value in machine["before"].items()
    ]
    return "\n".join(
        [
            "Medians of one run in which the contenders take turns; a ratio is one of medians, its",
            'quartiles are those of the ratios round by round. "(formula)": published formula, not',
            "the package.",
            "",
            *doubt,
            table(rows),
            "",
            "Not measured:",
            "",
            skipped(rows),
            "",
            "Conditions:",
            "",
            *known,
            *changed,
            f"- duration: {seconds:.0f} s",
            "",
            *(f"![{Path(name).stem}]({name})\n" for name in plots),
        ]
    )


BEGIN, END = "<!-- make bench -->", "<!-- end -->"


def into_page(page: Path, text: str, folder: Path, plots: Sequence[str]) -> None:
    """Put the results between the marks of a page, and the plots beside it.

    Raises:
        ValueError: the page has no marks.
    """
    old = page.read_text()
    if old.count(BEGIN) != 1 or END not in old.partition(BEGIN)[2]:
        raise ValueError(f"{page} needs a line {BEGIN!r} and after it a line {END!r}")
    head, _, rest = old.partition(BEGIN)
    named = {name: f"performance-{name}" for name in plots}
    for name, new in named.items():
        replace(page.parent / new, (folder / name).read_text())
        text = text.replace(f"({name})", f"({new})")
    replace(page, f"{head}{BEGIN}\n{text.strip()}\n{END}{rest.partition(END)[2]}")


def shown(value: Any) -> str:
    """A condition as text."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {part or 'not installed'}" for name, part in value.items())
    return " / ".join(map(str, value)) if isinstance(value, list) else str(value)


def to_json(
    rows: Sequence[Row],
    curves: Sequence[Curve],
    where: dict[str, Any],
    machine: dict[str, dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    return {
        "conditions": where,
        "machine": machine,
        "seconds": seconds,
        "rows": [row.to_json() for row in rows],
        "growth": [curve.to_json() for curve in curves],
    }


def write(folder: Path, report: dict[str, Any], text: str) -> None:
    """Both files, each written whole."""
    folder.mkdir(parents=True, exist_ok=True)
    # NaN is not JSON; a number that is none is a fault of the benchmark and should be seen
    numbers = json.dumps(report, indent=1, allow_nan=False)
    content = {"bench.json": numbers, "bench.md": f"# Benchmarks\n\n{text}"}
    for name, body in content.items():
        replace(folder / name, body + "\n")


def replace(path: Path, text: str) -> None:
    """Write a file whole, or not at all."""
    with whole_file(path) as unfinished:
        Path(unfinished).write_text(text)
