"""The main example: its statistics, and the whole script with tiny settings."""

from __future__ import annotations

import argparse
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import finetune_trainer
import numpy as np
import pytest
from finetune_trainer import BASELINE, ZERO, Run, compare, curve, estimate, summarise


def run_of(correct: list[int], seed: int = 0, **known: Any) -> Run:
    fields = {"step_seconds": 0.25, "memory": 900.0, "history": [], **known}
    return Run(ZERO, seed, np.array(correct, dtype=bool), **fields)


def test_the_paired_error_of_one_seed_is_mcnemars() -> None:
    n, better, worse = 1000, 30, 12
    baseline = run_of([0] * better + [1] * (n - better))
    method = run_of([1] * (n - worse) + [0] * worse)
    difference = (better - worse) / n
    error = math.sqrt((better + worse - (better - worse) ** 2 / n) / n**2)
    text = compare(ZERO, [method], [baseline])
    assert f"{100 * difference:+.2f} ± {100 * error:.2f} points (paired)" in text
    assert "more than noise" in text


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [
        (10, 9, "within noise"),
        (30, 5, "more than noise"),
        (5, 30, "more than noise"),
        (0, 0, "within"),
    ],
)
def test_verdict_of_one_seed(better: int, worse: int, verdict: str) -> None:
    n = 500
    baseline = run_of([0] * better + [1] * (n - better))
    method = run_of([1] * (n - worse) + [0] * worse)
    assert verdict in compare(ZERO, [method], [baseline])


def test_several_seeds_are_compared_in_pairs() -> None:
    accuracies = [(0.90, 0.91), (0.80, 0.82), (0.95, 0.96)]
    runs = [
        [run_of([1] * int(1000 * a) + [0] * (1000 - int(1000 * a))) for a in pair]
        for pair in accuracies
    ]
    text = compare(ZERO, [own for _, own in runs], [base for base, _ in runs])
    # differences 1, 2, 1 points: mean 1.33, standard error 0.33, limit 4.30 standard errors
    assert "+1.33 ± 0.33 points" in text
    assert "within noise" in text
    assert "95 % limit: 1.43" in text


def test_estimate_over_seeds() -> None:
    assert estimate([0.5], 0.1) == (0.5, 0.1)
    assert estimate([1.0, 2.0, 3.0], 0.1) == (2.0, 1.0 / math.sqrt(3))


def test_table_has_the_binomial_error_of_one_seed() -> None:
    table = summarise({BASELINE: [run_of([1] * 90 + [0] * 10)]})
    assert " ".join(table.splitlines()[-1].split()) == "baseline 90.00 ± 3.00 % 250 900 MB"


def test_curves_are_means_over_seeds() -> None:
    histories = [
        [{"step": 1, "loss": a}, {"step": 1, "eval_loss": 9.0}, {"step": 2, "loss": b}]
        for a, b in ((1.0, 0.5), (3.0, 1.5))
    ]
    steps, values = curve([run_of([1], history=history) for history in histories], "loss")
    assert steps.tolist() == [1, 2]
    assert values.tolist() == [2.0, 1.0]


def test_hub_data_sets_need_text_and_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, n in (("train", 40), ("test", 30)):
        rows = [f'"text {split} {i}",{"yes" if i % 2 else "no"}' for i in range(n)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    train, validation, test = finetune_trainer.load_hub_dataset(str(tmp_path), 20, 10, 12)
    assert [len(train), len(validation), len(test)] == [20, 10, 12]
    assert train.classes == ["no", "yes"]
    assert train.labels.count(1) == 10
    assert not set(train.texts) & set(validation.texts)


def test_defaults_are_the_documented_run() -> None:
    options = finetune_trainer.parse([])
    assert isinstance(options, argparse.Namespace)
    assert options.steps >= 96
    assert (options.seeds, options.output) == (1, Path("out/finetune"))


@pytest.mark.slow
def test_script(
    run_example: Callable[[str], subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    command = "examples/finetune_trainer.py --steps 4 --train-size 32 --test-size 64"
    done = run_example(f"{command} --max-length 16")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("True\n") == 2
    assert "False" not in done.stdout
    assert done.stdout.count("within noise") + done.stdout.count("more than noise") == 2
    assert "warn" not in done.stderr.lower()
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    saved = {file.name for file in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors"} <= saved
    assert "dropconnect.json" not in saved
