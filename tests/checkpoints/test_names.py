"""Names that no file should have, wherever one is read: an error of one clean line, never a crash."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from surgery import (
    SurgeryError,
    convert_checkpoint,
    inspect_checkpoint,
    load_dropconnect,
    strip_checkpoint,
)
from surgery.spec.errors import raise_all
from surgery.spec.saved import PLAN_FILE

from .raw import Net, operated, write
from .test_header import DATA, GOOD, file_of

ODD = ("a\0b", "\ud800", "a\nb", "a\x1b[2Jb", "\x9b31m", "a\u2028b")
"""What is no path, no Unicode, more than a line, or what a terminal would obey."""
ELSEWHERE = ("..", ".", "", "a/b", "/etc/passwd", "../model.bin")

BESIDE = r"must name a file in the same folder|is no name"


def refusal(call: Callable[[], Any], words: str | None = None) -> str:
    with pytest.raises(SurgeryError, match=words) as caught:
        call()
    assert str(caught.value).isprintable(), str(caught.value)
    return str(caught.value)


def odd_id(name: str) -> str:
    return ascii(name)


@pytest.mark.parametrize("name", [*ODD, *ELSEWHERE], ids=odd_id)
def test_in_an_index_of_pickles(name: str, tmp_path: Path) -> None:
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"w_raw": name}}))
    said = refusal(lambda: convert_checkpoint(tmp_path, tmp_path / "out", "surgery"), BESIDE)
    assert str(index) in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ODD, ids=odd_id)
def test_a_key_in_an_index_of_pickles(name: str, tmp_path: Path) -> None:
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {name: "../x"}}))
    refusal(lambda: convert_checkpoint(tmp_path, tmp_path / "out", "surgery"), BESIDE)


@pytest.mark.parametrize("name", [*ODD, *ELSEWHERE], ids=odd_id)
def test_in_an_index_and_in_a_plan(name: str, tmp_path: Path) -> None:
    folder = write(operated(), tmp_path / "raw", shards=2)
    plan = folder / PLAN_FILE
    good = plan.read_text()
    form = json.loads(good)
    form["anchors"]["file"] = name
    plan.write_text(json.dumps(form))
    words = "must name a safetensors file in the same folder|is no name"
    refusal(lambda: load_dropconnect(Net(), folder), words)
    plan.write_text(good)
    index = folder / "model.safetensors.index.json"
    form = json.loads(index.read_text())
    form["weight_map"][next(iter(form["weight_map"]))] = name
    index.write_text(json.dumps(form))
    refusal(lambda: strip_checkpoint(folder), words)


@pytest.mark.parametrize("name", ODD, ids=odd_id)
def test_in_a_header(name: str, tmp_path: Path) -> None:
    """As a dtype, a key, a field, a key of metadata; and of what the library itself says."""
    changes: list[Any] = [
        {**GOOD, "b": {**GOOD["b"], "dtype": name}},
        {**GOOD, name: {**GOOD["b"], "shape": [9]}},
        {**GOOD, "b": {**GOOD["b"], name: 1}},
        {**GOOD, "__metadata__": {name: 1}},
    ]
    for change in changes:
        path = file_of(change, tmp_path / "bad.safetensors")
        refusal(lambda: inspect_checkpoint(path))  # noqa: B023
    folder = write(operated(), tmp_path / "raw")
    anchors = next(folder.glob("dropconnect_anchors*"))
    for change in changes:
        file_of(change, anchors)
        refusal(lambda: load_dropconnect(Net(), folder), "is damaged")


@pytest.mark.parametrize("name", [name for name in ODD if name != "\ud800"], ids=odd_id)
def test_what_is_printed_of_good_files(name: str, tmp_path: Path) -> None:
    """Keys and names of modules may be any text: what is printed of them has the lines that it has for
    others, and nothing that a terminal obeys."""
    lines = {}
    for key in ("plain", name):
        folder = write(operated(), tmp_path / ascii(key)[1:-1].replace("\\", "_"))
        plan = folder / PLAN_FILE
        plan.write_text(plan.read_text().replace('"fc"', json.dumps(key)))
        header = {**GOOD, "__metadata__": {key: key}, key: GOOD["empty"]}
        file_of(header, folder / "model.safetensors", DATA)
        found = str(inspect_checkpoint(folder)).split("\n")
        assert all(map(str.isprintable, found))
        lines[key] = len(found)
    assert lines["plain"] == lines[name]


@pytest.mark.parametrize("name", ODD, ids=odd_id)
def test_in_lists_of_what_is_wrong(name: str, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError) as caught:
        raise_all([f"{name}: wrong", "b: wrong"])
    assert len(str(caught.value).split("\n")) == 3
    assert all(map(str.isprintable, str(caught.value).split("\n")))
    folder = write(operated(), tmp_path / "raw")
    plan = folder / PLAN_FILE
    plan.write_text(plan.read_text().replace('"fc"', json.dumps(name)))
    with pytest.raises(SurgeryError) as caught:
        load_dropconnect(Net(), folder)
    assert all(map(str.isprintable, str(caught.value).split("\n")))


@pytest.mark.parametrize("name", ODD, ids=odd_id)
def test_of_the_device_of_a_generator(name: str, tmp_path: Path) -> None:
    folder = write(operated(), tmp_path / "raw")
    form = json.loads((folder / PLAN_FILE).read_text())
    form["generators"] = [{"device": name, "state": "", "sites": []}]
    (folder / PLAN_FILE).write_text(json.dumps(form))
    refusal(lambda: load_dropconnect(Net(), folder), "no state of a generator|is no name")


@pytest.mark.skipif(os.name != "posix", reason="no such names elsewhere")
@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2Jb"], ids=odd_id)
def test_of_files_in_a_folder(name: str, tmp_path: Path) -> None:
    """Whoever packed the folder named them: of a damaged file, of two, and of a link and its target."""
    for ending, verb in ((".safetensors", inspect_checkpoint), (".bin", convert_surgery)):
        folder = tmp_path / ending
        folder.mkdir()
        (folder / f"{name}{ending}").write_bytes(b"")
        refusal(lambda: verb(folder))  # noqa: B023
        (folder / f"b{ending}").write_bytes(b"")
        refusal(lambda: verb(folder), "holds 2 checkpoints")  # noqa: B023
        (folder / f"b{ending}").unlink()
        (folder / f"{name}{ending}").unlink()
        (folder / f"{name}{ending}").symlink_to(tmp_path / name)
        refusal(lambda: verb(folder), "leads out of its folder")  # noqa: B023


def convert_surgery(folder: Path) -> object:
    return convert_checkpoint(folder, folder.with_name("out"), "surgery")


def test_letters_stay_what_they_are(tmp_path: Path) -> None:
    save_file({"größe_raw": torch.ones(1)}, tmp_path / "модель.safetensors")
    assert "größe_raw" in str(inspect_checkpoint(tmp_path))
    assert str(SurgeryError("größe\x1b")) == "größe\\x1b"
    assert str(SurgeryError("größe: a\nb", "c")) == "größe: a\\nb\nc"
