"""Tables of means over seeds, and of differences that are paired by seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from report import estimate
from scipy import stats

from .runs import Row

Values = Mapping[int, float]
"""By seed."""


@dataclass(frozen=True)
class Column:
    """One measure."""

    title: str
    key: str
    """Of the result."""
    digits: int = 1


def select(rows: Sequence[Row], **fields: object) -> list[Row]:
    """The rows of which the unit has these fields."""
    return [row for row in rows if all(row.unit.get(k) == v for k, v in fields.items())]


def values(rows: Sequence[Row], key: str) -> Values:
    return {row.unit["seed"]: row.result[key] for row in rows if key in row.result}


def mean(own: Values, digits: int) -> str:
    """With its standard error, if there are two seeds or more."""
    if len(own) < 2:
        return f"{next(iter(own.values())):.{digits}f}"
    middle, error = estimate(list(own.values()))
    return f"{middle:.{digits}f} ± {error:.{digits}f}"


def paired(own: Values, base: Values) -> list[float]:
    """Differences, of the seeds that both have."""
    return [own[seed] - base[seed] for seed in sorted({*own} & {*base})]


def difference(gaps: Sequence[float], digits: int) -> str:
    """Their mean, its standard error, and a star where that is more than noise."""
    if not gaps:
        return "–"
    if len(gaps) < 2:
        return f"{gaps[0]:+.{digits}f}"
    middle, error = estimate(gaps)
    star = "*" if beyond_noise(gaps) else ""
    return f"{middle:+.{digits}f} ± {error:.{digits}f}{star}"


def beyond_noise(gaps: Sequence[float]) -> bool:
    """Whether their mean is outside of the 95 % limits of Student's t."""
    middle, error = estimate(gaps)
    return abs(middle) > error * float(stats.t.ppf(0.975, len(gaps) - 1))


def table(
    named: Mapping[str, Sequence[Row]], base: str, columns: Sequence[Column], first: str = "method"
) -> str:
    """A line for each name that has rows. That of `base` has means with their errors, the others means
    and differences to it."""
    lines = [
        f"| {first} | seeds | " + " | ".join(column.title for column in columns) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for name, rows in named.items():
        if rows:
            cells = [cell(rows, named[base] if name != base else None, own) for own in columns]
            seeds = len({row.unit["seed"] for row in rows})
            lines.append(f"| {name} | {seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(rows: Sequence[Row], base: Sequence[Row] | None, column: Column) -> str:
    own, digits = values(rows, column.key), column.digits
    if not own:
        return "–"
    if base is None:
        return mean(own, digits)
    middle = sum(own.values()) / len(own)
    gaps = difference(paired(own, values(base, column.key)), digits)
    return f"{middle:.{digits}f} ({gaps})"


def by(
    rows: Sequence[Row], names: Sequence[str], key: Callable[[Row], str]
) -> dict[str, list[Row]]:
    """Rows by name, in the order of the names."""
    return {name: [row for row in rows if key(row) == name] for name in names}
