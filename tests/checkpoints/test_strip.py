"""Raw files made plain: what `strip_dropconnect` and a save would give, to the bit."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from surgery import (
    NotOperatedError,
    SurgeryError,
    apply_dropconnect,
    inspect_checkpoint,
    plain_state_dict,
    save_dropconnect,
    strip_checkpoint,
    strip_dropconnect,
)
from surgery.checkpoints.weights import WrongUse

from .raw import Net, expected, names, operated, read, same, write


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "to a folder"])
@pytest.mark.parametrize("plan", [True, False], ids=["plan", "no plan"])
@pytest.mark.parametrize("toward", ["zero", "pretrained"])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_plain_model_loads_what_is_left(
    shards: int, toward: str, plan: bool, in_place: bool, tmp_path: Path
) -> None:
    model = operated(toward)
    folder = write(model, tmp_path / "raw", shards, plan)
    before = names(folder)
    out = folder if in_place else tmp_path / "plain"
    done = strip_checkpoint(folder, None if in_place else out)
    found = read(out)
    assert same(found, expected(model))
    assert done.raw == 4
    assert done.anchors == (4 if toward == "pretrained" else 0)
    assert done.bytes == sum(tensor.nbytes for tensor in found.values())
    fresh = Net()
    fresh.load_state_dict({**found, "head.weight": found["embed.weight"]})
    strip_dropconnect(model)
    words = torch.arange(7)[None]
    assert torch.equal(fresh(words), model(words))
    if in_place:
        assert names(out) == before
    else:
        weights = [name for name in before if name.startswith("model")]
        assert names(out) == ["config.json", *weights]
        assert same(read(folder), read(write(operated(toward), tmp_path / "again", shards)))


def test_a_single_file_goes_to_a_file(tmp_path: Path) -> None:
    model = operated()
    source = write(model, tmp_path / "raw", plan=False) / "model.safetensors"
    strip_checkpoint(source, tmp_path / "plain.safetensors")
    assert same(load_file(tmp_path / "plain.safetensors"), expected(model))
    strip_checkpoint(source)
    assert source.read_bytes() == (tmp_path / "plain.safetensors").read_bytes()


def test_metadata_stay_and_names_of_tied_weights_become_plain(tmp_path: Path) -> None:
    folder = write(operated(), tmp_path / "raw")
    before = metadata_of(folder / "model.safetensors")
    assert before["head.weight_raw"] == "embed.weight_raw"
    strip_checkpoint(folder)
    found = metadata_of(folder / "model.safetensors")
    assert found.pop("head.weight") == "embed.weight"
    assert found == {key: value for key, value in before.items() if not key.startswith("head")}


@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_the_index_is_of_the_new_files(toward: str, tmp_path: Path) -> None:
    model = operated(toward)
    folder = write(model, tmp_path / "raw", shards=3)
    strip_checkpoint(folder)
    form = json.loads((folder / "model.safetensors.index.json").read_text())
    plain = expected(model)
    total = sum(tensor.nbytes for tensor in plain.values())
    assert form["metadata"] == {"total_size": total, "note": "kept"}
    assert set(form["weight_map"]) == set(plain)


def test_an_index_may_be_named_in_place_of_its_folder(tmp_path: Path) -> None:
    folder = write(operated(), tmp_path / "raw", shards=2)
    index = folder / "model.safetensors.index.json"
    strip_checkpoint(index, tmp_path / "out")
    strip_checkpoint(index)
    assert same(read(folder), expected(operated()))
    assert same(read(tmp_path / "out"), read(folder))


def test_without_anchors_the_data_stay_where_they_were(tmp_path: Path) -> None:
    """Only the header differs, in the same room: file systems that share blocks share these."""
    path = write(operated("zero"), tmp_path / "raw") / "model.safetensors"
    before = path.read_bytes()
    strip_checkpoint(path)
    after = path.read_bytes()
    start = 8 + int.from_bytes(before[:8], "little")
    assert after[:8] == before[:8]
    assert after[8:start] != before[8:start]
    assert after[start:] == before[start:]


def test_data_are_aligned_when_anchors_are_out(tmp_path: Path) -> None:
    """Also in a file whose tensors were not sorted: then torch could not map them."""
    parts = [
        ("b", "BF16", (3,)),
        ("w_raw", "F32", (2,)),
        ("w_anchor", "F32", (2,)),
        ("z", "F64", (1,)),
    ]
    sizes, at = {"BF16": 2, "F32": 4, "F64": 8}, 0
    header: dict[str, Any] = {}
    for key, dtype, shape in parts:
        end = at + sizes[dtype] * shape[0]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    path = tmp_path / "odd.safetensors"
    data = bytes(range(at))
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    strip_checkpoint(path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    for key, entry in json.loads(content[8 : 8 + length]).items():
        start, end = entry["data_offsets"]
        assert start % sizes[entry["dtype"]] == 0
        old = header["w_raw" if key == "w" else key]["data_offsets"]
        assert content[8 + length + start : 8 + length + end] == data[slice(*old)]
    assert set(load_file(path)) == {"b", "w", "z"}


def test_a_model_may_have_names_of_its_own_that_look_raw(tmp_path: Path) -> None:
    """The plan tells them apart; without one, the name does, and shapes tell anchors."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)
            self.score_raw = nn.Parameter(torch.ones(2))
            self.fc.register_buffer("bias_anchor", torch.ones(3))

    model = apply_dropconnect(Own(), "fc", p=0.5)
    save_dropconnect(model, tmp_path)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    strip_checkpoint(tmp_path)
    assert set(read(tmp_path)) == set(Own().state_dict())
    with pytest.raises(NotOperatedError, match="no raw keys: it is plain already"):
        strip_checkpoint(tmp_path)


def test_an_anchor_has_the_shape_of_its_weight(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w_raw": torch.ones(3), "w_anchor": torch.ones(4), "v_anchor": torch.ones(3)}, path)
    assert strip_checkpoint(path).anchors == 0
    assert set(load_file(path)) == {"w", "w_anchor", "v_anchor"}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.encoder."])
def test_wrappers_and_bigger_models_do_not_hide_the_sites_of_a_plan(
    prefix: str, tmp_path: Path
) -> None:
    model = apply_dropconnect(nn.Sequential(nn.Linear(3, 3)), "0", p=0.5, toward="pretrained")
    save_dropconnect(model, tmp_path)
    raw = {prefix + key: tensor for key, tensor in model.state_dict().items()}
    save_file(raw, tmp_path / "model.safetensors")
    strip_checkpoint(tmp_path)
    assert set(read(tmp_path)) == {f"{prefix}0.weight", f"{prefix}0.bias"}


def test_keys_of_graphs(tmp_path: Path) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(nn.functional.linear(x, self.w))

    graph = torch.fx.symbolic_trace(Functional())
    apply_dropconnect(graph, ["w", "fc"], p=0.5, toward="pretrained")
    assert {"w_raw", "w_anchor", "fc.weight_raw"} <= set(graph.state_dict())
    path = tmp_path / "graph.safetensors"
    save_file(dict(graph.state_dict()), path)
    strip_checkpoint(path)
    assert same(load_file(path), dict(plain_state_dict(graph)))


def test_what_accelerate_keeps_for_itself(tmp_path: Path) -> None:
    """`save_state` writes raw keys, beside states of optimizers and generators."""
    accelerate = pytest.importorskip("accelerate")
    model = apply_dropconnect(nn.Sequential(nn.Linear(3, 3)), "0", p=0.5, toward="pretrained")
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    accelerator.save_state(str(tmp_path / "state"))
    assert "0.weight_raw" in read(tmp_path / "state")
    plain = dict(plain_state_dict(prepared[0]))
    strip_checkpoint(tmp_path / "state", tmp_path / "plain")
    strip_checkpoint(tmp_path / "state")
    assert same(read(tmp_path / "state"), plain)
    assert same(read(tmp_path / "plain"), plain)


def refused(source: Path, words: str, out: Path | None = None, kind: Any = SurgeryError) -> None:
    before = {path: path.read_bytes() for path in source.parent.rglob("*") if path.is_file()}
    with pytest.raises(kind, match=words):
        strip_checkpoint(source, out)
    after = {path: path.read_bytes() for path in source.parent.rglob("*") if path.is_file()}
    assert after == before


def test_both_names_of_one_weight_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w_raw": torch.ones(3), "w": torch.zeros(3)}, path)
    refused(path, "both 'w' and 'w_raw' are there")
    assert inspect_checkpoint(path).notes == ("1 raw key with the plain key beside: ['w_raw']",)


def test_wrong_use_is_told_from_bad_files(tmp_path: Path) -> None:
    folder = write(operated(), tmp_path / "raw", shards=2)
    refused(tmp_path / "nothing", "there is no", kind=WrongUse)
    refused(folder, "is there already", out=folder, kind=WrongUse)
    refused(folder, "is several files; name a folder", tmp_path / "x.safetensors", WrongUse)
    refused(folder, "there is no folder", tmp_path / "no" / "out", WrongUse)
    part = folder / "model-00001-of-00002.safetensors"
    refused(part, r"is a part of .*; name that, or the folder", kind=WrongUse)
    (folder / "more.safetensors.index.json").write_text("{}")
    refused(folder, "holds 2 checkpoints", kind=WrongUse)
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "holds no file of weights", kind=WrongUse)
    torch.save({"w_raw": torch.ones(1)}, empty / "pytorch_model.bin")
    refused(empty, "`surgery convert` makes one", kind=WrongUse)


def test_a_disk_that_is_full_leaves_all_as_it_was(tmp_path: Path, monkeypatch) -> None:
    folder = write(operated(), tmp_path / "raw", shards=2)

    def full(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("surgery.checkpoints.strip.copy", full)
    refused(folder, "No space left", kind=OSError)
    assert not [name for name in names(folder) if "unfinished" in name]


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_what_goes_wrong_before_the_index_is_new_leaves_all_as_it_was(
    kind: Any, tmp_path: Path, monkeypatch
) -> None:
    folder = write(operated(), tmp_path / "raw", shards=2)

    def full(*args: Any) -> Any:
        raise kind("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("surgery.checkpoints.output.write_index", full)
        refused(folder, "No space left", kind=kind)
    strip_checkpoint(folder)
    assert same(read(folder), expected(operated()))


def test_a_byte_that_changed_on_its_way_is_noticed(tmp_path: Path, monkeypatch) -> None:
    folder = write(operated(), tmp_path / "raw")
    copied = os.copy_file_range

    def flip(source: int, target: int, *rest: int) -> int:
        count = copied(source, target, *rest)
        at = rest[2] + count - 1
        os.pwrite(target, bytes([os.pread(target, 1, at)[0] ^ 1]), at)
        return count

    monkeypatch.setattr(os, "copy_file_range", flip)
    refused(folder, "what was written is not what was read")
    strip_checkpoint(folder, tmp_path / "out", verify=False)
    assert not same(read(tmp_path / "out"), expected(operated()))


def test_systems_that_do_not_copy_in_the_kernel(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delattr(os, "copy_file_range")
    folder = write(operated(), tmp_path / "raw", shards=2)
    strip_checkpoint(folder)
    assert same(read(folder), expected(operated()))


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    folder = write(operated(), tmp_path / "raw", shards=2)
    totals: list[int] = []
    parts: list[int] = []

    def start(total: int) -> Any:
        totals.append(total)
        return parts.append

    done = strip_checkpoint(folder, tmp_path / "out", progress=start)
    assert totals == [done.bytes] == [sum(parts)]


def test_modes_of_files_stay_in_place(tmp_path: Path) -> None:
    folder = write(operated(), tmp_path / "raw", shards=2)
    for path in folder.glob("model-*"):
        path.chmod(0o640)
    strip_checkpoint(folder)
    assert {path.stat().st_mode & 0o777 for path in folder.glob("model-*")} == {0o640}


def test_a_snapshot_of_the_cache_of_huggingface(tmp_path: Path) -> None:
    """Its files are links to blobs: they are read, and in place only the link is replaced."""
    model = operated("zero")
    written = write(model, tmp_path / "written", plan=False)
    snapshot, blobs = tmp_path / "repo/snapshots/abc", tmp_path / "repo/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("model.safetensors", "config.json"):
        (written / name).rename(blobs / f"of {name}")
        (snapshot / name).symlink_to(f"../../blobs/of {name}")
    strip_checkpoint(snapshot, tmp_path / "out")
    assert names(tmp_path / "out") == ["config.json", "model.safetensors"]
    assert same(read(tmp_path / "out"), expected(model))
    blob = (blobs / "of model.safetensors").read_bytes()
    strip_checkpoint(snapshot)
    assert same(read(snapshot), expected(model))
    assert (blobs / "of model.safetensors").read_bytes() == blob
