"""Strategies of Lightning that shard a module, and the other package in which Lightning comes."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from surgery import convert_checkpoint


def finished(*command: Any) -> str:
    """What another process prints, which has to end well."""
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def plain(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name.removesuffix("_raw"): value
        for name, value in state.items()
        if not name.endswith("_anchor")
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Statistics of batches are those of a process, and it may be another one's that are written."""
    assert set(one) == set(other)
    shared = [name for name in one if "running" not in name]
    assert [name for name in shared if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("case", ["fsdp", "whole", "parts"])
def test_a_module_that_is_sharded(tmp_path: Path, case: str) -> None:
    """One file is plain; of parts two commands make a plain one. A resumed run goes on exactly, with
    the anchors and the masks of the one that wrote it."""
    pytest.importorskip("lightning")
    worker = Path(__file__).with_name("lightning_sharded_worker.py")
    finished(worker, tmp_path, case)
    whole, resumed = (torch.load(tmp_path / f"{name}.pt")["state"] for name in ("whole", "resumed"))
    assert "net.0.weight_anchor" in whole
    assert_same(whole, resumed)
    file = tmp_path / "epoch=1.ckpt"
    if case == "parts":
        dcp_to_torch_save(file, tmp_path / "one.pt")
        convert_checkpoint(tmp_path / "one.pt", tmp_path / "plain.safetensors", "surgery")
        stored = load_file(tmp_path / "plain.safetensors")
    else:
        stored = torch.load(file, weights_only=True)["state_dict"]
    assert_same(stored, plain(resumed))


def test_the_private_name() -> None:
    """adapters/lightning stands on it."""
    fsdp = pytest.importorskip("lightning.pytorch.strategies.fsdp")
    names = [*inspect.signature(fsdp._load_raw_module_state).parameters]
    assert names[:2] == ["state_dict", "module"]


PACKAGE = """
import sys
from pathlib import Path

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from surgery import plain_state_dict
from surgery.adapters.lightning import DropConnectCallback

class Module(LightningModule):
    def __init__(self, seed, late=False):
        super().__init__()
        torch.manual_seed(seed)
        self.net = torch.nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)

folder = Path(sys.argv[1])
rows = torch.utils.data.TensorDataset(torch.randn(16, 4), torch.arange(16) % 2)

def run(seed, resume=None):
    drop = DropConnectCallback("net", p=0.4, toward="pretrained")
    save = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    average = EMAWeightAveraging(decay=0.5)
    trainer = Trainer(max_epochs=3, logger=False, callbacks=[drop, save, average], accelerator="cpu",
                      enable_progress_bar=False, enable_model_summary=False)
    module = Module(seed)
    torch.manual_seed(3)
    trainer.fit(module, torch.utils.data.DataLoader(rows, 4), ckpt_path=resume)
    return plain_state_dict(module)

whole = run(0)
resumed = run(7, folder / "epoch=0.ckpt")
stored = torch.load(folder / "epoch=1.ckpt", weights_only=True)
Module.load_from_checkpoint(folder / "epoch=1.ckpt", seed=9, weights_only=True)
Trainer(callbacks=DropConnectCallback(), logger=False, accelerator="cpu")
print(issubclass(DropConnectCallback, Callback), "lightning.pytorch" in sys.modules)
print(list(stored["state_dict"]), list(stored["current_model_state"]))
print([torch.equal(whole[name], resumed[name]) for name in whole])
"""


def test_the_other_package(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning")
    (tmp_path / "script.py").write_text(PACKAGE)
    printed = finished(tmp_path / "script.py", tmp_path).splitlines()
    assert printed[-3:] == [
        "True False",
        "['net.weight', 'net.bias'] ['net.weight', 'net.bias']",
        "[True, True]",
    ]


def test_both_packages_in_one_process() -> None:
    """The callback is for both; what is imported later is taught when it is."""
    pytest.importorskip("lightning")
    pytest.importorskip("pytorch_lightning")
    code = "\n".join(
        [
            "import surgery.adapters.lightning as ours, lightning.pytorch",
            "import surgery.adapters.lightning.unified",
            "import pytorch_lightning",
            "import surgery.adapters.lightning.separate",
            "for package in (lightning.pytorch, pytorch_lightning):",
            "    get = package.strategies.DDPStrategy.lightning_module_state_dict",
            "    print(get.taught_by_surgery, issubclass(ours.DropConnectCallback, package.Callback))",
        ]
    )
    assert finished("-c", code).split() == ["True"] * 4
