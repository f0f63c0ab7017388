"""The language model example: its text handling, its perplexity, and a tiny training."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import train_lstm
from bbc import Texts
from torch import nn
from train_lstm import LanguageModel, Run, columns, describe, perplexity, tokenize, windows


def test_windows_predict_every_word_but_the_first_once() -> None:
    words = torch.arange(24).view(12, 2)
    pairs = list(windows(words, 5))
    assert [len(inputs) for inputs, _ in pairs] == [5, 5, 1]
    assert torch.equal(torch.cat([inputs for inputs, _ in pairs]), words[:-1])
    assert torch.equal(torch.cat([targets for _, targets in pairs]), words[1:])


def test_columns_read_down() -> None:
    vocabulary = ["<unk>", "a", "b", "c"]
    assert columns(["a", "b", "c", "x", "b", "b", "c"], vocabulary, 2).t().tolist() == [
        [1, 2, 3],
        [0, 2, 2],
    ]


def test_tokens() -> None:
    assert tokenize(Texts(["It's £10!", "Go."], [0, 0], ["a"])) == [
        *("it", "'", "s", "£", "1", "0", "!", "<eos>"),
        *("go", ".", "<eos>"),
    ]


def test_perplexity_of_a_uniform_guess_is_the_vocabulary() -> None:
    model = LanguageModel(words=50, hidden=8, dropout=0.0)
    nn.init.zeros_(model.embed.weight)
    assert perplexity(model, torch.randint(50, (30, 4)), 7) == pytest.approx(50, rel=1e-5)


def test_embedding_and_head_are_tied() -> None:
    model = LanguageModel(words=50, hidden=8, dropout=0.0)
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize(
    ("curves", "text"),
    [
        (
            ([100.0, 80.0, 88.0], [100.0, 90.0, 72.0]),
            "ends 10.0 % above its best; with it, at its best. ",
        ),
        (([100.0, 80.0], [100.0, 72.0]), "DropConnect is 10.0 % lower."),
        (([100.0, 80.0], [100.0, 88.0]), "DropConnect is 10.0 % higher."),
    ],
    ids=["rise", "lower", "higher"],
)
def test_description(curves: tuple[list[float], list[float]], text: str) -> None:
    plain, dropped = curves
    assert text in describe({0.0: [Run(validation=plain)], 0.5: [Run(validation=dropped)]})


@pytest.mark.parametrize("p", [0.0, 0.5], ids=["plain", "dropconnect"])
def test_training_lowers_perplexity(p: float) -> None:
    options = train_lstm.parse(["--hidden", "16", "--epochs", "2", "--lr", "0.01"])
    text = train_lstm.load_corpus(articles=5, batch=4)
    run = train_lstm.train(p, seed=0, text=text, options=options)
    assert len(run.train) == len(run.validation) == 2
    assert run.train[-1] < len(text.vocabulary) / 2


def test_a_run_without_dropconnect_is_always_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_lstm.parse(["--p", "0"])
    assert "--p must be in (0, 1]" in capsys.readouterr().err


@pytest.mark.slow
def test_script(
    run_example: Callable[[str], subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    size = "--hidden 16 --epochs 2 --articles 5 --batch 4 --seeds 2"
    done = run_example(f"examples/train_lstm.py {size}")
    assert done.returncode == 0, done.stderr
    assert "The best value with DropConnect is" in done.stdout
    assert "warn" not in done.stderr.lower()
    assert (tmp_path / "perplexity.png").stat().st_size > 10_000
