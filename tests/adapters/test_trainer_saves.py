"""Models that are no `PreTrainedModel`: what Trainer and accelerate write is plain at every moment."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import surgery.adapters.accelerate
import surgery.adapters.transformers.trainer  # noqa: F401
from surgery import (
    apply_dropconnect,
    dropconnect_sites,
    load_dropconnect,
    plain_state_dict,
    strip_dropconnect,
)
from surgery.adapters.transformers import DropConnectCallback
from surgery.spec.saved import PLAN_FILE

from ..killing import kills


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(99, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, input_ids: Any, labels: Any = None) -> dict[str, Any]:
        scores = self.head(self.embed(input_ids).mean(1))
        return {"loss": nn.functional.cross_entropy(scores, labels[:, 0] % 2), "logits": scores}


PLAIN = {"embed.weight", "head.weight", "head.bias"}


def assert_plain(folder: Path, model: nn.Module) -> None:
    stored = load_file(folder / "model.safetensors")
    assert set(stored) == PLAIN
    plain = plain_state_dict(model)
    assert all(torch.equal(stored[name], plain[name]) for name in PLAIN)
    assert dropconnect_sites(load_dropconnect(Classifier(), folder)) == dropconnect_sites(model)


def trained(trainer: Any, **options: Any) -> Any:
    callback = DropConnectCallback(["embed", "head"], p=0.2, toward="pretrained")
    run = trainer(Classifier(), [callback], max_steps=2, **options)
    run.train()
    return run


def damage(run: Any) -> dict[str, int]:
    """Kill the writing of a checkpoint; count those that look complete and are not right."""
    folder = Path(run.args.output_dir) / f"checkpoint-{run.state.global_step}"

    def save() -> None:
        run._save_checkpoint(run.model, None)
        run.callback_handler.on_save(run.args, run.state, run.control)

    found = {"kills": 0, "with weights": 0, "complete": 0, "raw": 0, "without a plan": 0}
    for _ in kills(save, before=lambda: shutil.rmtree(folder, ignore_errors=True)):
        found["kills"] += 1
        if (folder / "model.safetensors").exists():
            found["with weights"] += 1
            found["complete"] += (folder / "trainer_state.json").exists()
            found["raw"] += set(load_file(folder / "model.safetensors")) != PLAIN
            found["without a plan"] += not (folder / PLAN_FILE).exists()
    return found


def test_a_checkpoint_that_is_killed_is_plain_or_not_there(trainer: Any) -> None:
    """Trainer's own last file makes it complete: ours have to be there before."""
    found = damage(trained(trainer))
    print(f"killed checkpoints: {found}")
    assert found["kills"] > found["with weights"] >= 2
    assert (found["raw"], found["without a plan"]) == (0, 0)


def test_save_model_is_plain(trainer: Any, tmp_path: Path) -> None:
    run = trained(trainer)
    run.save_model(str(tmp_path / "saved"))
    assert_plain(tmp_path / "saved", run.model)
    assert "weight_raw" in run.model.head._parameters  # and goes on
    strip_dropconnect(run.model)
    run.save_model(str(tmp_path / "stripped"))
    assert not (tmp_path / "stripped" / PLAN_FILE).exists()


def test_a_state_dict_that_was_gathered_is_renamed(trainer: Any, tmp_path: Path) -> None:
    """As Trainer does with FSDP: `_save` is given the raw names."""
    run = trained(trainer)
    run._save(str(tmp_path), state_dict=run.model.state_dict())
    assert set(load_file(tmp_path / "model.safetensors")) == PLAIN


def test_a_trainer_that_writes_in_its_own_way(trainer: Any, tmp_path: Path) -> None:
    """As sentence-transformers does."""
    run = trained(trainer)

    class Own(type(run)):
        def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            torch.save(self.model.state_dict(), Path(output_dir) / "own.pt")

    run.__class__ = Own
    run.save_model(str(tmp_path / "saved"))
    assert set(torch.load(tmp_path / "saved" / "own.pt")) == PLAIN
    load_dropconnect(Classifier(), tmp_path / "saved")


@pytest.mark.parametrize("shards", ["10GB", "1KB"])
def test_accelerate_saves_the_plain_model(shards: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = apply_dropconnect(Classifier(), ["embed", "head"], p=0.2, toward="pretrained")
    accelerator.save_model(accelerator.prepare(model), tmp_path, max_shard_size=shards)
    stored: dict[str, Any] = {}
    for path in tmp_path.glob("model*.safetensors"):
        stored |= load_file(path)
    assert set(stored) == PLAIN
    assert dropconnect_sites(load_dropconnect(Classifier(), tmp_path)) == dropconnect_sites(model)
