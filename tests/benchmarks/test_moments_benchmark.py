"""The tables of `benchmarks.moments`, of a small network and few samples."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

moments = pytest.importorskip("benchmarks.moments")
models = pytest.importorskip("benchmarks.moments_models")


def test_a_table_and_its_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    case = dataclasses.replace(models.perceptron(1, 0.2, 2), forms=("diagonal", 2))
    text, points, spread = moments.table(case, 8)
    rows = text.splitlines()
    assert rows[0] == "### MLP 32-64-10, p = 0.2"
    ways = ["plain weights", "the paper, 10 draws", "the paper, 100 draws", "diagonal", "2 draws"]
    assert [row.split("|")[1].strip() for row in rows[6:]] == ways
    assert [point.name for point in points] == [
        "plain weights",
        "the paper, Z = 10",
        "the paper, Z = 100",
        "one pass, diagonal",
        "one pass, 2 draws",
    ]
    assert spread > 0
    moments.draw(case.name, points, spread, tmp_path / "moments.png")
    assert (tmp_path / "moments.png").stat().st_size > 5000


def test_costs_of_every_way() -> None:
    cost = pytest.importorskip("benchmarks.moments_cost")
    case = models.perceptron(1, 0.2, 2)
    found = cost.times(case.model, case.inputs, 0.0)
    assert list(found) == ["plain", "diagonal", "outputs", "8 draws", "2 samples"]
    assert all(seconds > 0 for seconds in found.values())
