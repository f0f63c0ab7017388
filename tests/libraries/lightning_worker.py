"""Two processes that Lightning starts train one module, and then go on from a checkpoint of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

sys.path.insert(0, str(Path(__file__).parent))
from test_lightning import Module, data

from surgery import plain_state_dict
from surgery.adapters.lightning import DropConnectCallback


def run(folder: Path, name: str, seed: int, resume: Any = None) -> None:
    torch.manual_seed(3)
    drop = DropConnectCallback("net.*", p=0.3, toward="pretrained", schedule="linear")
    save = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = Trainer(
        strategy="ddp", devices=2, accelerator="cpu", max_epochs=2, logger=False,
        default_root_dir=folder, callbacks=[drop, save], enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    module = Module(seed)
    trainer.fit(module, data(), ckpt_path=resume)
    torch.save(plain_state_dict(module), folder / f"{name}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    where = Path(sys.argv[1])
    run(where, "whole", 0)
    run(where, "resumed", 7, where / "epoch=0.ckpt")
