"""A row of the table: what was done, what each contender needed, and the goal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .measure import Measured, Settings

PLAIN, OURS = "plain", "ours"

Judge = Literal["ratio", "value", "faster"]


@dataclass(frozen=True)
class Goal:
    """What a row should reach."""

    bound: float
    judge: Judge = "ratio"
    """What is compared with the bound: ours / plain, ours itself (both at most), or the fastest peer /
    ours (at least)."""
    against: str = PLAIN
    """Name of the contender that counts as 1."""

    def text(self, unit: str) -> str:
        if self.judge == "value":
            return f"≤ {self.bound:g} {unit}"
        return f"≤ {self.bound:g}" if self.judge == "ratio" else f"≥ {self.bound:g}x faster"


@dataclass
class Row:
    """One line of the table, all of whose numbers come from one run."""

    section: str
    work: str
    unit: str
    goal: Goal | None = None
    values: dict[str, Measured] = field(default_factory=dict)
    """In `unit`, by contender; `plain` and `ours` among them where they exist."""
    missing: dict[str, str] = field(default_factory=dict)
    """Contenders that did not run, and why."""
    skipped: str | None = None
    """Why the row was not measured at all."""
    note: str = ""

    def ratio(self, name: str) -> float | None:
        """The ratio of medians to the contender that counts as 1."""
        base = self.values.get(self.goal.against if self.goal else PLAIN)
        if base is None or name not in self.values or base.median == 0:
            return None
        return self.values[name].median / base.median

    @property
    def peers(self) -> list[str]:
        """Contenders that are neither plain nor ours."""
        return [name for name in self.values if name != PLAIN and not name.startswith(OURS)]

    def reached(self) -> float | None:
        """The number that the goal is about."""
        if self.goal is None or OURS not in self.values:
            return None
        own = self.values[OURS].median
        if self.goal.judge == "value":
            return own
        if self.goal.judge == "ratio":
            return self.ratio(OURS)
        return min(self.values[name].median for name in self.peers) / own if self.peers else None

    def met(self) -> bool | None:
        """Whether the goal was reached; None without a goal or a number."""
        found = self.reached()
        if found is None or self.goal is None:
            return None
        return found >= self.goal.bound if self.goal.judge == "faster" else found <= self.goal.bound

    def to_json(self) -> dict[str, Any]:
        return {
            "section": self.section,
            "work": self.work,
            "unit": self.unit,
            "goal": None if self.goal is None else self.goal.text(self.unit),
            "reached": self.reached(),
            "met": self.met(),
            "skipped": self.skipped,
            "note": self.note,
            "missing": self.missing,
            "contenders": {name: self._cell(name) for name in self.values},
        }

    def _cell(self, name: str) -> dict[str, Any]:
        value = self.values[name]
        return {
            "median": value.median,
            "quartiles": list(value.quartiles),
            "samples": list(value.samples),
            "ratio": self.ratio(name),
        }


Benchmark = Callable[[Settings], list[Row]]


def in_unit(values: Mapping[str, Measured], factor: float) -> dict[str, Measured]:
    """All measurements times a factor."""
    return {name: value.scaled(factor) for name, value in values.items()}


MILLI, MICRO, NANO = 1e3, 1e6, 1e9
