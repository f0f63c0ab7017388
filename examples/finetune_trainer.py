"""Fine-tune a pretrained model with DropConnect, take DropConnect out again, save a plain model.

    python examples/finetune_trainer.py                 # 5 minutes on 2 quiet CPU cores, no downloads
    python examples/finetune_trainer.py --seeds 5       # means and standard errors over seeds
    python examples/finetune_trainer.py --model bert-base-uncased --dataset ag_news    # from the hub

MiniLM-L6 learns to sort BBC news into five classes from few examples, three times from the same
start: as it is, with dropped weights going toward zero (DropConnect, Wan et al. 2013), and with dropped
weights going toward their pretrained values (mixout, Lee et al. 2020). Prints a table, draws the
curves, and shows that the saved model gives the same logits, bit for bit, in a process that has no
`surgery`.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from bbc import Texts, drop_duplicates, load_bbc, stratified_split
from minilm import encode, load_classifier, minilm, quiet, show_progress
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from surgery import strip_dropconnect
from surgery.adapters.transformers import DropConnectCallback

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BASELINE, ZERO, PRETRAINED = "baseline", "toward zero", "toward pretrained"
COLOURS = ("#555555", "#d55e00", "#0072b2")
VALIDATION = 200
"""Examples on which the curves are measured while training; the table is about the test set."""


@dataclass(frozen=True)
class Run:
    """What is known of one fine-tuning."""

    method: str
    seed: int
    correct: np.ndarray
    """Of each test example, whether it was classified correctly."""
    step_seconds: float
    """Median."""
    memory: float
    """Peak, in MB."""
    history: list[dict[str, float]]
    """What Trainer logged."""

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())


def fine_tune(method: str, seed: int, options: argparse.Namespace) -> Run:
    """One run, from loading to saving. `in_own_process` calls it in a process of its own."""
    quiet()
    train, validation, test = load_data(options)
    name = options.model or minilm()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = load_classifier(name, train.classes, seed)
    clock = StepClock()
    trainer = Trainer(
        model,
        training_arguments(options, seed),
        train_dataset=encode(train, tokenizer, options.max_length),
        eval_dataset=encode(validation, tokenizer, options.max_length),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        callbacks=[clock],
    )
    show_progress(trainer, f"{method}, seed {seed}")

    # ---- DropConnect: one line puts it in ------------------------------------------------------
    if method == ZERO:
        trainer.add_callback(DropConnectCallback("all-linear", p=options.p))
    if method == PRETRAINED:
        trainer.add_callback(DropConnectCallback("all-linear", p=options.p, toward="pretrained"))
    # --------------------------------------------------------------------------------------------

    trainer.train()
    predicted = trainer.predict(encode(test, tokenizer, options.max_length))
    correct = predicted.predictions.argmax(-1) == predicted.label_ids
    run = Run(method, seed, correct, clock.median(), peak_memory(), trainer.state.log_history)

    if method == PRETRAINED and seed == 0:
        strip_and_save(model, tokenizer, test.texts[:32], options.output)
    return run


def strip_and_save(model: Any, tokenizer: Any, texts: list[str], output: Path) -> None:
    """Take DropConnect out, save, and keep some logits from before to compare with."""
    probe = dict(tokenizer(texts, truncation=True, padding=True, return_tensors="pt"))
    operated = logits(model.cpu(), probe)

    # ---- ... and one line takes it out. What is saved is a plain checkpoint --------------------
    strip_dropconnect(model)
    model.save_pretrained(output / "model")
    # --------------------------------------------------------------------------------------------

    tokenizer.save_pretrained(output / "model")
    torch.save((probe, operated, torch.equal(operated, logits(model, probe))), output / "probe.pt")


def load_data(options: argparse.Namespace) -> list[Texts]:
    """Train, validation and test texts; the same for every run."""
    sizes = (options.train_size, VALIDATION)
    if options.dataset is None:
        return stratified_split(load_bbc(), *sizes, options.test_size)[:3]
    return load_hub_dataset(options.dataset, *sizes, options.test_size)


def load_hub_dataset(name: str, *sizes: int) -> list[Texts]:
    """A classification data set of the hub that has a text column and a `label` column."""
    from datasets import load_dataset

    def texts(split: str) -> Texts:
        rows = load_dataset(name, split=split)
        column = next(key for key, kind in rows.features.items() if kind.dtype.endswith("string"))
        labels = list(rows["label"])
        classes = getattr(rows.features["label"], "names", None) or sorted(set(labels))
        if isinstance(labels[0], str):
            labels = [classes.index(label) for label in labels]
        return Texts(list(rows[column]), labels, [str(label) for label in classes])

    *sizes_of_train, test_size = sizes
    parts = stratified_split(drop_duplicates(texts("train")), *sizes_of_train)[:2]
    test = texts("test")
    return [*parts, test if len(test) <= test_size else stratified_split(test, test_size)[0]]


def training_arguments(options: argparse.Namespace, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(options.output / "trainer"),
        max_steps=options.steps,
        learning_rate=options.lr,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        warmup_steps=0.1,
        logging_steps=max(options.steps // 24, 1),
        eval_strategy="steps",
        eval_steps=max(options.steps // 6, 1),
        eval_on_start=True,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
        data_seed=seed,
    )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Measures every training step: forward, backward and update."""

    def __init__(self) -> None:
        self.begun = 0.0
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.begun)

    def median(self) -> float:
        return statistics.median(self.seconds)


@torch.no_grad()
def logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    found: torch.Tensor = model.eval()(**inputs).logits
    return found


def peak_memory() -> float:
    """MB that this process has held at most: of the GPU if there is one, else of main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    try:  # unlike `ru_maxrss`, this does not count what the parent process held at the fork
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def in_own_process(method: str, seed: int, options: argparse.Namespace) -> Run:
    """`fine_tune` in a fresh process, so that peak memory is that of this run alone."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(fine_tune, method, seed, options).result()


RELOAD = """
import sys
sys.modules["surgery"] = None  # from here on, importing surgery is an error
import torch
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging
logging.disable_progress_bar()
folder, probe = sys.argv[1:]
model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
assert not any(report.values()), report  # nothing missing, nothing unexpected
inputs, operated, stripped_is_same = torch.load(probe)
with torch.no_grad():
    reloaded_is_same = torch.equal(model.eval()(**inputs).logits, operated)
print(f"  with DropConnect in place = after strip_dropconnect:           {stripped_is_same}")
print(f"  with DropConnect in place = loaded by plain transformers:      {reloaded_is_same}")
sys.exit(not (stripped_is_same and reloaded_is_same))
"""


def reload_in_fresh_process(output: Path) -> bool:
    """Load the saved model with nothing but transformers, and say whether its logits are the same."""
    command = [sys.executable, "-c", RELOAD, str(output / "model"), str(output / "probe.pt")]
    return subprocess.run(command).returncode == 0


def summarise(runs: dict[str, list[Run]]) -> str:
    """A table with a row for each method."""
    header = f"{'method':<20}{'test accuracy':<18}{'ms per step':<14}{'peak memory'}"
    lines = [header, "-" * len(header)]
    for method, own in runs.items():
        mean, error = estimate([run.accuracy for run in own], binomial_error(own[0]))
        score = f"{100 * mean:.2f} ± {100 * error:.2f} %"
        step = f"{1000 * statistics.median(run.step_seconds for run in own):.0f}"
        memory = max(run.memory for run in own)
        lines.append(f"{method:<20}{score:<18}{step:<14}{memory:.0f} MB")
    return "\n".join(lines)


def binomial_error(run: Run) -> float:
    return math.sqrt(run.accuracy * (1 - run.accuracy) / len(run.correct))


def estimate(values: Sequence[float], error_of_one: float) -> tuple[float, float]:
    """Mean and standard error: over the values, or as given if there is only one."""
    if len(values) == 1:
        return values[0], error_of_one
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


T_975 = {2: 12.7, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Student's t, 97.5 %, by number of seeds."""


def compare(method: str, own: list[Run], baseline: list[Run]) -> str:
    """The difference to the baseline, and whether it is more than noise.

    The runs of a pair share the seed and the test set. With one seed the standard error is McNemar's,
    from the test examples on which the two disagree; with more it is that of the differences.
    """
    pairs = [a.correct.astype(int) - b.correct.astype(int) for a, b in zip(own, baseline)]
    one = float(pairs[0].std() / math.sqrt(len(pairs[0])))
    mean, error = estimate([float(pair.mean()) for pair in pairs], one)
    limit = error * (1.96 if len(pairs) == 1 else T_975.get(len(pairs), 2.2))
    verdict = "more than noise" if abs(mean) > limit else "within noise"
    return (
        f"{method} against baseline: {100 * mean:+.2f} ± {100 * error:.2f} points (paired), {verdict} "
        f"(95 % limit: {100 * limit:.2f})"
    )


def draw(runs: dict[str, list[Run]], options: argparse.Namespace, path: Path) -> None:
    """Loss and accuracy while training, averaged over seeds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for (method, own), colour in zip(runs.items(), COLOURS):
        left.plot(*curve(own, "eval_loss"), color=colour, linewidth=2, label=method)
        left.plot(*curve(own, "loss"), color=colour, linewidth=1, linestyle=":")
        steps, values = curve(own, "eval_accuracy")
        right.plot(steps, 100 * values, color=colour, linewidth=2, marker="o", label=method)
    seeds = "" if options.seeds == 1 else f", mean of {options.seeds} seeds"
    left.set(xlabel="training step", ylabel="cross-entropy (log scale)", yscale="log")
    left.set_title("Loss: validation (solid), training (dotted)")
    right.set(xlabel="training step", ylabel="accuracy (%)")
    right.set_title("Validation accuracy")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.yaxis.set_major_formatter("{x:g}")
    right.legend(frameon=False, loc="lower right")
    figure.suptitle(
        f"{Path(options.model or 'MiniLM-L6').name} fine-tuned on {options.train_size} examples of "
        f"{options.dataset or 'BBC news'}, without and with DropConnect (p = {options.p:g}){seeds}"
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def curve(own: list[Run], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a logged quantity, averaged over runs."""
    logged = [[(row["step"], row[key]) for row in run.history if key in row] for run in own]
    steps, values = np.array(logged).mean(0).T
    return steps, values


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", help="a model of the hub, or a folder, instead of MiniLM-L6")
    parser.add_argument("--dataset", help="a data set of the hub, instead of BBC news")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds to train with")
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--p", type=float, default=0.1, help="probability of dropping a weight")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--train-size", type=int, default=256, help="training examples")
    parser.add_argument("--test-size", type=int, default=1000, help="test examples at most")
    parser.add_argument("--max-length", type=int, default=48, help="tokens of each text")
    parser.add_argument("--output", type=Path, default=Path("out/finetune"))
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.model is None and options.dataset is None:
        os.environ["HF_HUB_OFFLINE"] = "1"  # everything needed is installed
    begun = time.perf_counter()
    methods = BASELINE, ZERO, PRETRAINED
    number = len(methods) * options.seeds
    print(f"{number} runs of {options.steps} steps ({', '.join(methods)}), then a table.")
    runs: dict[str, list[Run]] = {method: [] for method in methods}
    for method, seed in product(methods, range(options.seeds)):
        run = in_own_process(method, seed, options)
        print(f"{method}, seed {seed}: accuracy {100 * run.accuracy:.2f} %", flush=True)
        runs[method].append(run)
    print(f"\n{summarise(runs)}\n")
    print(
        "Accuracy: ± standard error", "over seeds." if options.seeds > 1 else "(binomial).", end=" "
    )
    print("Time: median step. Memory: of the run's own process, from start to end.\n")
    for method in (ZERO, PRETRAINED):
        print(compare(method, runs[method], runs[BASELINE]))
    if options.seeds == 1:
        print("(One seed tells whether two trained models differ; for the methods, use --seeds 5.)")
    draw(runs, options, options.output / "curves.png")
    print(f"\nCurves: {options.output / 'curves.png'}   Plain model: {options.output / 'model'}")
    print("\nLogits of the fine-tuned model, compared bit for bit:")
    same = reload_in_fresh_process(options.output)
    print(f"\n{time.perf_counter() - begun:.0f} s in all")
    sys.exit(not same)


if __name__ == "__main__":
    main()
