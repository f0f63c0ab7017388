"""A warning for raw keys in a file that others will read, and none where all is well."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from surgery import apply_dropconnect, plain_state_dict, strip_dropconnect


def operated(**options: Any) -> nn.Sequential:
    model = nn.Sequential()
    model.add_module("part", nn.Linear(3, 3))
    return apply_dropconnect(model, "part", p=0.3, **options)


def own_copy(state: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in state.items()}


SAVERS: dict[str, Callable[[Any, Path], Any]] = {
    "torch.save": lambda state, file: torch.save(state, file),
    "torch.save(f=)": lambda state, file: torch.save(obj=state, f=str(file)),
    "save_file": lambda state, file: save_file(state, file),
    "save": lambda state, file: save(state),
}


@pytest.mark.parametrize("way", SAVERS)
def test_raw_keys_warn(tmp_path: Path, way: str) -> None:
    model = operated()
    with pytest.warns(
        UserWarning, match=r"raw keys \('part.weight_raw'; 1 in all\).*plain_state_dict"
    ):
        SAVERS[way](own_copy(model.state_dict()), tmp_path / "file")


@pytest.mark.parametrize("way", SAVERS)
def test_the_warning_is_of_the_line_that_saves(tmp_path: Path, way: str) -> None:
    model = operated()
    with pytest.warns(UserWarning, match="raw keys") as seen:
        SAVERS[way](own_copy(model.state_dict()), tmp_path / "file")
    assert [one.filename for one in seen] == [__file__]


@pytest.mark.parametrize("way", SAVERS)
def test_a_part_and_a_whole_that_holds_it(tmp_path: Path, way: str) -> None:
    model = operated()
    for state in (nn.ModuleDict({"encoder": model}).state_dict(), own_copy(model.state_dict())):
        with pytest.warns(UserWarning, match="raw keys"):
            SAVERS[way](own_copy(state), tmp_path / "file")


@pytest.mark.parametrize("way", SAVERS)
def test_no_warning(tmp_path: Path, way: str) -> None:
    """Warnings are errors here: plain keys, names of somebody else's, a model that was stripped."""
    model, file = operated(toward="pretrained"), tmp_path / "file"
    SAVERS[way](own_copy(plain_state_dict(model)), file)
    SAVERS[way]({"weight_raw": torch.ones(2), "other.weight_raw": torch.ones(2)}, file)
    SAVERS[way]({"part.weight_raw": torch.ones(3, 5)}, file)
    state = own_copy(model.state_dict())
    strip_dropconnect(model)
    SAVERS[way](state, file)


def test_the_state_of_a_run_is_left_alone(tmp_path: Path) -> None:
    model = operated()
    torch.save({"model": model.state_dict(), "step": 3}, tmp_path / "run.pt")
    torch.save(model, tmp_path / "model.pt")


def test_models_are_not_kept() -> None:
    model = operated()
    there = weakref.ref(model)
    del model
    gc.collect()
    assert there() is None


def test_tensors_without_a_shape_are_left_alone(tmp_path: Path) -> None:
    model = operated()
    torch.save({"part.weight_raw": nn.UninitializedParameter()}, tmp_path / "lazy.pt")
    assert model.training
