"""Fine-tune with DropConnect in two processes (DDP, gloo, CPU).

    torchrun --nproc-per-node 2 examples/finetune_ddp.py
    accelerate launch --multi_gpu --num_processes 2 examples/finetune_ddp.py    # on CPU all the same

MiniLM-L6 learns BBC news through the HuggingFace Trainer, which needs no change for this; about a
minute on 2 CPU cores. Shows that the processes drop different weights, though both are seeded alike,
and that they nevertheless end with the same weights, bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bbc import load_bbc, stratified_split
from minilm import encode, load_classifier, minilm, quiet, show_progress
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)

from surgery import apply_dropconnect, strip_dropconnect

SITE = "bert.encoder.layer.0.attention.self.query"
"""The module whose masks are shown."""


def fine_tune(options: argparse.Namespace) -> None:
    """What every process does."""
    train, test, _ = stratified_split(load_bbc(), options.train_size, options.test_size)
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    model = load_classifier(minilm(), train.classes, seed=0)

    # ---- DropConnect: one line puts it in. Trainer wraps the model in DDP later ----------------
    apply_dropconnect(model, "all-linear", p=options.p)
    # --------------------------------------------------------------------------------------------

    trainer = Trainer(
        model,
        training_arguments(options),
        train_dataset=encode(train, tokenizer, max_length=64),
        eval_dataset=encode(test, tokenizer, max_length=64),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    show_progress(trainer, "rank 0")
    trainer.train()
    scores = trainer.evaluate()
    masks = gather(keep_mask(model.get_submodule(SITE)))
    weights = gather(digest(model))

    # ---- ... and one line takes it out ---------------------------------------------------------
    strip_dropconnect(model)
    trainer.save_model(str(options.output / "model"))  # rank 0 writes a plain checkpoint
    # --------------------------------------------------------------------------------------------

    if trainer.is_world_process_zero():
        report(masks, weights, scores["eval_accuracy"], options)


def training_arguments(options: argparse.Namespace) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(options.output / "trainer"),
        max_steps=options.steps,
        learning_rate=3e-4,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=64,
        warmup_steps=0.1,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        use_cpu=True,
        ddp_backend="gloo",
        ddp_find_unused_parameters=False,
    )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@torch.no_grad()
def keep_mask(linear: Any) -> Tensor:
    """The mask of one forward call, read off its output for the unit vectors. All processes take the
    same seed before, so what differs comes from DropConnect alone."""
    torch.manual_seed(0)
    used: Tensor = linear.train()(torch.eye(linear.in_features)) - linear.bias
    return used.t().abs() > 0


def digest(model: nn.Module) -> str:
    """SHA-256 of all weights."""
    total = hashlib.sha256()
    for value in model.state_dict().values():
        total.update(value.contiguous().numpy().tobytes())
    return total.hexdigest()


def gather(value: Any) -> list[Any]:
    """The value of every process."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def report(
    masks: list[Tensor], weights: list[str], score: float, options: argparse.Namespace
) -> None:
    """Print what rank 0 knows of all processes."""
    p = options.p
    kept = [f"{100 * mask.float().mean():.1f} %" for mask in masks]
    equal = [f"{100 * (masks[0] == mask).float().mean():.1f} %" for mask in masks]
    expected = f"{100 * (p**2 + (1 - p) ** 2):.1f} %"
    drawn = enumerate(zip(kept, equal))
    lines = [
        f"{len(masks)} processes, {options.steps} steps, p = {p:g}",
        "",
        f"One mask of {SITE}, all processes seeded alike",
        f"(two independent masks are equal in {expected} of the entries):",
        *(f"  rank {i}: keeps {k}, equal to rank 0's in {same}" for i, (k, same) in drawn),
        "",
        f"Weights after training, bit for bit the same on all ranks: {len(set(weights)) == 1}",
        *(f"  rank {i}: sha256 {value[:16]}..." for i, value in enumerate(weights)),
        "",
        f"Test accuracy {100 * score:.1f} %. Plain model: {options.output / 'model'}",
    ]
    print("\n" + "\n".join(lines), flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--p", type=float, default=0.1, help="probability of dropping a weight")
    parser.add_argument("--train-size", type=int, default=256, help="training examples")
    parser.add_argument("--test-size", type=int, default=512, help="test examples")
    parser.add_argument("--output", type=Path, default=Path("out/ddp"))
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if "LOCAL_RANK" not in os.environ:
        sys.exit(
            "Start this with: torchrun --nproc-per-node 2 examples/finetune_ddp.py\n"
            "(`accelerate launch --cpu` starts a single process; see the top of this file)"
        )
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything needed is installed
    quiet()
    fine_tune(options)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
