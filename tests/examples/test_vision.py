"""The vision example: its images, its head, and the whole script with tiny settings."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import vision
from digits import load_digits
from vision import PLAIN, PRETRAINED, ZERO, Run, build, fine_tune, load, logits, new_head, summarise


def test_no_image_is_in_two_parts() -> None:
    options = vision.parse(["--each", "3"])
    old, few, test = load(0, options)
    digits = load_digits()
    assert len(old) == int((digits.labels < 5).sum())
    assert len(few) == 15
    assert few.labels.bincount().tolist() == [3] * 5
    assert len(old) + len(few) + len(test) == len(digits)
    new = {tuple(row) for row in digits.images[digits.labels >= 5].tolist()}
    found = [tuple(row) for row in torch.cat([few.images, test.images]).tolist()]
    assert set(found) == new
    other = load(1, options)[1]
    assert not torch.equal(other.images, few.images)


def test_a_new_head_knows_nothing_and_the_rest_stays() -> None:
    options = vision.parse(["--width", "16"])
    model = build(options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    new_head(model)
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("method", [PLAIN, ZERO, PRETRAINED])
def test_fine_tuning_leaves_the_pretrained_model_alone(method: str) -> None:
    options = vision.parse(["--width", "16", "--steps", "2", "--batch", "4"])
    _, few, test = load(0, options)
    model = build(options)
    before = logits(model.eval(), few.images, options)
    found = fine_tune(method, model, few, test, options)
    assert torch.equal(logits(model, few.images, options), before)
    assert found.wrong.shape == (len(test),)
    assert found.sites == (0 if method == PLAIN else 26)


def test_table_has_a_row_for_each_method() -> None:
    wrong = torch.tensor([True, False, False, False])
    runs = {
        PLAIN: [Run(wrong, 0), Run(~wrong, 0)],
        ZERO: [Run(wrong, 7), Run(~wrong, 7)],
        PRETRAINED: [Run(wrong, 7), Run(wrong, 7)],
    }
    lines = summarise(runs, vision.parse([])).splitlines()
    assert [line.split("  ")[0] for line in lines[2:5]] == [PLAIN, ZERO, PRETRAINED]
    assert "50.00 ± 25.00 %" in lines[2]
    assert "+0.00 ± 0.00 points, within noise" in lines[-2]
    assert "-25.00 ± 25.00 points, within noise" in lines[-1]


def test_one_seed_says_nothing_of_methods(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        vision.parse(["--seeds", "1"])
    assert "--seeds must be at least 2" in capsys.readouterr().err


@pytest.mark.slow
def test_script(
    run_example: Callable[[str], subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = run_example("examples/vision.py --seeds 2 --pretraining 20 --steps 10 --width 16")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("noise") == 2
    results = json.loads((tmp_path / "results.json").read_text())
    assert [len(errors) for errors in results["errors"].values()] == [2, 2, 2]
    assert (tmp_path / "vision.png").stat().st_size > 10_000
