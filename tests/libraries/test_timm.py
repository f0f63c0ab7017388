"""timm: checkpoints and hub files of an operated model are plain, and averages are right."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from surgery import (
    apply_dropconnect,
    load_dropconnect,
    plain_state_dict,
    strip_dropconnect,
)
from surgery.verbs.checkpoint import anchors

timm = pytest.importorskip("timm", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore:.*gets raw keys:UserWarning")  # files for loaders
TARGETS = ["blocks.*.fc*", "head"]


def make(seed: int = 0) -> nn.Module:
    """A ViT of two blocks."""
    torch.manual_seed(seed)
    settings = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=3, **settings)


def operated(seed: int = 0) -> nn.Module:
    return apply_dropconnect(make(seed), TARGETS, p=0.3, toward="pretrained")


def assert_same(one: Any, other: Any) -> None:
    assert list(one) == list(other)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def train(model: nn.Module, steps: int = 2) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("average", [None, "ModelEma", "ModelEmaV2", "ModelEmaV3"])
def test_checkpoint_saver(tmp_path: Path, average: str | None) -> None:
    from timm.utils import CheckpointSaver

    model = operated()
    optimizer = train(model)
    ema = None if average is None else getattr(timm.utils, average)(model)
    saver = CheckpointSaver(
        model, optimizer, model_ema=ema, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    saver.save_checkpoint(0, metric=1.0)
    saver.save_recovery(0)
    wanted = plain_state_dict(model)
    for file in ("last", "model_best", "checkpoint-0", "recovery-0-0"):
        stored = torch.load(tmp_path / f"{file}.pth.tar")
        assert_same(stored["state_dict"], wanted)
        if ema is not None:
            assert_same(stored["state_dict_ema"], wanted)
        assert timm.models.resume_checkpoint(make(1), str(tmp_path / f"{file}.pth.tar")) == 1
    fresh = make(1)
    timm.models.load_checkpoint(fresh, str(tmp_path / "last.pth.tar"))
    assert_same(fresh.state_dict(), wanted)
    assert_same(anchors(load_dropconnect(fresh, tmp_path)), anchors(model))


@pytest.mark.parametrize("remap", [False, True], ids=["", "remap"])
@pytest.mark.parametrize("keys", ["plain", "raw"])
def test_loads_into_an_operated_model(tmp_path: Path, keys: str, remap: bool) -> None:
    source, model = operated(), operated(1)
    train(source)
    before = {name: value.clone() for name, value in anchors(model).items()}
    state = plain_state_dict(source) if keys == "plain" else source.state_dict()
    file = str(tmp_path / "file.pth")
    torch.save({"state_dict": state}, file)
    if keys == "raw" and remap:
        pytest.skip("by order, and the file has anchors, which no plain model has")
    timm.models.load_checkpoint(model, file, remap=remap)
    assert_same(plain_state_dict(model), plain_state_dict(source))
    assert_same(anchors(model), before if keys == "plain" else anchors(source))


@pytest.mark.parametrize("safe", [True, False, "both"])
def test_hub_files(tmp_path: Path, safe: Any) -> None:
    model = operated()
    timm.models._hub.save_for_hf(model, str(tmp_path), safe_serialization=safe)
    wanted = plain_state_dict(model)
    if safe:
        assert_same(load_file(tmp_path / "model.safetensors"), dict(sorted(wanted.items())))
    if safe != True:  # noqa: E712
        assert_same(torch.load(tmp_path / "pytorch_model.bin"), wanted)
    assert_same(anchors(load_dropconnect(make(1), tmp_path)), anchors(model))


@pytest.mark.parametrize("first", ["apply", "average"])
@pytest.mark.parametrize("average", ["ModelEma", "ModelEmaV2", "ModelEmaV3"])
def test_averages(average: str, first: str) -> None:
    """Those of a plain model whose weights move in the same way, whichever of the two comes first."""
    plain = make()
    with_it = copy.deepcopy(plain)
    kind = getattr(timm.utils, average)
    if first == "apply":
        apply_dropconnect(with_it, TARGETS, p=0.3, toward="pretrained")
    averages = [kind(model, decay=0.7) for model in (plain, with_it)]
    if first == "average":
        apply_dropconnect(with_it, TARGETS, p=0.3, toward="pretrained")
    before = {name: value.clone() for name, value in anchors(with_it).items()}
    for _ in range(3):
        for model, its in zip((plain, with_it), averages):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.25)
            its.update(model)
    assert_same(anchors(with_it), before)
    inner = [its.ema if average == "ModelEma" else its.module for its in averages]
    if first == "apply":
        assert_same(anchors(inner[1]), before)
        strip_dropconnect(inner[1])
    assert_same(inner[1].state_dict(), inner[0].state_dict())
