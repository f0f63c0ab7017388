"""The two-layer network of the DropConnect paper (Wan et al. 2013, section 6.1) on digits.

    python examples/paper_mlp.py                  # scikit-learn's digits: about 3 minutes on 2 cores
    python examples/paper_mlp.py --data MNIST --hidden 800    # MNIST: a folder with its four IDX files

No-Drop, Dropout, and DropConnect with one mask per batch, one per example, and Gaussian noise learn
from the same start, with several seeds. Each is then evaluated by the weights as they are ("mean"), by
the paper's moment-matched inference ("moments", and as the paper does it, by draws), and by the mean
of the probabilities over real masks.

The recipe is the paper's: batches of 128, momentum 0.9, p = 0.5, no augmentation, weights from
N(0, 0.1^2), a learning rate that falls in steps after epochs in the proportion 600-400-20. The first
rate is the paper's 0.1, or another of --rates: for each method that of the lowest loss on validation
digits. Prints tables, draws plots, and writes results.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import OrderedDict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib
import torch
from digits import Digits, load_digits, load_mnist, random_split
from report import compare, estimate, written_whole
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from surgery import DropConnectModule, apply_dropconnect, mc_predict, set_inference

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BATCH, MOMENTUM, INITIAL_STD = 128, 0.9, 0.1
SCHEDULE = ((600, 1.0), (400, 0.5), (400, 0.1), (20, 0.05), (20, 0.01), (20, 0.005), (20, 0.001))
"""Of the learning rate: (share of the epochs, factor)."""

BASELINE, HIDDEN = "No-Drop", ["fc1", "fc2"]
METHODS: dict[str, tuple[list[str], dict[str, Any]]] = {
    BASELINE: ([], {}),
    # An input of a layer is an activation of the layer before it.
    "Dropout": (["fc2", "out"], {"unit": "input", "sampling": "example"}),
    "DropConnect, batch": (HIDDEN, {"sampling": "batch"}),
    "DropConnect, example": (HIDDEN, {"sampling": "example"}),
    "DropConnect, gaussian": (HIDDEN, {"sampling": "gaussian"}),
}
"""Which layers are operated on, and how."""

COLOURS = ("#555555", "#009e73", "#56b4e9", "#d55e00", "#cc79a7")
MASKS = 100
"""Forwards with real masks, whose probabilities are averaged."""


@dataclass(frozen=True)
class Score:
    """On some digits."""

    error: float
    """Share classified wrongly, in percent."""
    loss: float
    """Mean negative log-likelihood, in nats."""


@dataclass(frozen=True)
class Run:
    """What is known of one training."""

    method: str
    seed: int
    rate: float
    validation_loss: float
    """By which the rate is chosen: mean inference, in nats."""
    scores: dict[str, Score]
    """By way of inference."""
    curve: list[float]
    """Error by epoch, mean inference, in percent."""


def train(task: tuple[str, int, float], options: argparse.Namespace) -> Run:
    """Train and evaluate one network."""
    method, seed, rate = task
    learned, validation, test = load_data(options, seed)
    torch.manual_seed(seed)
    model = mlp(learned.images.shape[1], options.hidden)

    # ---- one call makes each of the methods ----------------------------------------------------
    targets, config = METHODS[method]
    if targets:
        apply_dropconnect(model, targets, p=options.p, **config)
    # --------------------------------------------------------------------------------------------

    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM)
    curve = []
    for epoch in range(options.epochs):
        optimizer.param_groups[0]["lr"] = rate * rate_factor((epoch + 0.5) / options.epochs)
        train_epoch(model, optimizer, learned)
        curve.append(evaluate(model, test)["mean"].error)
    scores = evaluate(model, test, options.samples)
    return Run(method, seed, rate, evaluate(model, validation)["mean"].loss, scores, curve)


def load_data(options: argparse.Namespace, seed: int) -> list[Digits]:
    """Digits to learn from, to choose the learning rate by, and to test on. With scikit-learn's, every
    seed has a split of its own; MNIST's test digits are those of its authors."""
    if options.data is None:
        sizes = (options.train_size, options.validation_size, options.test_size)
        return random_split(load_digits(), *sizes, seed=seed)
    train, test = load_mnist(options.data)
    size = min(options.train_size, len(train) - options.validation_size)
    return [*random_split(train, size, options.validation_size, seed=seed), test]


def mlp(pixels: int, hidden: int) -> nn.Sequential:
    """Two hidden layers, ReLU, ten logits; weights start as in the paper."""
    layers = {
        "fc1": nn.Linear(pixels, hidden),
        "relu1": nn.ReLU(),
        "fc2": nn.Linear(hidden, hidden),
        "relu2": nn.ReLU(),
        "out": nn.Linear(hidden, 10),
    }
    for layer in layers.values():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=INITIAL_STD)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(OrderedDict(layers))


def rate_factor(progress: float) -> float:
    """Factor of the learning rate at that part of training, in [0, 1)."""
    left = progress * sum(share for share, _ in SCHEDULE)
    for share, factor in SCHEDULE:
        if left < share:
            return factor
        left -= share
    return SCHEDULE[-1][1]


def train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, data: Digits) -> None:
    model.train()
    for rows in torch.randperm(len(data)).split(BATCH):
        loss = F.cross_entropy(model(data.images[rows]), data.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def evaluate(model: nn.Sequential, test: Digits, samples: int | None = None) -> dict[str, Score]:
    """By mean inference; given the number of draws, by every way that has a meaning for the model."""
    model.eval()
    found = {"mean": model(test.images).softmax(-1)}
    if samples is not None and is_operated(model):
        # ---- the paper's inference, exact and by its draws; real masks -------------------------
        with set_inference(model, "moments"):
            found["moments"] = model(test.images).softmax(-1)
        with set_inference(model, "moments", samples=samples):
            found[f"{samples} draws"] = model(test.images).softmax(-1)
        found[f"{MASKS} masks"] = mc_predict(model, test.images, MASKS).probabilities
        # ----------------------------------------------------------------------------------------
    return {name: score(probabilities, test.labels) for name, probabilities in found.items()}


def is_operated(model: nn.Module) -> bool:
    return any(isinstance(module, DropConnectModule) for module in model.modules())


def score(probabilities: Tensor, labels: Tensor) -> Score:
    wrong = (probabilities.argmax(-1) != labels).double().mean().item()
    return Score(100 * wrong, F.nll_loss(probabilities.clamp_min(1e-12).log(), labels).item())


def run_all(options: argparse.Namespace) -> dict[str, dict[float, list[Run]]]:
    """By method and learning rate, a run for each seed. One process a core."""
    tasks = [
        (m, seed, rate) for m in METHODS for rate in options.rates for seed in range(options.seeds)
    ]
    with ProcessPoolExecutor(
        os.cpu_count(),
        mp_context=get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as pool:
        found = pool.map(partial(train, options=options), tasks)
        runs = list(tqdm(found, desc="training", total=len(tasks), unit="run"))
    return {
        m: {r: [run for run in runs if (run.method, run.rate) == (m, r)] for r in options.rates}
        for m in METHODS
    }


def validation_loss(own: list[Run]) -> float:
    """Mean over seeds."""
    return estimate([run.validation_loss for run in own])[0]


def chosen(runs: dict[str, dict[float, list[Run]]]) -> dict[str, list[Run]]:
    """Of each method, the runs at the learning rate of the lowest validation loss."""
    return {method: min(rates.values(), key=validation_loss) for method, rates in runs.items()}


def summarise_rates(runs: dict[str, dict[float, list[Run]]]) -> str:
    """Validation loss by learning rate."""
    header = f"{'validation loss at rate':<24}" + "".join(f"{r:<10g}" for r in runs[BASELINE])
    rows = [
        f"{method:<24}" + "".join(f"{validation_loss(own):<10.3f}" for own in rates.values())
        for method, rates in runs.items()
    ]
    return "\n".join([header, "-" * len(header), *rows])


def summarise(runs: dict[str, list[Run]]) -> str:
    """A table with a row for each method and way of inference."""
    header = f"{'method':<24}{'rate':<8}{'inference':<14}{'test error':<18}test loss (nats)"
    lines = [header, "-" * len(header)]
    for method, own in runs.items():
        for i, inference in enumerate(own[0].scores):
            names = f"{method:<24}{own[0].rate:<8g}" if i == 0 else " " * 32
            error = estimate([run.scores[inference].error for run in own])
            loss = estimate([run.scores[inference].loss for run in own])
            percent = f"{error[0]:.2f} ± {error[1]:.2f} %"
            lines.append(f"{names}{inference:<14}{percent:<18}{loss[0]:.4f} ± {loss[1]:.4f}")
    return "\n".join(lines)


def compare_all(runs: dict[str, list[Run]]) -> str:
    """Paired differences: to No-Drop, between samplings, and between ways of inference."""
    dropped = [method for method in runs if method != BASELINE]
    batch, example, gaussian = dropped[1:]
    base, reference = errors(runs[BASELINE]), errors(runs[example])
    return "\n".join(
        [
            "Test error, mean inference, against No-Drop:",
            *(compare(m, errors(runs[m]), base, "points") for m in dropped),
            f"Test error, mean inference, against {example}:",
            *(compare(m, errors(runs[m]), reference, "points") for m in (batch, gaussian)),
            "Test error, moments against mean inference of the same network:",
            *(compare(m, errors(runs[m], "moments"), errors(runs[m]), "points") for m in dropped),
            "Test loss, moments against mean inference of the same network:",
            *(compare(m, losses(runs[m], "moments"), losses(runs[m]), "nats", 4) for m in dropped),
        ]
    )


def errors(own: list[Run], inference: str = "mean") -> list[float]:
    return [run.scores[inference].error for run in own]


def losses(own: list[Run], inference: str = "mean") -> list[float]:
    return [run.scores[inference].loss for run in own]


def draw_errors(runs: dict[str, list[Run]], path: Path) -> None:
    """Test error and loss of every seed, and their means, by method and way of inference."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    for panel, values_of, label in (
        (axes[0], errors, "test error (%)"),
        (axes[1], losses, "test loss (nats)"),
    ):
        rows = [(m, i, c) for (m, own), c in zip(runs.items(), COLOURS) for i in own[0].scores]
        for row, (method, inference, colour) in enumerate(rows):
            values = values_of(runs[method], inference)
            mean, error = estimate(values)
            panel.plot(values, [row] * len(values), "o", color=colour, alpha=0.35, markersize=4)
            panel.errorbar(mean, row, xerr=error, fmt="D", color=colour, capsize=4, markersize=6)
        panel.set(xlabel=label, yticks=range(len(rows)))
        panel.set_yticklabels([f"{i}" if i != "mean" else f"{m}: mean" for m, i, _ in rows])
        panel.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    figure.suptitle("Dots: seeds. Diamonds: mean ± standard error")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_curves(runs: dict[str, list[Run]], path: Path) -> None:
    """Test error by epoch, averaged over seeds."""
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    for (method, own), colour in zip(runs.items(), COLOURS):
        curve = torch.tensor([run.curve for run in own]).mean(0)
        label = f"{method} (rate {own[0].rate:g})"
        axes.plot(range(1, len(curve) + 1), curve, color=colour, label=label)
    axes.set(xlabel="epoch", ylabel="test error (%, log scale), mean inference", yscale="log")
    axes.set_title(f"Mean of {len(own)} seeds")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="folder of MNIST's IDX files, plain or .gz")
    parser.add_argument("--seeds", type=int, default=5, help="at least 2")
    parser.add_argument("--hidden", type=int, default=200, help="units of each layer; paper: 800")
    parser.add_argument("--epochs", type=int, default=200, help="the paper's schedule, scaled")
    parser.add_argument("--p", type=float, default=0.5, help="probability of dropping")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.03])
    parser.add_argument("--samples", type=int, default=1000, help="draws of the paper's inference")
    parser.add_argument("--train-size", type=int, help="default: 500, or all of MNIST")
    parser.add_argument("--validation-size", type=int, default=297, help="to choose the rate")
    parser.add_argument("--test-size", type=int, default=1000, help="of scikit-learn's digits")
    parser.add_argument("--quick", action="store_true", help="tiny: shows that it runs")
    parser.add_argument("--output", type=Path, default=Path("out/paper_mlp"))
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(seeds=2, hidden=32, epochs=3, rates=[0.1], samples=10)
    if options.train_size is None:
        options.train_size = 500 if options.data is None else sys.maxsize
    if options.seeds < 2:
        parser.error("--seeds must be at least 2: differences are judged by their standard error")
    return options


def write(runs: dict[str, dict[float, list[Run]]], options: argparse.Namespace) -> None:
    """All files, or none."""
    every = [asdict(run) for rates in runs.values() for own in rates.values() for run in own]
    results = {"options": vars(options), "runs": every}
    with written_whole(options.output) as folder:
        draw_errors(chosen(runs), folder / "errors.png")
        draw_curves(chosen(runs), folder / "curves.png")
        (folder / "results.json").write_text(json.dumps(results, indent=1, default=str) + "\n")


def main() -> None:
    options = parse()
    try:
        learned, _, test = load_data(options, seed=0)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    pixels = learned.images.shape[1]
    print(
        f"{pixels}-{options.hidden}-{options.hidden}-10, p = {options.p:g}, {options.epochs} epochs; "
        f"{len(learned)} digits to learn from, {len(test)} to test on; {options.seeds} seeds"
    )
    runs = run_all(options)
    best = chosen(runs)
    print(f"\n{summarise_rates(runs)}\n\n{summarise(best)}\n\n{compare_all(best)}\n")
    print(
        "± is the standard error over seeds; differences are paired by seed (t test, 95 %, each by"
    )
    print("itself: of twenty true ties one looks like more than noise).")
    write(runs, options)
    print(f"Written to {options.output}: errors.png, curves.png, results.json")


if __name__ == "__main__":
    main()
