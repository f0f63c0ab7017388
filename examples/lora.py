"""LoRA whose adapters drop: PEFT on MiniLM, with and without DropConnect on the adapters.

    python examples/lora.py                 # about 4 minutes on 2 CPU cores, no downloads
    python examples/lora.py --seeds 5       # means and standard errors over seeds

MiniLM-L6 learns to sort BBC news into five classes from few examples by adapters of low rank (Hu et al.
2021): as they are, with PEFT's own dropout of the adapters' inputs, and with DropConnect on the weights
of the adapters, which leaves the pretrained weights alone. Prints a table, draws the losses, and shows
that the saved adapter is a plain one: it gives the same logits, bit for bit, without DropConnect.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from bbc import Texts, load_bbc, stratified_split
from minilm import encode, load_classifier, minilm, quiet, show_progress
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from report import compare, estimate, written_whole
from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

from surgery import strip_dropconnect
from surgery.adapters.transformers import DropConnectCallback

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LORA, DROPOUT, DROPCONNECT = "LoRA", "LoRA, lora_dropout", "LoRA, DropConnect"
COLOURS = {LORA: "#555555", DROPOUT: "#0072b2", DROPCONNECT: "#d55e00"}


@dataclass(frozen=True)
class Run:
    """What one training found."""

    correct: np.ndarray
    """Of each test text, whether it was classified correctly."""
    losses: list[float]
    """Of the training, as Trainer logs it."""
    trained: int
    """Weights that were trained."""
    same_when_loaded: bool
    """Whether the saved adapter gives the logits of the operated model."""

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())


def fine_tune(method: str, seed: int, data: Sequence[Texts], options: argparse.Namespace) -> Run:
    """Train one adapter, look how it does on the test texts, save it and load it again."""
    quiet()
    train, test = data
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=options.rank,
        lora_alpha=2 * options.rank,
        lora_dropout=options.p if method == DROPOUT else 0.0,
        target_modules=["query", "key", "value", "dense"],
    )
    model = get_peft_model(load_classifier(minilm(), train.classes, seed), config)
    trainer = Trainer(
        model,
        training_arguments(options, seed),
        train_dataset=encode(train, tokenizer, options.max_length),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    show_progress(trainer, f"{method}, seed {seed}")

    # ---- DropConnect: on the adapters only; the pretrained weights are frozen ------------------
    if method == DROPCONNECT:
        trainer.add_callback(DropConnectCallback("*.lora_*", p=options.p))
    # --------------------------------------------------------------------------------------------

    trainer.train()
    predicted = trainer.predict(encode(test, tokenizer, options.max_length))
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    same = saves_plain(
        model, dict(tokenizer(test.texts[:16], return_tensors="pt", **PAD)), seed, options
    )
    if method == DROPCONNECT:
        strip_dropconnect(model)
    return Run(
        predicted.predictions.argmax(-1) == predicted.label_ids,
        losses,
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        same,
    )


PAD = {"truncation": True, "padding": True}


def saves_plain(model: Any, inputs: dict[str, Any], seed: int, options: argparse.Namespace) -> bool:
    """Whether the adapter that PEFT writes, with DropConnect in place, loads into a model without it,
    and gives the same logits."""
    folder = options.output / "adapter"
    model.save_pretrained(folder)
    base = load_classifier(minilm(), list(model.config.id2label.values()), seed)
    loaded = PeftModel.from_pretrained(base, folder)
    return torch.equal(logits(model, inputs), logits(loaded, inputs))


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    found: torch.Tensor = model.eval()(**inputs).logits
    return found


def training_arguments(options: argparse.Namespace, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(options.output / "trainer"),
        max_steps=options.steps,
        learning_rate=options.lr,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        warmup_steps=0.1,
        logging_steps=max(options.steps // 24, 1),
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
        data_seed=seed,
    )


def summarise(runs: dict[str, list[Run]]) -> str:
    """A table with a row for each method."""
    header = f"{'method':<22}{'test accuracy':<18}{'trained weights':<18}adapter loads as plain"
    lines = [header, "-" * len(header)]
    for method, own in runs.items():
        mean, error = mean_accuracy(own)
        score = f"{100 * mean:.2f} ± {100 * error:.2f} %"
        same = "yes" if all(run.same_when_loaded for run in own) else "NO"
        lines.append(f"{method:<22}{score:<18}{own[0].trained:<18,}{same}")
    return "\n".join(lines)


def mean_accuracy(own: list[Run]) -> tuple[float, float]:
    """With its standard error: over seeds, or binomial for one."""
    if len(own) > 1:
        return estimate([run.accuracy for run in own])
    value = own[0].accuracy
    return value, math.sqrt(value * (1 - value) / len(own[0].correct))


def difference(method: str, own: list[Run], plain: list[Run]) -> str:
    """A line: the difference to plain LoRA, paired by seed, or by text where there is one seed."""
    if len(own) > 1:
        mine, others = ([100 * run.accuracy for run in runs] for runs in (own, plain))
        return compare(method, mine, others, "points")
    gaps = 100 * (own[0].correct.astype(float) - plain[0].correct.astype(float))
    gap, error = gaps.mean(), gaps.std() / math.sqrt(len(gaps))
    verdict = "more than noise" if abs(gap) > 1.96 * error else "within noise"
    return f"  {method:<24}{gap:+.2f} ± {error:.2f} points, {verdict}"


def draw(runs: dict[str, list[Run]], options: argparse.Namespace, path: Path) -> None:
    """Training losses, and the accuracies that came of them."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    for row, (method, own) in enumerate(runs.items()):
        losses = np.array([run.losses for run in own]).mean(0)
        steps = np.linspace(options.steps / len(losses), options.steps, len(losses))
        left.plot(steps, losses, color=COLOURS[method], linewidth=2, label=method)
        mean, error = mean_accuracy(own)
        right.errorbar(
            100 * mean, -row, xerr=100 * error, fmt="o", color=COLOURS[method], capsize=4
        )
    left.set(xlabel="training step", ylabel="training loss (log scale)", yscale="log")
    left.legend(frameon=False)
    right.set_yticks([-row for row in range(len(runs))], list(runs))
    right.set(xlabel="test accuracy (%), ± standard error", ylim=(0.5 - len(runs), 0.5))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"LoRA of rank {options.rank} on {options.train_size} texts of BBC news, p = {options.p:g}"
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write(runs: dict[str, list[Run]], options: argparse.Namespace) -> None:
    """All files, or none."""
    results = {
        method: [{"accuracy": run.accuracy, "losses": run.losses} for run in own]
        for method, own in runs.items()
    }
    with written_whole(options.output) as folder:
        draw(runs, options, folder / "lora.png")
        text = json.dumps({"options": vars(options), "runs": results}, default=str)
        (folder / "results.json").write_text(text + "\n")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds to train with")
    parser.add_argument("--p", type=float, default=0.2, help="probability of dropping")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--train-size", type=int, default=256, help="training texts")
    parser.add_argument("--test-size", type=int, default=1000, help="test texts at most")
    parser.add_argument("--max-length", type=int, default=48, help="tokens of each text")
    parser.add_argument("--output", type=Path, default=Path("out/lora"))
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything needed is installed
    train, test, *_ = stratified_split(load_bbc(), options.train_size, options.test_size)
    runs = {
        method: [fine_tune(method, seed, (train, test), options) for seed in range(options.seeds)]
        for method in COLOURS
    }
    print(f"\n{summarise(runs)}\n\nAccuracy against plain LoRA:")
    for method in (DROPOUT, DROPCONNECT):
        print(difference(method, runs[method], runs[LORA]))
    if options.seeds == 1:
        print(
            "(One seed tells whether two trained adapters differ; for the methods, use --seeds 5.)"
        )
    write(runs, options)
    print(f"Written to {options.output}: lora.png, results.json, adapter")


if __name__ == "__main__":
    main()
