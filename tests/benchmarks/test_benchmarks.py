"""The benchmarks run, on tiny sizes, and their table and JSON are well-formed. No time is asserted."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import __main__ as command
from benchmarks import measure, memory, peers, report, verbs
from benchmarks.measure import TINY, Measured, Settings, interleaved
from benchmarks.rows import Goal, Row
from surgery import strip_dropconnect

IN_THIS_PROCESS = (
    "mask",
    pytest.param("rounds", marks=pytest.mark.slow),
    "linear",
    "mixout",
    "lstm",
    "host",
    "kept",
    "example",
    "gaussian",
    "moments",
)


def row(goal: Goal | None = None, **values: float) -> Row:
    return Row("a", "work", "ms", goal, {name: Measured((v,)) for name, v in values.items()})


@pytest.mark.parametrize("name", [*IN_THIS_PROCESS, "predict", "apply", "set_p"])
def test_every_benchmark_runs(name: str) -> None:
    rows = command.measure(name, TINY)
    assert rows
    for found in rows:
        assert "failed" not in (found.skipped or "")
        assert found.skipped or found.values["ours"].samples


def test_quick_run_leaves_out_what_takes_long() -> None:
    quick = Settings(rounds=1, seconds=0.0, sample=0.0, quick=True, divide=64)
    for name in ("transformer", "trainer", "peaks", "first"):
        for found in command.measure(name, quick):
            assert found.skipped


def test_run_writes_table_json_and_plots(tmp_path: Path) -> None:
    assert command.run(["linear", "apply", "growth"], TINY, tmp_path)
    found = json.loads((tmp_path / "bench.json").read_text())
    assert {"conditions", "machine", "seconds", "rows", "growth"} == set(found)
    assert {"cpu", "cores", "threads", "torch", "compiler", "commit"} <= set(found["conditions"])
    assert set(found["machine"]["before"]) == set(found["machine"]["after"])
    linear = found["rows"][0]
    assert linear["work"].startswith("Linear")
    assert len(linear["contenders"]["ours"]["samples"]) >= measure.FEWEST
    assert linear["contenders"]["plain"]["ratio"] == 1
    assert linear["reached"] == linear["contenders"]["ours"]["ratio"]
    for curve in found["growth"]:
        assert {len(values) for values in curve["median"].values()} == {len(curve["points"])}
    text = (tmp_path / "bench.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count(" | ") for line in lines} == {len(report.HEADER) - 1}
    assert "Not measured:\n\nNothing." in text
    drawn = re.findall(r"!\[\w+\]\((.*)\)", text)
    assert drawn == ["ratios.svg", "growth.svg"]
    assert all((tmp_path / name).read_text().startswith("<?xml") for name in drawn)


def test_results_go_between_the_marks_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert command.run(["apply"], TINY, tmp_path, page)
    first = page.read_text()
    assert first.startswith(f"before\n{report.BEGIN}\nMedians")
    assert first.endswith(f"{report.END}\nafter\n")
    assert "old" not in first
    for name in re.findall(r"!\[\w+\]\((.*)\)", first):
        assert (page.parent / name).is_file()
    page.write_text("no marks")
    with pytest.raises(ValueError, match="needs a line"):
        report.into_page(page, "text", tmp_path, [])
    assert page.read_text() == "no marks"


def test_a_benchmark_that_fails_is_a_row_that_says_so(monkeypatch, tmp_path: Path) -> None:
    def broken(settings: Settings) -> list[Row]:
        raise ValueError("no such thing\nand more")

    monkeypatch.setitem(command.BENCHMARKS, "linear", broken)
    assert not command.run(["linear"], TINY, tmp_path)
    assert "- linear: failed: ValueError: no such thing" in (tmp_path / "bench.md").read_text()


def test_contenders_take_turns() -> None:
    calls: list[str] = []
    works = {name: lambda n=name: calls.append(n) for name in "ABC"}
    found = interleaved(works, Settings(rounds=4, seconds=60.0, sample=0.0))
    assert "".join(calls).endswith("ABC" * 4)
    assert {len(value.samples) for value in found.values()} == {4}


def test_a_contender_that_takes_seconds_has_few_rounds(monkeypatch) -> None:
    monkeypatch.setattr(measure, "SLOW", 0.001)
    works = {"fast": lambda: None, "slow": lambda: time.sleep(0.002)}
    found = interleaved(works, Settings(rounds=9, fewest=7, seconds=0.0, sample=0.0))
    assert {name: len(value.samples) for name, value in found.items()} == {"fast": 7, "slow": 3}


@pytest.mark.parametrize(
    ("goal", "values", "reached", "met"),
    [
        (Goal(1.5), {"plain": 2.0, "ours": 3.0}, 1.5, True),
        (Goal(1.4), {"plain": 2.0, "ours": 3.0}, 1.5, False),
        (Goal(3.0, "value"), {"plain": 2.0, "ours": 3.0}, 3.0, True),
        (Goal(2.0, "faster"), {"plain": 1.0, "ours": 3.0, "a": 9.0, "b": 6.0}, 2.0, True),
        (Goal(2.5, "faster"), {"plain": 1.0, "ours": 3.0, "a": 9.0, "b": 6.0}, 2.0, False),
        (Goal(1.0), {"plain": 2.0}, None, None),
        (None, {"plain": 2.0, "ours": 3.0}, None, None),
    ],
)
def test_goals(goal: Goal | None, values: dict[str, float], reached: float, met: bool) -> None:
    found = row(goal, **values)
    assert found.reached() == reached
    assert found.met() is met


def test_quartiles() -> None:
    assert Measured((1.0, 2.0, 3.0, 4.0, 5.0)).quartiles == (2.0, 4.0)
    assert Measured((7.0,)).quartiles == (7.0, 7.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.01234, "0.0123"), (1.0666, "1.07"), (12.34, "12.3"), (8192.0, "8,192")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert report.number(value) == text


def test_bytes_kept_counts_what_a_peer_keeps() -> None:
    """The mask and the masked weight of `F.dropout(W)`, and nothing for a module without either."""
    layer = nn.Linear(32, 32)
    x = torch.randn(4, 32, requires_grad=True)
    plain = memory.bytes_after_forward(layer, x)
    assert plain == 4 * 32 * 4
    dropped = memory.bytes_after_forward(peers.f_dropout(layer, [], 0.5), x)
    assert dropped - plain == 2 * 32 * 32 * 4


def test_copied_tensors_are_counted(monkeypatch) -> None:
    model = verbs.many_linears(3)
    assert verbs.weights_made(model) == 0

    def copying(model: nn.Module) -> nn.Module:
        model = strip_dropconnect(model)
        model.fc1.weight = nn.Parameter(model.fc1.weight.detach().clone())
        return model

    monkeypatch.setattr(verbs, "strip_dropconnect", copying)
    assert verbs.weights_made(model) >= 2  # the copy, and a parameter that is another one


def test_a_peer_that_is_missing_is_named_with_the_reason(monkeypatch) -> None:
    monkeypatch.setitem(peers.MODULES, peers.BAAL, "no_such_module")
    made, missing = peers.available({peers.BAAL: lambda: peers.baal(nn.Linear(2, 2), [], 0.5)})
    assert made == {}
    assert missing[peers.BAAL].startswith("not installable: ModuleNotFoundError")
