"""A strategy of Lightning that shards a module trains it, and goes on from a checkpoint: `python
lightning_sharded_worker.py FOLDER CASE`, on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

sys.path.insert(0, str(Path(__file__).parent))
from test_lightning import Module, data

from surgery import apply_dropconnect
from surgery.adapters.lightning import DropConnectCallback

OPTIONS: dict[str, Any] = {"p": 0.3, "toward": "pretrained"}


class OnCpu(FSDPStrategy):
    """Lightning lets FSDP run on GPUs only; on a CPU torch can write what one process has."""

    def _setup_model(self, model: Any) -> Any:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


class Shards(Module):
    """Shards itself, as a module has to for `ModelParallelStrategy`."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, late=True)

    def configure_model(self) -> None:
        if self.net is None:
            self.make()
            apply_dropconnect(self, "net.*", **OPTIONS)
            mesh = self.device_mesh["data_parallel"]
            for part in (self.net[0], self.net[3], self.net):
                fully_shard(part, mesh=mesh)


def prepared(case: str, seed: int) -> tuple[Any, Any, Any, int]:
    """A strategy, a module, the targets of the callback, and how many processes."""
    if case == "fsdp":
        return OnCpu(), Module(seed), "net.*", 1
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=case == "parts"
    )
    return strategy, Shards(seed), None, 2


def run(folder: Path, case: str, name: str, seed: int, resume: Any = None) -> None:
    torch.manual_seed(3)
    strategy, module, targets, processes = prepared(case, seed)
    drop = DropConnectCallback(targets, schedule="linear", **OPTIONS)
    save = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = Trainer(
        strategy=strategy, devices=processes, accelerator="cpu", max_epochs=2, logger=False,
        default_root_dir=folder, callbacks=[drop, save], enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data(), ckpt_path=resume)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(strategy.model, options=whole)
    if trainer.global_rank == 0:
        torch.save({"state": state}, folder / f"{name}.pt")


if __name__ == "__main__":
    where = Path(sys.argv[1])
    run(where, sys.argv[2], "whole", 0)
    run(where, sys.argv[2], "resumed", 7, where / "epoch=0.ckpt")
