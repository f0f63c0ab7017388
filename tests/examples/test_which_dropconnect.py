"""The page that says which DropConnect is which: it says what its script prints, and its calls work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))

import which_dropconnect

from surgery import apply_dropconnect, mc_predict, set_inference

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "which-dropconnect.md").read_text()
NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"


def block(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", PAGE, re.S)
    assert found is not None, f"the page has no {name}"
    return found[1]


def same_numbers(page: str, printed: str) -> bool:
    """The same text; numbers may differ by one in the last digit that the page shows."""
    if re.split(NUMBER, page) != re.split(NUMBER, printed):
        return False
    return all(
        abs(float(a.replace(",", "")) - float(b.replace(",", "")))
        <= 1.001 * 10.0 ** -len(a.partition(".")[2])
        for a, b in zip(re.findall(NUMBER, page), re.findall(NUMBER, printed))
    )


def test_numbers_are_compared_by_their_last_digit() -> None:
    assert same_numbers("| 1.92 ± 0.08 % |", "| 1.93 ± 0.08 % |")
    assert not same_numbers("| 1.92 ± 0.08 % |", "| 1.94 ± 0.08 % |")
    assert not same_numbers("| 1.92 ± 0.08 % |", "| 1.92 ± 0.08 |")
    assert not same_numbers("| 24 |", "| 24 | 1 |")


@pytest.mark.slow
def test_tables_are_what_the_script_prints() -> None:
    """Slow, because it enumerates 2**16 masks of many layers, and draws many gradients. What is said to
    agree exactly is checked below, each time."""
    done = subprocess.run(
        [sys.executable, DOCS / "which_dropconnect.py"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    printed = done.stdout.strip().split("\n\n")
    shown = [block(name) for name in ("agreements", "errors", "inputs", "gradients")]
    for own, other in zip_longest(shown, printed):
        for line, line_printed in zip_longest(own.splitlines(), other.splitlines()):
            assert same_numbers(line, line_printed), f"{line}\n{line_printed}"


def test_everything_that_is_said_to_agree_does() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        checked = which_dropconnect.agreements()
    finally:
        torch.set_default_dtype(torch.float32)
    assert list(checked.values()) == [True] * 6
    assert block("agreements") == which_dropconnect.agreement_table(checked)


def test_code_by_hand_is_what_the_script_runs() -> None:
    assert block("by hand") == which_dropconnect.written_by_hand()


def test_constants_in_the_text_are_those_of_the_script() -> None:
    text = " ".join(PAGE.split())
    script = which_dropconnect
    assert f"A unit with {script.INPUTS} inputs has {2**script.INPUTS:,} masks" in text
    assert f"layers of {script.UNITS} units with ReLU: mean over {script.LAYERS} layers" in text
    assert f"means over {script.REPEATS} estimates" in text


def test_figure_is_there_and_has_its_text() -> None:
    assert "](which-dropconnect.svg)" in PAGE
    figure = (DOCS / "which-dropconnect.svg").read_text()
    assert len(figure) < 120_000
    for text in ("WeightDrop", "EfficientNet drop_connect", "per example", "batch size"):
        assert text in figure


class Model(nn.Module):
    """What the calls of the page name."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 6)
        self.lstm = nn.LSTM(6, 6)
        self.fc2 = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.lstm(torch.relu(self.fc1(x))[:, None])[0][:, 0])


CALLS = re.findall(r"^\| .* \| `(\w+\(.*\))` \|$", PAGE, re.M)


@pytest.mark.parametrize("call", [call for call in CALLS if call.startswith("apply")])
def test_calls_of_apply_in_the_table_work(call: str) -> None:
    model, inputs = Model().eval(), torch.randn(8, 6)
    before = model(inputs)
    eval(call, {"apply_dropconnect": apply_dropconnect, "model": model, "torch": torch})
    set_inference(model, "mean")
    assert torch.equal(model(inputs), before)
    with torch.no_grad():  # a weight is dropped toward its pretrained value only if it has left it
        for parameter in model.parameters():
            parameter += 0.1
    model.train()
    assert not torch.equal(model(inputs), model(inputs))


def test_the_call_of_mc_predict_in_the_table_works() -> None:
    model, inputs = apply_dropconnect(Model(), "fc1"), torch.randn(8, 6)
    scope = {"inputs": inputs, "mc_predict": mc_predict, "model": model}
    assert eval(CALLS[-1], scope).samples == 32


def test_the_table_has_all_its_calls() -> None:
    assert len(CALLS) == 8


def test_a_rounded_cell_ends_with_its_error() -> None:
    assert which_dropconnect.cell(13.334, 0.708, " %") == "13.3 ± 0.7 %"
    assert which_dropconnect.cell(23.7, 1.03) == "24 ± 1"
    assert which_dropconnect.cell(1.234, 0.0961) == "1.2 ± 0.1"
    assert which_dropconnect.cell(123.4, 12.3) == "123 ± 12"


def test_enumeration_against_one_weight() -> None:
    """relu(w x / (1 - p)) is kept with probability 1 - p."""
    weight, bias, x = torch.tensor([[2.0]]), torch.tensor([0.5]), torch.tensor([[3.0]])
    found = which_dropconnect.enumerate_masks(weight, bias, x, 0.25, torch.relu)
    assert float(found) == pytest.approx(0.75 * 8.5 + 0.25 * 0.5)
