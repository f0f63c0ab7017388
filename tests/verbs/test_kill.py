"""kill -9 at any moment of a save leaves the files of the last one or of this one."""

from __future__ import annotations

import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from surgery import apply_dropconnect, dropconnect_sites, load_dropconnect, save_dropconnect
from surgery.spec.saved import PLAN_FILE
from surgery.verbs.checkpoint import anchors

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


def damage(folder: Path, models: list[nn.Module]) -> dict[str, int]:
    """Kill saves of each model over the one before, at everything they do to a file; count what does
    not hold afterwards."""
    found = {"kills": 0, "neither save": 0, "left over after the next": 0}
    for one, other in zip(models, [*models[1:], models[0]]):
        allowed = [content(one), content(other)]
        write = partial(save_dropconnect, other, folder)
        for _ in kills(write, before=partial(save_dropconnect, one, folder)):
            found["kills"] += 1
            try:
                found["neither save"] += what_lies_in(folder) not in allowed
            except Exception:
                found["neither save"] += 1
        write()
        found["left over after the next"] += len(os.listdir(folder)) - (2 if anchors(other) else 1)
    return found


def test_a_save_that_is_killed_is_the_last_one_or_this_one(tmp_path: Path) -> None:
    """Other anchors, then none, then some again: killed between two files, those of the first release
    did not match."""
    models = [saved(1.0, 0.2), saved(2.0, 0.4), saved(0.0, 0.4, "zero")]
    found = damage(tmp_path, models)
    print(f"killed saves: {found}")
    assert found.pop("kills") > 50
    assert found == {"neither save": 0, "left over after the next": 0}


def test_a_first_save_that_is_killed_is_none_or_whole(tmp_path: Path) -> None:
    model = saved(1.0, 0.2)
    folder, seen = tmp_path / "save", []

    def remove() -> None:
        shutil.rmtree(folder, ignore_errors=True)

    for _ in kills(partial(save_dropconnect, model, folder), before=remove):
        seen.append((folder / PLAN_FILE).exists())
        if seen[-1]:
            assert what_lies_in(folder) == content(model)
    assert set(seen) == {False, True}


def test_anchors_that_are_replaced_while_they_are_read(tmp_path: Path, monkeypatch) -> None:
    """A reader that has the old plan looks again."""
    one, other = saved(1.0, 0.2), saved(2.0, 0.4)
    save_dropconnect(one, tmp_path)
    loads, rounds = json.loads, []

    def meanwhile(*args: Any, **options: Any) -> Any:
        if not rounds:
            rounds.append(1)
            save_dropconnect(other, tmp_path)
        return loads(*args, **options)

    monkeypatch.setattr("json.loads", meanwhile)
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
