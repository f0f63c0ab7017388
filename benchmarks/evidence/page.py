"""The tables in `docs/evidence.md`, between marks of each experiment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .runs import Experiment, Row, load


def section(experiment: Experiment, rows: list[Row]) -> str:
    """Tables and what they rest on; says so where nothing is complete."""
    if not rows:
        return "Not run yet."
    tables = experiment.tables(rows, experiment.settings)
    places = ", ".join(sorted({row.where for row in rows}))
    minutes = sum(row.seconds for row in rows) / 60
    spent = f"{len(rows)} units in {minutes:.0f} minutes on {places}"
    return f"{tables}\n\n*{spent}. {described(asdict(experiment.settings))}*"


def described(settings: Mapping[str, Any]) -> str:
    """Those that are numbers or words, in a line; what tables show is left out."""
    return ", ".join(_parts(settings)) + "."


def _parts(settings: Mapping[str, Any]) -> Iterator[str]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _parts(value)
        elif isinstance(value, (int, float, str)):
            text = f"{value:g}" if isinstance(value, float) else f"{value}"
            yield f"{name.replace('_', ' ')} {text}"


def rendered(text: str, experiments: Sequence[Experiment], folder: Path) -> str:
    """The page with what lies between `<!-- name -->` and `<!-- end -->` replaced.

    Raises:
        ValueError: the page lacks the marks of an experiment.
    """
    for experiment in experiments:
        begin, end = f"<!-- {experiment.name} -->\n", "<!-- end -->"
        head, _, rest = text.partition(begin)
        if text.count(begin) != 1 or end not in rest:
            raise ValueError(f"the page needs <!-- {experiment.name} --> and <!-- end --> once")
        new = section(experiment, load(experiment, folder))
        text = f"{head}{begin}{new}\n{end}{rest.partition(end)[2]}"
    return text
