"""The code of the rows for the GPU, on tiny sizes and on the CPU. No time is asserted."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_compiled
from benchmarks.gpu_measure import Bench
from benchmarks.measure import TINY
from benchmarks.rows import OURS, PLAIN

BENCH = Bench("cpu", replace(TINY, seconds=0.0))
HEAVY = ("BERT", "Llama", "first")
"""They import transformers, or start processes."""

LIGHT_JOBS = [job for job in gpu.JOBS if not job.name.startswith(HEAVY)]
HEAVY_JOBS = [
    pytest.param(job, marks=pytest.mark.slow) for job in gpu.JOBS if job.name.startswith(HEAVY)
]
# torch's own: a weight that is read in pieces, and a parametrized LSTM
IGNORED = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


@IGNORED
@pytest.mark.parametrize("job", [*LIGHT_JOBS, *HEAVY_JOBS], ids=lambda job: job.name)
def test_every_row_runs(job: gpu.Job) -> None:
    rows = gpu.measure(job, BENCH, left=120.0)
    assert rows
    for row in rows:
        assert row.skipped is None
        assert row.values[OURS].samples
        assert gpu.told(row)


@pytest.mark.slow
def test_compiled_rows_take_turns_between_processes() -> None:
    rows = gpu_compiled.compiled(BENCH, gpu.COMPILED, seconds=180.0)
    assert len(rows) == 2 * len(gpu.COMPILED)
    for row in rows:
        assert row.skipped is None
        assert {PLAIN, OURS} <= set(row.values)


def test_what_does_not_compile_in_time_is_a_row_that_says_so() -> None:
    begun = time.monotonic()
    (row,) = gpu_compiled.compiled(BENCH, ("graphs",), seconds=0.1)
    assert row.skipped is not None
    assert "ours: did not finish compiling in 0 s" in row.skipped
    assert time.monotonic() - begun < 30


def test_a_row_that_fails_or_takes_too_long_is_told_and_the_others_go_on(
    monkeypatch, tmp_path: Path, capsys
) -> None:
    def broken(bench: Bench) -> list:
        raise ValueError("no such thing\nand more")

    jobs = (
        gpu.Job("broken", broken),
        gpu.Job("slow", lambda bench: time.sleep(30), seconds=0.1),
        next(job for job in gpu.JOBS if job.name == "mask float32"),
    )
    monkeypatch.setattr(gpu, "JOBS", jobs)
    monkeypatch.setattr(gpu, "COMPILED", ())
    rows = gpu.run(BENCH, tmp_path, seconds=60.0)
    assert [row.skipped is None for row in rows] == [False, False, True]
    text = (tmp_path / "bench-gpu.md").read_text()
    assert "- broken: failed: ValueError: no such thing\n" in text
    assert "- slow: failed: TimeoutError: took more than 0 s" in text
    found = json.loads((tmp_path / "bench-gpu.json").read_text())
    assert {"device", "torch", "triton", "transformers", "date"} <= set(found["conditions"])
    assert len(found["rows"]) == 3
    assert "[mask float32: " in capsys.readouterr().out


def test_without_time_nothing_is_begun(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "JOBS", gpu.JOBS[:2])
    rows = gpu.run(BENCH, tmp_path, seconds=0.0)
    assert {row.skipped for row in rows} == {"failed: TimeoutError: no time left"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_so(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert gpu.main([]) == 0
    assert capsys.readouterr().out == (
        "This machine has no GPU that torch can use, so nothing was measured.\n"
    )
    assert not list(tmp_path.iterdir())
