"""Plain keys for others, and the small files that lie beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from surgery import (
    NotOperatedError,
    SurgeryError,
    apply_dropconnect,
    dropconnect_sites,
    load_dropconnect,
    plain_state_dict,
    save_dropconnect,
    set_p,
    strip_dropconnect,
)
from surgery.spec.saved import PLAN_FILE
from surgery.verbs.checkpoint import anchors

from ..helpers import Snapshot, bits_of
from ..zoo.kinds import Case, every_case


def model() -> nn.ModuleDict:
    torch.manual_seed(11)
    parts = {
        "fc": nn.Linear(4, 4),
        "embed": nn.Embedding(4, 4),
        "rnn": nn.LSTM(4, 4),
        "conv": nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        "head": nn.Linear(4, 4, bias=False),
    }
    parts["head"].weight = parts["embed"].weight
    return nn.ModuleDict(parts)


def operated(**options: Any) -> nn.ModuleDict:
    options = {"p": 0.3, "toward": "pretrained", **options}
    return apply_dropconnect(model(), ["fc", "embed", "rnn", "conv"], **options)


def shift(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)


def values(state: dict[str, Any]) -> dict[str, Any]:
    return {name: bits_of(tensor) for name, tensor in state.items()}


@every_case
@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_plain_state_dict_is_that_of_the_plain_model(case: Case, toward: str) -> None:
    module = case.build()
    expected = module.state_dict()
    apply_dropconnect(module, case.target_of(module), toward=toward)
    plain = plain_state_dict(module)
    assert list(plain) == list(expected)
    assert values(plain) == values(expected)
    assert all(plain[name].data_ptr() == expected[name].data_ptr() for name in expected)
    case.build().load_state_dict(plain)


def test_plain_state_dict_of_a_plain_model() -> None:
    module = model()
    assert list(plain_state_dict(module)) == list(module.state_dict())


def test_plain_state_dict_renames_another_dict() -> None:
    """One that was gathered elsewhere: any values, and keys that are not ours stay."""
    module = operated()
    gathered = {name: name.upper() for name in module.state_dict()} | {"extra": 1}
    plain = plain_state_dict(module, gathered)
    assert plain["fc.weight"] == "FC.WEIGHT_RAW"
    assert plain["extra"] == 1
    assert not [name for name in plain if name.endswith(("_raw", "_anchor"))]


def test_parameters_that_end_in_raw_are_not_renamed() -> None:
    module = nn.Module()
    module.noise_raw = nn.Parameter(torch.zeros(2))
    module.fc = apply_dropconnect(nn.Linear(2, 2), nn.Linear)
    assert list(plain_state_dict(module)) == ["noise_raw", "fc.weight", "fc.bias"]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def anchors_of(folder: Path) -> Path:
    """The only file of anchors; its name has their digest."""
    (path,) = folder.glob("dropconnect_anchors-*.safetensors")
    return path


def test_anchors_of_some_sites_only(tmp_path: Path) -> None:
    """The first site has none."""
    module = apply_dropconnect(model(), "fc", p=0.3)
    apply_dropconnect(module, "conv", p=0.3, toward="pretrained")
    expected = {name: anchor.clone() for name, anchor in anchors(module).items()}
    assert len(expected) == 1
    save_dropconnect(module, tmp_path)
    other = model()
    shift(other)
    load_dropconnect(other, tmp_path)
    found = anchors(other)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("toward", ["zero", "pretrained"])
def test_save_and_load(toward: str, tmp_path) -> None:
    saved = operated(toward=toward, unit="tensor", inference="sample")
    set_p(saved, 0.7, "fc")
    shift(saved)
    save_dropconnect(saved, tmp_path / "deep" / "folder")
    folder = tmp_path / "deep" / "folder"
    anchored = [anchors_of(folder).name] if toward == "pretrained" else []
    assert files(folder) == sorted([PLAN_FILE, *anchored])
    fresh = model()
    shift(fresh)
    before = Snapshot(fresh)
    assert load_dropconnect(fresh, folder) is fresh
    assert dropconnect_sites(fresh) == dropconnect_sites(saved)
    assert values(fresh.state_dict()) == values(saved.state_dict())
    assert strip_dropconnect(fresh) is fresh
    assert Snapshot(fresh) == before


def test_loaded_model_computes_the_same(tmp_path) -> None:
    saved = operated()
    shift(saved)
    save_dropconnect(saved, tmp_path)
    fresh = model()
    fresh.load_state_dict(plain_state_dict(saved))
    load_dropconnect(fresh, tmp_path)
    x = torch.randn(3, 4)
    outputs = []
    for module in (saved, fresh):
        torch.manual_seed(2)
        outputs.append((module.fc(x), module.rnn(x)[0], module.head(x)))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_json_is_readable_and_versioned(tmp_path) -> None:
    save_dropconnect(operated(), tmp_path)
    form = json.loads((tmp_path / PLAN_FILE).read_text())
    assert form["version"] == 1
    assert form["plan"]["sites"][0]["parameter"] == "weight"
    assert form["anchors"]["file"] == anchors_of(tmp_path).name
    anchors = load_file(anchors_of(tmp_path))
    assert set(anchors) == {"fc.weight", "embed.weight", "rnn.weight_hh_l0", "conv.weight"}


def test_saving_without_anchors_removes_old_ones(tmp_path) -> None:
    save_dropconnect(operated(), tmp_path)
    save_dropconnect(operated(toward="zero"), tmp_path)
    assert files(tmp_path) == [PLAN_FILE]
    load_dropconnect(model(), tmp_path)


def test_saving_a_plain_model(tmp_path) -> None:
    with pytest.raises(NotOperatedError, match="ModuleDict has no DropConnect in place to save"):
        save_dropconnect(model(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def break_json(folder: Path) -> None:
    (folder / PLAN_FILE).write_text('{"version": 1, ')


def break_encoding(folder: Path) -> None:
    (folder / PLAN_FILE).write_bytes(b"\xff\xfe\x00")


def edit(change) -> Any:
    def damage(folder: Path) -> None:
        form = json.loads((folder / PLAN_FILE).read_text())
        change(form)
        (folder / PLAN_FILE).write_text(json.dumps(form))

    return damage


def truncate_anchors(folder: Path) -> None:
    data = anchors_of(folder).read_bytes()
    anchors_of(folder).write_bytes(data[: len(data) // 2])


def flip_a_bit(folder: Path) -> None:
    data = bytearray(anchors_of(folder).read_bytes())
    data[-1] ^= 1
    anchors_of(folder).write_bytes(bytes(data))


def other_anchors(folder: Path) -> None:
    save_file({"fc.weight": torch.zeros(4, 4)}, anchors_of(folder))


DAMAGES = {
    "not-json": (break_json, PLAN_FILE),
    "not-text": (break_encoding, PLAN_FILE),
    "not-an-object": (lambda folder: (folder / PLAN_FILE).write_text("[]"), PLAN_FILE),
    "no-plan": (edit(lambda form: form.pop("plan")), PLAN_FILE),
    "no-version": (edit(lambda form: form.pop("version")), PLAN_FILE),
    "other-version": (edit(lambda form: form.update(version=99)), "format 99"),
    "site-without-a-field": (edit(lambda form: form["plan"]["sites"][0].pop("kind")), PLAN_FILE),
    "value-out-of-range": (
        edit(lambda form: form["plan"]["sites"][0]["config"].update(p=3)),
        PLAN_FILE,
    ),
    "anchors-forgotten": (edit(lambda form: form.update(anchors=None)), "wants anchors for"),
    "anchors-missing": (lambda folder: anchors_of(folder).unlink(), "which is missing"),
    "anchors-truncated": (truncate_anchors, "is damaged"),
    "anchors-bit-flipped": (flip_a_bit, "is damaged"),
    "anchors-of-another": (other_anchors, "is damaged"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_files_are_refused_by_name(damage, words: str, tmp_path) -> None:
    save_dropconnect(operated(), tmp_path)
    damage(tmp_path)
    fresh = model()
    before = Snapshot(fresh)
    with pytest.raises(SurgeryError) as caught:
        load_dropconnect(fresh, tmp_path)
    assert words in str(caught.value)
    assert Snapshot(fresh) == before


def test_missing_folder(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        load_dropconnect(model(), tmp_path)


def test_another_model_is_refused(tmp_path) -> None:
    save_dropconnect(operated(), tmp_path)
    other = nn.ModuleDict({"fc": nn.Linear(4, 5)})
    before = Snapshot(other)
    with pytest.raises(SurgeryError, match=r"'fc\.weight' has shape \(4, 4\), the weight \(5, 4\)"):
        load_dropconnect(other, tmp_path)
    assert Snapshot(other) == before


def test_loading_twice_is_refused(tmp_path) -> None:
    save_dropconnect(operated(), tmp_path)
    with pytest.raises(SurgeryError, match="already in place"):
        load_dropconnect(load_dropconnect(model(), tmp_path), tmp_path)


@pytest.mark.parametrize("step", ["write_tensors", "json.dumps", "os.fsync", "os.replace"])
def test_failure_while_writing_leaves_the_old_files(step: str, tmp_path, monkeypatch) -> None:
    """Each file appears whole or not at all, and the two are of one save."""
    save_dropconnect(operated(), tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    changed = operated()
    shift(changed)
    strip_dropconnect(changed)
    apply_dropconnect(changed, "fc", p=0.9, toward="pretrained")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(f"surgery.verbs.checkpoint.{step}", fail)
        with pytest.raises(OSError, match="disk full"):
            save_dropconnect(changed, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    load_dropconnect(model(), tmp_path)


def test_files_have_ordinary_permissions(tmp_path) -> None:
    save_dropconnect(operated(), tmp_path)
    (tmp_path / "ordinary").write_text("")
    expected = (tmp_path / "ordinary").stat().st_mode
    assert (tmp_path / PLAN_FILE).stat().st_mode == expected
    assert anchors_of(tmp_path).stat().st_mode == expected


@pytest.mark.parametrize("broken", ["assign", "assign views", "new parameter", "no"])
def test_a_tie_that_was_broken_after_surgery(tmp_path: Path, broken: str) -> None:
    """The sites go toward one anchor still, which a file has twice."""

    def untied() -> nn.ModuleDict:
        return nn.ModuleDict({"a": nn.Embedding(8, 4), "b": nn.Linear(4, 8), "c": nn.Linear(4, 8)})

    def tied() -> nn.ModuleDict:
        model = untied()
        model["b"].weight = model["c"].weight = model["a"].weight
        return model

    model = tied()
    pretrained = model["a"].weight.detach().clone()
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    apply_dropconnect(model, "a", toward="pretrained")
    if broken == "assign":
        model.load_state_dict(plain, assign=True)
    elif broken == "assign views":  # of one piece of memory, anchors too
        state = model.state_dict()
        pieces = torch.cat([value.reshape(-1) for value in state.values()])
        views = pieces.split([value.numel() for value in state.values()])
        loaded = {k: view.view(v.shape) for view, (k, v) in zip(views, state.items())}
        model.load_state_dict(loaded, assign=True)
    elif broken == "new parameter":
        model["b"].weight = nn.Parameter(torch.randn(8, 4))
    count = {"assign": 3, "assign views": 3, "new parameter": 2, "no": 1}[broken]
    assert len(dropconnect_sites(model)) == count
    save_dropconnect(model, tmp_path)
    for other in [tied(), *([untied()] if count == 3 else [])]:
        found = anchors(load_dropconnect(other, tmp_path))
        assert len(found) == len(dropconnect_sites(other))
        assert all(torch.equal(anchor, pretrained) for anchor in found.values())
