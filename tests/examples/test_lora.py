"""The LoRA example: its statistics, and the whole script with tiny settings."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

if find_spec("peft") is None:
    pytest.skip("the example needs peft", allow_module_level=True)

import lora
from lora import DROPCONNECT, DROPOUT, LORA, Run, difference, summarise


def run_of(correct: list[int], same: bool = True) -> Run:
    return Run(np.array(correct, dtype=bool), [1.0, 0.5], 1234, same)


def test_table_has_a_row_for_each_method() -> None:
    runs = {LORA: [run_of([1, 1, 1, 0])], DROPCONNECT: [run_of([1, 0, 1, 0], same=False)]}
    rows = summarise(runs).splitlines()[2:]
    assert "75.00 ± 21.65 %" in rows[0]
    assert rows[0].endswith("yes")
    assert "50.00 ± 25.00 %" in rows[1]
    assert rows[1].endswith("NO")
    assert "62.50 ± 12.50 %" in summarise({LORA: [*runs[LORA], *runs[DROPCONNECT]]})


def test_differences_are_paired() -> None:
    """By text where there is one seed: equal answers differ by nothing, with no error."""
    one = run_of([1, 0] * 50)
    assert "+0.00 ± 0.00 points, within noise" in difference(DROPOUT, [one], [one])
    better = run_of([1] * 100)
    assert "+50.00 ± 5.00 points, more than noise" in difference(DROPOUT, [better], [one])
    seeds = difference(DROPOUT, [better, run_of([1, 1, 1, 0] * 25)], [one, one])
    assert "+37.50 ± 12.50 points, within noise" in seeds


def test_defaults_are_the_documented_run() -> None:
    options = lora.parse([])
    assert (options.seeds, options.output) == (1, Path("out/lora"))


@pytest.mark.slow
def test_script(
    run_example: Callable[[str], subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    size = "--steps 4 --train-size 32 --test-size 24 --max-length 16"
    done = run_example(f"examples/lora.py {size}")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("LoRA")]
    assert [row.split("  ")[0] for row in rows] == [LORA, DROPOUT, DROPCONNECT]
    assert all(row.endswith("yes") for row in rows)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["runs"]) == [LORA, DROPOUT, DROPCONNECT]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "lora.png").stat().st_size > 10_000
