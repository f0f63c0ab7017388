"""The uncertainty example: its texts, its statistics, and the whole script with tiny settings."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import uncertainty
from bbc import Texts
from scipy import stats
from torch.utils.data import DataLoader
from transformers import default_data_collator
from uncertainty import (
    ENTROPY,
    INFORMATION,
    INSIDE,
    MEAN,
    PLAIN,
    TRAVELLED,
    Run,
    auroc,
    aurocs,
    compare_pairs,
    difference,
    drop_class,
    load_texts,
    shuffled_letters,
    shuffled_words,
    summarise,
)


def test_kinds_of_text_are_of_different_articles() -> None:
    options = uncertainty.parse(["--test-size", "50"])
    train, texts = load_texts(options)
    assert train.classes == ["business", "entertainment", "politics", "sports"]
    assert sorted(set(train.labels)) == [0, 1, 2, 3]
    assert list(texts) == [INSIDE, "class tech", "shuffled words", "shuffled letters"]
    assert [len(own) for own in texts.values()] == [50] * 4
    bags = [
        frozenset(Counter("".join(sorted(text.split() and "".join(text.split())))).items())
        for own in (train, *texts.values())
        for text in own.texts
    ]
    assert len(set(bags)) == len(bags)  # not even the same letters


def test_an_unknown_class_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^--held-out must be one of \['business', .*got 'art'$"):
        load_texts(uncertainty.parse(["--held-out", "art"]))


def test_dropping_a_class_renumbers_the_others() -> None:
    data = Texts(["a", "b", "c", "d"], [0, 1, 2, 0], ["x", "y", "z"])
    assert drop_class(data, 1) == Texts(["a", "c", "d"], [0, 1, 0], ["x", "z"])


def test_shuffling_keeps_words_or_their_letters() -> None:
    text = "The quick  brown\nfox jumps over it"
    words = shuffled_words(text, random.Random(1))
    assert words.split() != text.split()
    assert sorted(words.split()) == sorted(text.split())
    letters = shuffled_letters(text, random.Random(1))
    assert [sorted(word) for word in letters.split()] == [sorted(word) for word in text.split()]
    assert letters.split() != text.split()


def test_auroc_is_the_mann_whitney_statistic() -> None:
    draw = np.random.default_rng(0)
    inside, outside = draw.integers(0, 9, 60), draw.integers(2, 12, 45)  # with ties
    expected = stats.mannwhitneyu(outside, inside).statistic / (60 * 45)
    assert auroc(inside, outside).value == pytest.approx(expected, abs=1e-12)
    assert auroc(np.zeros(3), np.ones(4)).value == 1.0
    assert auroc(np.zeros(3), np.zeros(4)).value == 0.5


def test_standard_errors_are_those_of_repeated_samples() -> None:
    """The spread over 2000 samples is known to 1.6 %, the mean estimate better: 8 % is 5 errors."""
    draw = np.random.default_rng(0)
    values, gaps, errors, gap_errors = [], [], [], []
    for _ in range(2000):
        noise = draw.normal(size=120)
        score = noise + np.repeat([0.0, 0.8], 60)
        other = 0.7 * noise + 0.7 * draw.normal(size=120) + np.repeat([0.0, 0.5], 60)
        one, two = (auroc(s[:60], s[60:]) for s in (score, other))
        values.append(one.value)
        errors.append(one.error)
        gap, error = difference(one, two)
        gaps.append(gap)
        gap_errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.08)
    assert np.mean(gap_errors) == pytest.approx(np.std(gaps), rel=0.08)


def run_of(shift: float) -> Run:
    """A run whose mutual information tells two kinds apart better by `shift`."""
    draw = np.random.default_rng(0)
    inside, outside = draw.normal(size=40), draw.normal(size=40) + 1
    scores = {
        name: {INSIDE: inside, "other": outside + (shift if name == INFORMATION else 0)}
        for name in (PLAIN, MEAN, ENTROPY, INFORMATION, TRAVELLED)
    }
    return Run(scores, dict.fromkeys(scores, 0.9))


def test_table_has_a_row_for_each_measure() -> None:
    lines = summarise([run_of(1.0)]).splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == [
        PLAIN,
        MEAN,
        ENTROPY,
        INFORMATION,
        TRAVELLED,
    ]
    own = aurocs([run_of(1.0)], INFORMATION, "other")[0]
    assert f"{own.value:.3f} ± {own.error:.3f}" in lines[-2]
    assert lines[-1].endswith("90.0 %")
    assert f"{own.value:.3f} ± 0.000" in summarise([run_of(1.0), run_of(1.0)]).splitlines()[-2]


@pytest.mark.parametrize(
    ("shift", "verdict"),
    [(0.0, "within noise"), (2.0, "more than noise"), (-2.0, "more than noise")],
)
def test_verdict_of_one_seed(shift: float, verdict: str) -> None:
    pair = (aurocs([run_of(shift)], name, "other") for name in (INFORMATION, PLAIN))
    assert verdict in compare_pairs("other", *pair)


def test_batches_go_through_all_examples_before_they_repeat() -> None:
    batches = uncertainty.batches_of(10, 4)
    for _ in range(2):
        epoch = torch.cat([next(batches) for _ in range(3)])
        assert sorted(epoch.tolist()) == list(range(10))


def test_a_loader_of_the_examples_gives_the_inputs_again() -> None:
    inputs = {"input_ids": torch.arange(12).view(4, 3), "attention_mask": torch.ones(4, 3).long()}
    rows = uncertainty.examples(inputs, [0, 1, 2, 3])
    batches = list(DataLoader(rows, 3, collate_fn=default_data_collator))
    assert [len(batch["labels"]) for batch in batches] == [3, 1]
    for name, value in {**inputs, "labels": torch.arange(4)}.items():
        assert torch.equal(torch.cat([batch[name] for batch in batches]), value)


def test_defaults_are_the_documented_run() -> None:
    options = uncertainty.parse([])
    assert isinstance(options, argparse.Namespace)
    assert (options.seeds, options.held_out) == (1, "tech")
    assert options.output == Path("out/uncertainty")


def test_a_model_without_dropconnect_is_always_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        uncertainty.parse(["--p", "0"])
    assert "--p must be in (0, 1)" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 2])
def test_script(
    seeds: int, run_example: Callable[[str], subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    size = "--steps 4 --train-size 32 --test-size 24 --max-length 16 --samples 4"
    done = run_example(f"examples/uncertainty.py {size} --seeds {seeds}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("noise") == 12
    assert "warn" not in done.stderr.lower()
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["runs"]) == seeds
    assert all(0 <= v <= 1.4 for v in results["runs"][0]["scores"][INFORMATION]["class tech"])
    assert (tmp_path / "uncertainty.png").stat().st_size > 10_000
