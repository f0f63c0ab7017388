"""What the page of the command line shows runs, and prints what is shown."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

import torch
from safetensors.torch import save_file
from torch import nn

from surgery import apply_dropconnect, save_dropconnect

from ..checkpoints.raw import operated, write
from ..docs.given import bert_folder
from .running import call

PAGE = Path(__file__).parents[2] / "docs" / "command-line.md"
BLOCKS = re.findall(r"^```(sh|text|python)\n(.*?)^```", PAGE.read_text(), re.M | re.S)


def small() -> nn.Module:
    model = nn.ModuleDict({"encoder": nn.Linear(4, 4), "classifier": nn.Linear(4, 2)})
    nn.init.ones_(model["encoder"].weight)  # the page shows the digest of it
    return apply_dropconnect(model, "encoder", p=0.3, toward="pretrained")


def given(folder: Path) -> None:
    """The files that the page takes as given."""
    model = small()
    (folder / "out").mkdir()
    save_file(dict(model.state_dict()), folder / "out" / "model.safetensors", {"format": "pt"})
    save_dropconnect(model, folder / "out")
    write(operated("zero"), folder / "raw", shards=2)
    state = {"rnns.0.module.weight_hh_l0_raw": torch.ones(8, 2)}
    torch.save({**state, "rnns.0.module.weight_ih_l0": torch.ones(8, 2)}, folder / "awd.pt")
    for name in ("pretrained", "finetuned"):
        bert_folder(str(folder / name))
    bert_folder(str(folder / "bert"))


def test_commands_of_the_page(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("pygraphviz")
    given(tmp_path)
    monkeypatch.chdir(tmp_path)
    printed, ran = "", []
    for language, text in BLOCKS:
        if language == "text":
            if printed:
                assert printed == text
            continue
        printed = ""
        if language == "python":
            continue  # tests/docs runs these
        for line in text.splitlines():
            command, *args = shlex.split(line, comments=True)
            if command == "pip":
                continue
            assert command == "surgery"
            if args == ["strip", "out", "plain"]:
                given_again = tmp_path / "out" / "model.safetensors"
                save_file(dict(small().state_dict()), given_again)
            result = call(*args)
            assert result.exit_code == 0, (line, result.output, result.exception)
            printed += result.stdout
            ran.append(args[0])
    assert {"inspect", "strip", "convert", "bake", "plan", "draw"} <= set(ran)
    assert (tmp_path / "bert.svg").read_text().startswith("<svg")
