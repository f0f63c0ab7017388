"""Files from anywhere: read as safetensors reads them, or refused in one line that names the file."""

from __future__ import annotations

import json
import os
import random
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from surgery import (
    SurgeryError,
    bake_checkpoint,
    inspect_checkpoint,
    load_dropconnect,
    strip_checkpoint,
)
from surgery.spec.saved import PLAN_FILE
from surgery.stored.header import encoded, read_header

from ..verbs.hostile import TEXTS, VALUES, nodes
from .raw import Net, operated, write

GOOD: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a_raw": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
    "empty": {"dtype": "I64", "shape": [0, 4], "data_offsets": [22, 22]},
    "scalar": {"dtype": "F64", "shape": [], "data_offsets": [22, 30]},
}
DATA = bytes(range(30))


def file_of(header: Any, path: Path, data: bytes = DATA, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def is_read_by_safetensors(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            list(file.keys())
    except (SafetensorError, OSError):
        return False
    return True


def changed(**changes: Any) -> dict[str, Any]:
    return {**GOOD, "b": {**GOOD["b"], **changes}}


HOSTILE: dict[str, tuple[Any, str]] = {
    "overlap": (changed(data_offsets=[14, 20]), "'b' overlaps the tensor before it"),
    "hole": (changed(data_offsets=[18, 24]), "'b' leaves a hole before it"),
    "beyond": ({**GOOD, "z": {"dtype": "U8", "shape": [9], "data_offsets": [30, 39]}}, "are there"),
    "backwards": (changed(data_offsets=[22, 16]), "are no begin and end"),
    "three offsets": (changed(data_offsets=[16, 22, 24]), "are no begin and end"),
    "negative": (changed(shape=[-3]), r"shape\[0\] must not be negative"),
    "huge": (changed(shape=[2**62, 2**62]), "need another number"),
    "many dimensions": (changed(shape=[1] * 100), "100 dimensions"),
    "size": (changed(shape=[4]), "has 6 bytes, and its shape and dtype need another number"),
    "dtype": (changed(dtype="F128"), "has dtype 'F128', which this release does not know"),
    "float": (changed(shape=[3.0]), "must be an integer"),
    "field": (changed(more=1), "unknown fields"),
    "no field": ({**GOOD, "b": {"dtype": "BF16"}}, "lacks 'shape'"),
    "metadata": ({**GOOD, "__metadata__": {"a": 1}}, "__metadata__.a must be a text"),
    "surrogate": ({**GOOD, "\ud800": GOOD["empty"]}, "not Unicode"),
    "surrogate inside": ({**GOOD, "__metadata__": {"a": "\ud800"}}, "not Unicode"),
    "list": (b"[]", "its header is no JSON object"),
    "no JSON": (b"{", "cannot read the header"),
    "twice": (b'{"a":1,"a":1}', "names a key twice"),
    "deep": (b'{"a":' * 100_000, "nested too deeply|Expecting value"),
    "no UTF-8": (b'{"\xff":1}', "cannot read the header"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_headers_that_lie(name: str, tmp_path: Path) -> None:
    header, words = HOSTILE[name]
    path = file_of(header, tmp_path / "bad.safetensors")
    assert not is_read_by_safetensors(path) or name in ("many dimensions", "field")
    for verb in (inspect_checkpoint, strip_checkpoint):
        before = path.read_bytes()
        with pytest.raises(SurgeryError, match=words) as caught:
            verb(path)
        assert str(path) in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        assert path.read_bytes() == before


@pytest.mark.parametrize("length", [0, 1, 31, 2**31, 2**63, 2**64 - 1])
def test_lengths_that_lie(length: int, tmp_path: Path) -> None:
    path = file_of(GOOD, tmp_path / "bad.safetensors", length=length)
    with pytest.raises(SurgeryError, match=r"bad\.safetensors"):
        inspect_checkpoint(path)


@pytest.mark.parametrize("size", [0, 7, 8, 9])
def test_short_files(size: int, tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(b"\x05" * size)
    with pytest.raises(SurgeryError, match="is no safetensors file, or damaged"):
        inspect_checkpoint(path)


def test_a_good_header_is_read_and_written_again(tmp_path: Path) -> None:
    path = file_of(GOOD, tmp_path / "good.safetensors")
    with open(path, "rb") as file:
        header = read_header(file, "it")
    assert list(header.entries) == ["a_raw", "b", "empty", "scalar"]
    assert header.bytes == len(DATA)
    head = encoded(header.entries, header.metadata, header.data_at)
    assert len(head) == header.data_at
    (tmp_path / "again.safetensors").write_bytes(head + DATA)
    with safe_open(tmp_path / "again.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert torch.equal(file.get_tensor("b").view(torch.uint8), torch.arange(16, 22).byte())


def test_mutations_are_refused_where_safetensors_refuses(tmp_path: Path) -> None:
    """And whatever is stripped is a file that it reads."""
    found: Counter[str] = Counter()
    shortest = 9000
    for number in range(600):
        rng = random.Random(number)
        header = json.loads(json.dumps(GOOD))
        container, key = rng.choice(list(nodes(header)))
        if rng.random() < 0.3:
            del container[key]
        else:
            container[key] = "@here@" if rng.random() < 0.3 else rng.choice(VALUES)
        text = json.dumps(header).replace('"@here@"', rng.choice(TEXTS)).encode()
        path = file_of(text, tmp_path / f"{number}.safetensors")
        reads = is_read_by_safetensors(path)
        try:
            strip_checkpoint(path)
        except SurgeryError as error:
            shortest = min(shortest, 9000 - len(str(error).encode()))
            found["refused, both" if not reads else "refused by us"] += 1
        else:
            assert reads
            assert is_read_by_safetensors(path)
            found["stripped"] += 1
        path.unlink()
    assert shortest > 0  # every message can be printed
    assert found["stripped"] > 20
    assert found["refused, both"] > 200


def index_of(folder: Path) -> Any:
    return json.loads((folder / "model.safetensors.index.json").read_text())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../model.safetensors", "must name a safetensors file in the same folder"),
        ("/etc/passwd", "must name a safetensors file in the same folder"),
        ("sub/model.safetensors", "must name a safetensors file in the same folder"),
        ("model.bin", "must name a safetensors file in the same folder"),
        (7, "must be a text"),
        ("missing.safetensors", "missing.safetensors"),
        ("model-00002-of-00002.safetensors", "does not hold"),
    ],
)
def test_an_index_that_leads_elsewhere(name: Any, words: str, tmp_path: Path) -> None:
    folder = write(operated(), tmp_path / "raw", shards=2)
    form = index_of(folder)
    first = next(iter(form["weight_map"]))
    form["weight_map"][first] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(form))
    with pytest.raises((SurgeryError, OSError), match=words):
        strip_checkpoint(folder)
    with pytest.raises((SurgeryError, OSError), match=words):
        bake_checkpoint(folder, tmp_path / "out", p=0.5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "form", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}, "metadata": 1}']
)
def test_an_index_of_another_form(form: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(form)
    with pytest.raises(SurgeryError, match=r"has no weight_map|must be an object"):
        inspect_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ['"\\ud800"', "1e400"], ids=["surrogate", "infinite"])
def test_an_index_that_could_not_be_written_again(text: str, tmp_path: Path) -> None:
    folder = write(operated(), tmp_path / "raw", shards=2)
    form = {**index_of(folder), "metadata": {"note": "@here@"}}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps(form).replace('"@here@"', text))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for out in (None, tmp_path / "out"):
        with pytest.raises(SurgeryError, match=r"index\.json is damaged"):
            strip_checkpoint(folder, out)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert not (tmp_path / "out").exists()


def test_a_shard_that_holds_more_than_the_index_says(tmp_path: Path) -> None:
    folder = write(operated(), tmp_path / "raw", shards=2)
    form = index_of(folder)
    form["weight_map"].popitem()
    (folder / "model.safetensors.index.json").write_text(json.dumps(form))
    with pytest.raises(SurgeryError, match=r"it does not say that model-.* holds"):
        strip_checkpoint(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs links and pipes")
def test_links_pipes_and_devices(tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    save_file({"w_raw": torch.ones(2)}, outside)
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "model.safetensors"
    path.symlink_to(outside)
    with pytest.raises(SurgeryError, match="is a link that leads out of its folder"):
        strip_checkpoint(folder)
    path.unlink()
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(path)
        with pytest.raises(SurgeryError, match=r"is not a regular file|leads out of its folder"):
            inspect_checkpoint(folder)
        with pytest.raises(SurgeryError, match="is not a regular file"):
            inspect_checkpoint(path)
        path.unlink()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs links")
@pytest.mark.parametrize("lead", ["plan", "anchors", "index", "shard", "other index"])
def test_no_link_that_leads_out_is_followed(lead: str, tmp_path: Path) -> None:
    """Whatever lies beside a checkpoint; also if its index is named, and not its folder."""
    folder = write(operated(), tmp_path / "raw", shards=2)
    index = folder / "model.safetensors.index.json"
    path = {
        "plan": folder / PLAN_FILE,
        "anchors": next(folder.glob("dropconnect_anchors-*")),
        "index": index,
        "shard": folder / "model-00002-of-00002.safetensors",
        "other index": folder / "other.safetensors.index.json",
    }[lead]
    outside = tmp_path / "outside"
    if path.exists():
        path.rename(outside)
    else:
        outside.write_bytes(index.read_bytes().replace(b"model-", b"other-"))
    path.symlink_to(outside)
    words = "is a link that leads out of its folder, to .*: copy that"
    if lead != "other index":
        with pytest.raises(SurgeryError, match=words):
            strip_checkpoint(folder)
        with pytest.raises(SurgeryError, match=words):
            bake_checkpoint(folder, tmp_path / "out", 1)
    if lead != "index":  # who names a link means what it leads to
        with pytest.raises(SurgeryError, match=words):
            strip_checkpoint(index)
    if lead in ("plan", "anchors"):
        with pytest.raises(SurgeryError, match=words):
            load_dropconnect(Net(), folder)
    assert not (tmp_path / "out").exists()
    path.unlink()
    outside.rename(path)
    if lead != "other index":
        load_dropconnect(Net(), folder)
        strip_checkpoint(folder)


@pytest.mark.parametrize("below", ["", "unet"])
def test_links_of_the_cache_of_huggingface_are_followed(below: str, tmp_path: Path) -> None:
    """Also in folders of a snapshot, which pipelines have."""
    blobs, folder = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc" / below
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    for path in write(operated(), tmp_path / "raw", shards=2).iterdir():
        path.rename(blobs / f"of {path.name}")
        (folder / path.name).symlink_to(blobs / f"of {path.name}")
    load_dropconnect(Net(), folder)
    strip_checkpoint(folder, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()
    assert inspect_checkpoint(tmp_path / "out").count("raw") == 0


def test_a_damaged_plan_beside_it(tmp_path: Path) -> None:
    folder = write(operated(), tmp_path / "raw")
    (folder / PLAN_FILE).write_text('{"version": 1, "plan": 3}')
    with pytest.raises(SurgeryError, match=f"cannot read .*{PLAN_FILE}"):
        strip_checkpoint(folder)


def test_names_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"\x1b[2J\n": torch.ones(1)}, path, metadata={"a\nb": "\x1b[31m"})
    text = str(inspect_checkpoint(path))
    assert "\x1b" not in text
    assert r"\x1b[2J\n" in text
