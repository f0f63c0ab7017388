"""The two-layer network of the DropConnect paper (Wan et al. 2013, section 6.1) on digits.

    python examples/paper_mlp.py                  # scikit-learn's digits: about 2 minutes on 2 cores
    python examples/paper_mlp.py --data MNIST --hidden 800    # MNIST: a folder with its four IDX files

No-Drop, Dropout, and DropConnect with one mask per batch, one per example, and Gaussian noise learn
from the same start, with several seeds. Each is then evaluated by the weights as they are ("mean"), by
the paper's moment-matched inference ("moments", and as the paper does it, by draws), and by the mean
of the probabilities over real masks.

The recipe is the paper's: batches of 128, momentum 0.9, p = 0.5, no augmentation, weights from
N(0, 0.1^2), a learning rate that falls in steps after epochs in the proportion 600-400-20. The first
rate is the paper's 0.1, or one of those in --rates, chosen for each method on validation digits of one
seed. Prints tables, draws plots, and writes results.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import OrderedDict
from collections.abc import Callable
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

TUNING_SEED = 1000


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
    scores: dict[str, Score]
    """By way of inference."""
    curve: list[float]
    """Error by epoch, mean inference, in percent."""


def train(task: tuple[str, int, float], options: argparse.Namespace, validate: bool = False) -> Run:
    """Train one network, and evaluate it on the test digits or on the validation digits."""
    method, seed, rate = task
    learned, validation, test = load_data(options, seed)
    held_out = validation if validate else test
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
        curve.append(evaluate(model, held_out)["mean"].error)
    return Run(method, seed, rate, evaluate(model, held_out, options.samples), curve)


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
    for chosen in torch.randperm(len(data)).split(BATCH):
        loss = F.cross_entropy(model(data.images[chosen]), data.labels[chosen])
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


def run_all(options: argparse.Namespace) -> tuple[dict[str, list[Run]], dict[str, list[Run]]]:
    """By method: the runs that try the learning rates, and then one for each seed at the rate of the
    lowest validation loss. One process a core."""
    with ProcessPoolExecutor(
        os.cpu_count(),
        mp_context=get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as pool:
        tried = run_tasks(
            pool,
            partial(train, options=options, validate=True),
            [(method, TUNING_SEED, rate) for method in METHODS for rate in options.rates],
            "learning rates",
        )
        best = {m: min(own, key=lambda run: run.scores["mean"].loss) for m, own in tried.items()}
        seeds = range(options.seeds)
        tasks = [(method, seed, best[method].rate) for method in METHODS for seed in seeds]
        return tried, run_tasks(pool, partial(train, options=options), tasks, "training")


def run_tasks(
    pool: ProcessPoolExecutor,
    function: Callable[[tuple[str, int, float]], Run],
    tasks: list[tuple[str, int, float]],
    name: str,
) -> dict[str, list[Run]]:
    runs = list(tqdm(pool.map(function, tasks), desc=name, total=len(tasks), unit="run"))
    return {method: [run for run in runs if run.method == method] for method in METHODS}


def summarise_rates(tried: dict[str, list[Run]]) -> str:
    """Validation loss by learning rate, one seed."""
    rates = [run.rate for run in tried[BASELINE]]
    header = f"{'validation loss at rate':<24}" + "".join(f"{rate:<10g}" for rate in rates)
    rows = [
        f"{method:<24}" + "".join(f"{run.scores['mean'].loss:<10.3f}" for run in own)
        for method, own in tried.items()
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
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.03, 0.01])
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


def write(runs: dict[str, list[Run]], options: argparse.Namespace) -> None:
    """All files, or none."""
    results = {"options": vars(options), "runs": [asdict(r) for own in runs.values() for r in own]}
    with written_whole(options.output) as folder:
        draw_errors(runs, folder / "errors.png")
        draw_curves(runs, folder / "curves.png")
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
    tried, runs = run_all(options)
    print(f"\n{summarise_rates(tried)}\n\n{summarise(runs)}\n\n{compare_all(runs)}\n")
    print(
        "± is the standard error over seeds; differences are paired by seed (t test, 95 %, each by"
    )
    print("itself: of twenty true ties one looks like more than noise).")
    write(runs, options)
    print(f"Written to {options.output}: errors.png, curves.png, results.json")


if __name__ == "__main__":
    main()
