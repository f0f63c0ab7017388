"""The pictures: every ratio beside its peers, and how cost grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from .growth import Curve
from .rows import OURS, PLAIN, Row

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

COLOURS = {PLAIN: "#555555", OURS: "#d55e00"}
OTHERS = ("#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#888888", "#11a579")


def draw(rows: Sequence[Row], curves: Sequence[Curve], folder: Path) -> list[str]:
    """Names of the files that were drawn in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    compared = [row for row in rows if row.ratio(OURS) is not None and row.section != "memory"]
    if compared:
        drawn.append(_ratios(compared, folder / "ratios.svg"))
    if curves:
        drawn.append(_growth(curves, folder / "growth.svg"))
    return drawn


def _ratios(rows: Sequence[Row], path: Path) -> str:
    """A line for each row: plain at 1, ours, and each peer."""
    height = 1.5 + 0.42 * len(rows)
    figure, axes = plt.subplots(figsize=(11, height), layout="constrained")
    colour = _colours([name for row in rows for name in row.values])
    seen: set[str] = set()
    for place, row in enumerate(rows):
        for name in row.values:
            ratio = row.ratio(name)
            if name == PLAIN or ratio is None or ratio <= 0:
                continue
            label = None if name in seen else name
            seen.add(name)
            size = 70 if name == OURS else 32
            axes.scatter(ratio, place, size, color=colour[name], label=label, zorder=3)
        if row.goal is not None and row.goal.judge == "ratio":
            axes.plot([row.goal.bound] * 2, [place - 0.35, place + 0.35], color="black", zorder=2)
    axes.axvline(1, color=COLOURS[PLAIN], linewidth=1)
    axes.set(xscale="log", xlabel="plain = 1; black: the goal", ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), [row.work for row in rows], fontsize=8)
    axes.grid(alpha=0.3)
    figure.legend(frameon=False, loc="outside lower center", ncols=3, fontsize=8)
    return _save(figure, path)


def _growth(curves: Sequence[Curve], path: Path) -> str:
    figure, panels = plt.subplots(1, len(curves), figsize=(4.6 * len(curves), 4.2), squeeze=False)
    figure.set_layout_engine("constrained")
    for axes, curve in zip(panels[0], curves):
        colour = _colours(list(curve.series))
        for name, values in curve.series.items():
            low, high = zip(*(value.quartiles for value in values))
            axes.fill_between(curve.points, low, high, color=colour[name], alpha=0.2)
            middle = [value.median for value in values]
            axes.plot(curve.points, middle, color=colour[name], marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel=curve.axis, ylabel=curve.unit)
        axes.set_title(curve.title, fontsize=9)
        axes.grid(alpha=0.3)
    panels[0][0].legend(frameon=False)
    return _save(figure, path)


def _colours(names: Sequence[str]) -> dict[str, str]:
    others = sorted(set(names) - set(COLOURS))
    return {**{name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}, **COLOURS}


def _save(figure: Figure, path: Path) -> str:
    figure.savefig(path)
    plt.close(figure)
    return path.name
