"""accelerate: a checkpoint is loaded into an operated model and dispatched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from surgery import apply_dropconnect, plain_state_dict

accelerate = pytest.importorskip("accelerate")


def make(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.mark.parametrize("device_map", [None, {"": "cpu"}, {"0": "cpu", "1": "cpu", "2": "cpu"}])
def test_load_checkpoint_and_dispatch(tmp_path: Path, device_map: Any) -> None:
    plain, model = make(1), apply_dropconnect(make(2), ["0", "2"], p=0.3)
    save_file(plain.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    accelerate.load_checkpoint_and_dispatch(model, str(tmp_path), device_map=device_map)
    x = torch.randn(3, 4)
    assert torch.equal(model.eval()(x), plain(x))
    assert not torch.equal(model.train()(x), plain(x))
    found, wanted = plain_state_dict(model), plain.state_dict()
    assert list(found) == list(wanted)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
