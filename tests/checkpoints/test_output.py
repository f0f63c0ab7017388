"""Where new files may go, and what else lies in the folder of old ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from surgery import bake_checkpoint, convert_checkpoint, inspect_checkpoint, strip_checkpoint
from surgery.checkpoints.weights import WrongUse

from .raw import expected, names, operated, read, same, write

VERBS: dict[str, Callable[[Path, Path], Any]] = {
    "strip": strip_checkpoint,
    "convert": lambda source, out: convert_checkpoint(source, out, "surgery"),
    "bake": lambda source, out: bake_checkpoint(source, out, 1, p=0.5),
}


def everything(folder: Path) -> dict[str, Any]:
    """Every path in a folder, and what is there."""
    return {
        str(path): os.readlink(path) if path.is_symlink() else path.is_dir() or path.read_bytes()
        for path in folder.rglob("*")
    }


def places(folder: Path) -> dict[str, tuple[str | Path, str]]:
    """What a careless OUT may be: for a folder and for a file."""
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("x")
    (folder / "to_empty").symlink_to("empty")
    (folder / "to_nothing").symlink_to("nothing")
    (folder / "to_file").symlink_to("full/file")
    (folder / "round").symlink_to("round")
    new = "name a new one in it"
    return {
        ".": (".", new),
        "..": ("..", new),
        "a folder and dots": (Path("empty") / "..", new),
        "root": ("/", new),
        "a full folder": ("full", "is (there already|a folder)"),
        "a file": (Path("full") / "file", "is there already"),
        "a link to an empty folder": ("to_empty", "is a link, to empty"),
        "a link to nothing": ("to_nothing", "is a link, to nothing"),
        "a link to a file": ("to_file", "is a link, to full/file"),
        "a link to itself": ("round", "is a link, to round"),
        "in no folder": (Path("no") / "out", "there is no folder no; make it first"),
        "below a file": (Path("full") / "file" / "out", "there is no folder full/file"),
    }


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("verb", VERBS)
def test_an_out_that_cannot_be_made_is_refused(
    verb: str, kind: str, tmp_path: Path, monkeypatch
) -> None:
    source = write(operated(), tmp_path / "raw")
    if kind == "file":
        source = source / "model.safetensors"
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    cases = places(home)
    before = everything(tmp_path)
    for case, (out, words) in cases.items():
        if kind == "file":
            words = r"must end in \.safetensors"
        with pytest.raises(WrongUse, match=words) as caught:
            VERBS[verb](source, Path(out))
        assert len(str(caught.value).splitlines()) == 1, case
        assert everything(tmp_path) == before, case


@pytest.mark.parametrize("verb", VERBS)
def test_a_file_has_the_name_of_what_is_written(verb: str, tmp_path: Path) -> None:
    """torch.load would not read safetensors from a `.bin`."""
    folder = write(operated(), tmp_path / "raw")
    before = everything(tmp_path)
    for source, out in (
        *((folder / "model.safetensors", name) for name in ("x.bin", "plain/", "x.pt", "plain")),
        *((folder, name) for name in ("x.bin", "x.pth")),
    ):
        with pytest.raises(WrongUse, match=r"must end in \.safetensors: that is what is written"):
            VERBS[verb](source, Path(f"{tmp_path}/{out}"))
        assert everything(tmp_path) == before


def test_the_files_that_were_written_are_named(tmp_path: Path) -> None:
    folder = write(operated(), tmp_path / "raw")
    out = tmp_path / "new.safetensors"
    assert strip_checkpoint(folder / "model.safetensors", out).files == ("new.safetensors",)
    assert strip_checkpoint(folder, tmp_path / "one.safetensors").files == ("one.safetensors",)
    assert strip_checkpoint(folder, tmp_path / "out").files == ("model.safetensors",)
    assert strip_checkpoint(folder).files == ("model.safetensors",)


@pytest.mark.parametrize("verb", VERBS)
def test_a_file_is_wanted_and_there_is_a_folder_or_a_link(verb: str, tmp_path: Path) -> None:
    source = write(operated(), tmp_path / "raw") / "model.safetensors"
    out = tmp_path / "out.safetensors"
    out.mkdir()
    with pytest.raises(WrongUse, match=r"is a folder, and one file is written; name a file in it"):
        VERBS[verb](source, out)
    out.rmdir()
    out.symlink_to("elsewhere.safetensors")
    with pytest.raises(WrongUse, match=r"is a link, to elsewhere\.safetensors"):
        VERBS[verb](source, out)
    assert not (tmp_path / "elsewhere.safetensors").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_an_empty_folder_and_a_link_on_the_way_are_no_hindrance(verb: str, tmp_path: Path) -> None:
    source = write(operated(), tmp_path / "raw")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "out").mkdir()
    VERBS[verb](source, tmp_path / "link" / "out")
    assert names(tmp_path / "real" / "out") == ["config.json", "model.safetensors"]


def second_index(folder: Path, name: str, keep: int = 1) -> Path:
    """An index over some of the shards of another, as an export of a part of the model has."""
    form = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(set(form["weight_map"].values()))[:keep]
    form["weight_map"] = {key: at for key, at in form["weight_map"].items() if at in shards}
    (folder / name).write_text(json.dumps(form))
    return folder / name


@pytest.mark.parametrize(
    "other", ["part.safetensors.index.json", "model.safetensors.index.fp16.json"]
)
@pytest.mark.parametrize("linked", [False, True])
def test_in_place_no_other_index_becomes_wrong(other: str, linked: bool, tmp_path: Path) -> None:
    folder = write(operated(), tmp_path / "raw", shards=2)
    part = second_index(folder, other)
    if linked:
        (folder / "alias.safetensors").symlink_to("model-00001-of-00002.safetensors")
        text = part.read_text().replace("model-00001-of-00002.safetensors", "alias.safetensors")
        part.write_text(text)
    before = everything(tmp_path)
    for index in (folder / "model.safetensors.index.json", part):
        with pytest.raises(WrongUse, match=r"is also a part of .*: write to a new folder \(OUT\)"):
            strip_checkpoint(index)
        assert everything(tmp_path) == before
    with pytest.raises(WrongUse, match=r"is a part of .*; name that, or the folder"):
        strip_checkpoint(folder / "model-00001-of-00002.safetensors")
    strip_checkpoint(folder / "model.safetensors.index.json", tmp_path / "out")
    assert same(read(tmp_path / "out"), expected(operated()))
    assert names(tmp_path / "out") == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    part.unlink()
    strip_checkpoint(folder)
    assert same(read(folder), expected(operated()))


def test_an_index_of_other_files_is_no_hindrance(tmp_path: Path) -> None:
    folder = write(operated(), tmp_path / "raw", shards=2)
    for path in write(operated(), tmp_path / "more", shards=2).glob("model*"):
        text = path.read_bytes().replace(b"model-0000", b"other-0000")
        (folder / path.name.replace("model", "other", 1)).write_bytes(text)
    strip_checkpoint(folder / "model.safetensors.index.json")
    for name, raw in (("model", 0), ("other", 4)):
        assert inspect_checkpoint(folder / f"{name}.safetensors.index.json").count("raw") == raw


def test_an_index_of_a_variant_is_one(tmp_path: Path) -> None:
    folder = write(operated(), tmp_path / "raw", shards=2, plan=False)
    index = folder / "model.safetensors.index.fp16.json"
    (folder / "model.safetensors.index.json").rename(index)
    strip_checkpoint(folder, tmp_path / "out")
    assert (tmp_path / "out" / index.name).is_file()
    strip_checkpoint(index)
    for path in (folder, tmp_path / "out"):
        assert inspect_checkpoint(path).count("plain") == len(expected(operated()))


def test_what_a_killed_strip_of_another_index_left_is_not_removed(tmp_path: Path) -> None:
    """Two checkpoints in one folder: finishing one leaves the files that the other index names."""
    folder = write(operated(), tmp_path / "raw", shards=2, plan=False)
    other = json.loads((folder / "model.safetensors.index.json").read_text())
    for name in set(other["weight_map"].values()):
        own = name.replace("model", "other").replace(".safetensors", ".new-0123abcd.safetensors")
        shutil.copyfile(folder / name, folder / own)
        other["weight_map"] = {
            key: own if at == name else at for key, at in other["weight_map"].items()
        }
    (folder / "other.safetensors.index.json").write_text(json.dumps(other))
    (folder / "left.new-0123abcd.safetensors").write_bytes(b"")
    strip_checkpoint(folder / "model.safetensors.index.json")
    assert not (folder / "left.new-0123abcd.safetensors").exists()
    assert inspect_checkpoint(folder / "other.safetensors.index.json").count("raw") == 4
    strip_checkpoint(folder / "other.safetensors.index.json")
    assert not [name for name in names(folder) if ".new-" in name]
    found = inspect_checkpoint(folder / "other.safetensors.index.json")
    assert {one.file[:12] for one in found.tensors} == {"other-00001-", "other-00002-"}
    assert found.count("raw") == 0
