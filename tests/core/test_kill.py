"""kill -9 at any moment of a save leaves the files of the last one or of this one."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from surgery import apply_dropconnect, dropconnect_sites, load_dropconnect, save_dropconnect
from surgery.checkpoint import PLAN_FILE, anchors

from ..killing import kills

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")


def saved(value: float, p: float, toward: str = "pretrained") -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    nn.init.constant_(model[0].weight, value)
    return apply_dropconnect(model, ["0"] if value else ["*"], p=p, toward=toward)


def content(model: nn.Module) -> Any:
    return dropconnect_sites(model), {name: a.tolist() for name, a in anchors(model).items()}


def what_lies_in(folder: Path) -> Any:
    return content(load_dropconnect(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), folder))


def damage(folder: Path, models: list[nn.Module], count: int) -> dict[str, int]:
    """Kill saves of these models in turn over each other; count what does not hold afterwards."""
    found = {"kills": 0, "neither save": 0, "left over after the next": 0}
    for one, other in zip(models, [*models[1:], models[0]]):
        save_dropconnect(one, folder)
        allowed = [content(one), content(other)]
        for _ in kills(lambda other=other: save_dropconnect(other, folder), count):
            found["kills"] += 1
            try:
                found["neither save"] += what_lies_in(folder) not in allowed
            except Exception:
                found["neither save"] += 1
        save_dropconnect(one, folder)
        expected = 2 if anchors(one) else 1
        found["left over after the next"] += len(os.listdir(folder)) - expected
    return found


MODELS = ((1.0, 0.2, "pretrained"), (2.0, 0.4, "pretrained"), (0.0, 0.4, "zero"))


def test_a_save_that_is_killed_is_the_last_one_or_this_one(tmp_path: Path) -> None:
    models = [saved(*each) for each in MODELS]
    found = damage(tmp_path, models, 16)
    assert found == {"kills": 48, "neither save": 0, "left over after the next": 0}


@pytest.mark.slow
def test_many_saves_that_are_killed(tmp_path: Path, capsys: Any) -> None:
    found = damage(tmp_path, [saved(*each) for each in MODELS], 400)
    with capsys.disabled():
        print(f"\nkilled saves: {found}")
    assert found == {"kills": 1200, "neither save": 0, "left over after the next": 0}


def test_a_first_save_that_is_killed_is_none_or_whole(tmp_path: Path) -> None:
    model = saved(1.0, 0.2)
    for _ in kills(lambda: save_dropconnect(model, tmp_path), 12):
        if (tmp_path / PLAN_FILE).exists():
            assert what_lies_in(tmp_path) == content(model)
            (tmp_path / PLAN_FILE).unlink()


def test_anchors_that_are_replaced_while_they_are_read(tmp_path: Path, monkeypatch) -> None:
    """A reader that has the old plan looks again."""
    one, other = saved(1.0, 0.2), saved(2.0, 0.4)
    save_dropconnect(one, tmp_path)
    import surgery.checkpoint as checkpoint

    read, rounds = checkpoint._read_form, []

    def meanwhile(path: Path) -> Any:
        form = read(path)
        if not rounds:
            rounds.append(1)
            save_dropconnect(other, tmp_path)
        return form

    monkeypatch.setattr(checkpoint, "_read_form", meanwhile)
    assert what_lies_in(tmp_path) == content(other)


def test_the_save_of_the_first_release_is_read_and_replaced(tmp_path: Path) -> None:
    one = saved(1.0, 0.2)
    save_dropconnect(one, tmp_path)
    (path,) = tmp_path.glob("dropconnect_anchors-*")
    path.rename(tmp_path / "dropconnect_anchors.safetensors")
    plan = tmp_path / PLAN_FILE
    plan.write_text(plan.read_text().replace(path.name, "dropconnect_anchors.safetensors"))
    assert what_lies_in(tmp_path) == content(one)
    save_dropconnect(one, tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([PLAN_FILE, path.name])
    assert torch.equal(one[0].weight_anchor, torch.ones(3, 3))
