"""Tables and a figure of `predict_moments`: how near one forward comes to Monte Carlo, and what it
costs.

    python -m benchmarks.moments mlp cnn minilm vit      # tables
    python -m benchmarks.moments minilm --figure docs/moments.svg

For each model: the error of the mean beside that of the plain weights (root mean square over
outputs, with the part taken out that Monte Carlo's own error is expected to have), the variance
beside that of Monte Carlo, and the time in forwards of the plain model. In the last column stands
how many samples Monte Carlo needs for the same error of the mean.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery import mc_predict, predict_moments, set_inference, set_p, strip_dropconnect

from .moments_models import CASES, Case, cnn


def rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def forward_time(call: Callable[[], Any], rounds: int = 7) -> float:
    """The least of several, in seconds."""
    call()
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return min(times)


def called(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


@torch.no_grad()
def plain_of(case: Case) -> Tensor:
    found = called(case.model, case.inputs)
    chosen: Tensor = found if case.output is None else case.output(found)
    return chosen


@dataclass(frozen=True)
class Point:
    """A way to predict."""

    name: str
    error: float
    """Of the mean, without what Monte Carlo's own error adds."""
    forwards: float
    """What it costs, in forwards of the plain model."""


def table(case: Case, samples: int) -> tuple[str, list[Point], float]:
    """The rows of one model; its points; and the standard deviation of its outputs."""
    options: dict[str, Any] = {"class_dim": None, "output": case.output}
    found = mc_predict(
        case.model, case.inputs, samples, seed=1, batch_size=case.sampling_rows, **options
    )
    own = rms((found.variance / samples).sqrt())
    plain = plain_of(case)
    with torch.no_grad():
        unit = forward_time(lambda: called(case.model, case.inputs))

    def error(mean: Tensor) -> float:
        """Without what Monte Carlo's error adds to the square."""
        assert bool(mean.isfinite().all())
        return math.sqrt(max(rms(mean - found.mean) ** 2 - own**2, 0))

    spread = rms(found.variance.sqrt())
    base = error(plain)
    lines = [
        f"### {case.name}",
        "",
        f"{samples:,} samples; standard error of their mean {own:.4f}; standard deviation of the "
        f"outputs {spread:.3f}",
        "",
        "| | error of the mean | plain / this | variance / Monte Carlo | forwards | samples for it |",
        "|---|---|---|---|---|---|",
        f"| plain weights | {base:.4f} | 1 | – | 1 | {needed(spread, base)} |",
    ]
    points = [Point("plain weights", base, 1)]

    def add(label: str, name: str, mean: Tensor, variance: Tensor | None, seconds: float) -> None:
        now, cost = error(mean), seconds / unit
        points.append(Point(name, max(now, own / 2), cost))
        times = f"{base / now:.1f}" if now > own / 2 else f"> {base / own:.0f}"
        shown = f"{now:.4f}" if now > own / 2 else f"< {own:.4f}"
        ratio = "–" if variance is None else f"{float(variance.sum() / found.variance.sum()):.3f}"
        lines.append(
            f"| {label} | {shown} | {times} | {ratio} | {cost:.1f} | "
            f"{needed(spread, max(now, own / 2))} |"
        )

    for draws in case.draws:
        with set_inference(case.model, "moments", samples=draws), torch.no_grad():
            seconds = forward_time(lambda: called(case.model, case.inputs), 3)
            drawn = plain_of(case)
        add(f"the paper, {draws} draws", f"the paper, Z = {draws}", drawn, None, seconds)
    for form in case.forms:

        def predict(form: Any = form) -> Any:
            return predict_moments(case.model, case.inputs, form, **options)

        got = predict()
        seconds = forward_time(predict, 3)
        name = f"{form} draws" if isinstance(form, int) else form
        add(name, f"one pass, {name}", got.mean, got.variance, seconds)
    return "\n".join(lines), points, spread


STYLES = {
    "plain weights": ("#8a97a5", "D", "plain weights"),
    "the paper": ("#1c2733", "s", "the paper: Z draws of each pre-activation"),
    "one pass": ("#2f6fb2", "o", "one pass: predict_moments"),
}
"""Colour, mark and legend by the beginning of a point's name."""


def draw(name: str, points: list[Point], spread: float, path: Path) -> None:
    """Error of the mean against cost: plain weights, draws as in the paper, one pass, Monte Carlo."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style = {"svg.fonttype": "none", "svg.hashsalt": "moments", "font.size": 10}
    with plt.rc_context({**style, "text.color": "#1c2733"}):
        figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained", facecolor="white")
        most = max(2000.0, *(4 * point.forwards for point in points))
        ends = (1.0, most)
        errors = [spread / math.sqrt(one) for one in ends]
        axes.plot(
            ends, errors, color="#d55e00", linewidth=2, label="Monte Carlo: that many forwards"
        )
        for begins, (colour, mark, label) in STYLES.items():
            chosen = [point for point in points if point.name.startswith(begins)]
            places = [(point.forwards, point.error) for point in chosen]
            axes.plot(*zip(*places), mark, color=colour, markersize=7, label=label)
            for point, place in zip(chosen, places):
                short = point.name.partition(", ")[2]
                axes.annotate(short, place, (7, 5), textcoords="offset points", fontsize=9)
        axes.set(xscale="log", yscale="log", xlabel="cost, in forwards of the plain model")
        axes.set(ylabel="error of the mean", title=name)
        axes.legend(frameon=False, loc="lower left")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def needed(spread: float, error: float) -> str:
    return f"{max(1, round((spread / error) ** 2)):,}" if error > 0 else "–"


def first_layers(steps: int, samples: int) -> str:
    """How far the first layer of a CNN is from what masks do: beside masks, and beside Gaussian numbers
    of the same variance in their place."""
    lines = [
        "### The first layer of the CNNs alone, p = 0.1",
        "",
        "| first kernel | variance / Monte Carlo | the same where masks are Gaussian numbers |",
        "|---|---|---|",
    ]
    for kernel in (5, 3):
        model, x = cnn(kernel, steps)
        set_p(model, 0.0)
        set_p(model, 0.1, ["0.weight"])
        own = predict_moments(model, x, "full", class_dim=None).variance.sum()
        masks = mc_predict(model, x, samples, seed=1, batch_size=1, class_dim=None).variance.sum()
        strip_dropconnect(model)
        noise = with_noise(model, x, model[0].weight, 0.1 / 0.9, samples).sum()  # type: ignore[index]
        lines.append(f"| {kernel} x {kernel} | {own / masks:.3f} | {own / noise:.3f} |")
    return "\n".join(lines)


@torch.no_grad()
def with_noise(model: nn.Module, x: Tensor, weight: Tensor, ratio: float, samples: int) -> Tensor:
    """The variance of the outputs where each entry of a weight is multiplied by a Gaussian number of
    mean 1 and variance `ratio`."""
    kept, generator = weight.clone(), torch.Generator().manual_seed(1)
    found = []
    for _ in range(samples):
        noise = torch.randn(kept.shape, generator=generator)
        weight.copy_(kept * (1 + math.sqrt(ratio) * noise))
        found.append(model(x))
    weight.copy_(kept)
    return torch.stack(found).var(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=1000, help="of training")
    parser.add_argument("--figure", type=Path, help="where the last of the cases is drawn")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in options.cases:
        if name == "cnn":
            print(f"{first_layers(options.steps, 4 * options.samples)}\n", flush=True)
        for case in CASES[name](options.steps):
            text, points, spread = table(case, options.samples)
            print(f"{text}\n", flush=True)
            if options.figure is not None:
                draw(case.name, points, spread, options.figure)


if __name__ == "__main__":
    main()
