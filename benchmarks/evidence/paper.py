"""The paper's table in a size for a CPU: a network of its kind on Fashion-MNIST."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from digits import Digits, load_mnist
from paper_mlp import BASELINE, METHODS, MOMENTUM, mlp, rate_factor, score, train_epoch
from torch import Tensor, nn

from surgery import apply_dropconnect, set_inference

from .runs import Experiment, Result, Row, Unit
from .tables import Column, by, difference, mean, paired, select, table, values

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the four files."""
TOGETHER = 50
"""Images of which the draws are in memory together."""


@dataclass(frozen=True)
class Settings:
    hidden: int = 200
    train: int = 5_000
    """Images to learn from, which each seed draws from the 60,000."""
    validation: int = 2_000
    """Others of these, to choose the rate by."""
    test: int = 10_000
    epochs: int = 40
    p: float = 0.5
    draws: int = 1000
    """Z of the paper's algorithm 2."""
    drawn: int = 100
    """Test images for which these draws are made."""
    rates: tuple[tuple[str, float], ...] = (
        (BASELINE, 0.03),
        ("Dropout", 0.03),
        ("DropConnect, batch", 0.03),
        ("DropConnect, example", 0.1),
        ("DropConnect, gaussian", 0.1),
    )
    """The first learning rate of each method: what `rates` found."""


def units(settings: Settings, seed: int) -> list[Unit]:
    return [{"method": method, "rate": rate, "seed": seed} for method, rate in settings.rates]


def run(unit: Unit, settings: Settings, device: torch.device, data: Path) -> Result:
    """Train one network, and evaluate it in every way."""
    model, validation = train(unit, settings, device, data)
    test = load(data, settings, unit["seed"], device)[2]
    plain = predict(model, test.images)
    found = {"validation": validation, **named("", plain, test.labels)}
    found["votes"] = pack(plain.argmax(-1), test.labels)
    return found | (by_moments(model, test, settings) if METHODS[unit["method"]][0] else {})


def train(
    unit: Unit, settings: Settings, device: torch.device, data: Path
) -> tuple[nn.Sequential, float]:
    """A network, and its loss on the validation images."""
    learned, validation, _ = load(data, settings, unit["seed"], device)
    torch.manual_seed(unit["seed"])
    model = mlp(learned.images.shape[1], settings.hidden).to(device)
    targets, config = METHODS[unit["method"]]
    if targets:
        apply_dropconnect(model, targets, p=settings.p, **config)
    optimizer = torch.optim.SGD(model.parameters(), lr=unit["rate"], momentum=MOMENTUM)
    for epoch in range(settings.epochs):
        factor = rate_factor((epoch + 0.5) / settings.epochs)
        optimizer.param_groups[0]["lr"] = unit["rate"] * factor
        train_epoch(model, optimizer, learned)
    model.eval()
    return model, score(predict(model, validation.images), validation.labels).loss


def by_moments(model: nn.Sequential, test: Digits, settings: Settings) -> Result:
    """The paper's inference in closed form, and by draws for the first images."""
    few = test.take(torch.arange(min(settings.drawn, len(test))))
    with set_inference(model, "moments"):
        closed = predict(model, test.images)
    with set_inference(model, "moments", samples=settings.draws):
        drawn = predict(model, few.images)
    same = closed[: len(few)]
    return {
        **named("moments_", closed, test.labels),
        **named("few_", same, few.labels),
        **named("drawn_", drawn, few.labels),
        "agree": 100 * float((same.argmax(-1) == drawn.argmax(-1)).double().mean()),
    }


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(part).softmax(-1) for part in images.split(TOGETHER)])


def named(prefix: str, probabilities: Tensor, labels: Tensor) -> Result:
    found = score(probabilities, labels)
    return {f"{prefix}error": found.error, f"{prefix}nll": found.loss}


@lru_cache(maxsize=1)
def files(data: Path) -> tuple[Digits, Digits]:
    """Train and test images.

    Raises:
        FileNotFoundError: they are not there.
    """
    try:
        return load_mnist(data)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; install Debian's package dataset-fashion-mnist, or give --data a folder with "
            "the four files of it or of MNIST"
        ) from error


def load(data: Path, settings: Settings, seed: int, device: torch.device) -> list[Digits]:
    """Images to learn from, to choose the rate by, and to test on; the last are the same for all."""
    train, test = files(data)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    sizes = [settings.train, settings.validation]
    parts = [train.take(rows) for rows in order[: sum(sizes)].split(sizes)]
    parts.append(test.take(torch.arange(min(settings.test, len(test)))))
    return [Digits(part.images.to(device), part.labels.to(device)) for part in parts]


def pack(guesses: Tensor, labels: Tensor) -> str:
    """The classes that were guessed, as text that is short if most are right."""
    off = ((guesses - labels) % 10).to(torch.uint8).cpu().numpy().tobytes()
    return base64.b64encode(zlib.compress(off, 9)).decode()


def unpack(votes: str) -> Tensor:
    """How far each guess is from its label, modulo ten; 0 is right."""
    return torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(votes))), dtype=torch.uint8)


def voting_error(votes: Sequence[str]) -> float:
    """Of the majority, in percent. Of classes with as many votes the first network's counts, or the one
    that comes first after the label."""
    guesses = torch.stack([unpack(own).long() for own in votes])
    counts = nn.functional.one_hot(guesses, 10).double()
    counts[0] *= 1.5
    return 100 * float((counts.sum(0).flip(-1).argmax(-1) != 9).double().mean())


COLUMNS = (
    Column("error, mean", "error", 2),
    Column("error, moments", "moments_error", 2),
    Column("NLL, mean", "nll", 4),
    Column("NLL, moments", "moments_nll", 4),
)
PAPER = {BASELINE: "1.62", "Dropout": "1.28", "DropConnect, example": "1.20"}
"""Errors on MNIST that the paper reports for this network, in percent."""


def tables(rows: list[Row], settings: Settings) -> str:
    own = by(rows, list(METHODS), lambda row: str(row.unit["method"]))
    parts = [table(own, BASELINE, COLUMNS), voting(own)]
    dropped = {name: rows for name, rows in own.items() if name != BASELINE and rows}
    if dropped:
        parts.append(inference(dropped, settings))
    return "\n\n".join(parts)


def voting(own: Mapping[str, list[Row]]) -> str:
    """All networks of a method together, beside the paper's single ones."""
    lines = [
        "| method | networks | error of their majority, % | the paper's, on MNIST, one network |",
        "|---|---|---|---|",
    ]
    for method, rows in own.items():
        if rows:
            votes = [row.result["votes"] for row in rows]
            beside = PAPER.get(method, "–")
            lines.append(f"| {method} | {len(rows)} | {voting_error(votes):.2f} | {beside} |")
    return "\n".join(lines)


INFERENCE = (
    ("moments less mean, error", "moments_error", "error", 2),
    ("moments less mean, NLL", "moments_nll", "nll", 4),
    ("draws less moments, error", "drawn_error", "few_error", 2),
    ("draws less moments, NLL", "drawn_nll", "few_nll", 4),
)


def inference(own: Mapping[str, list[Row]], settings: Settings) -> str:
    """Ways of inference with the same networks."""
    lines = [
        "| method | " + " | ".join(title for title, *_ in INFERENCE) + " | the same class, % |"
    ]
    lines.append("|---" * (len(INFERENCE) + 2) + "|")
    for method, rows in own.items():
        cells = [
            difference(paired(values(rows, ours), values(rows, other)), digits)
            for _, ours, other, digits in INFERENCE
        ]
        agree = list(values(rows, "agree").values())
        lines.append(f"| {method} | {' | '.join(cells)} | {sum(agree) / len(agree):.1f} |")
    return "\n".join(lines)


def experiment(data: Path = DEBIAN, settings: Settings | None = None) -> Experiment:
    return Experiment("paper", settings or Settings(), units, partial(run, data=data), tables)


@dataclass(frozen=True)
class RateSettings:
    """Short trainings, by whose loss on validation images the rates of `Settings` were chosen."""

    training: Settings = field(default_factory=lambda: replace(Settings(), epochs=15, rates=()))
    candidates: tuple[float, ...] = (0.1, 0.03, 0.01)


def rate_units(settings: RateSettings, seed: int) -> list[Unit]:
    return [
        {"method": method, "rate": rate, "seed": seed}
        for method in METHODS
        for rate in settings.candidates
    ]


def run_rate(unit: Unit, settings: RateSettings, device: torch.device, data: Path) -> Result:
    found = train(unit, settings.training, device, data)[1]
    return {"validation": found if math.isfinite(found) else None}


def rate_tables(rows: list[Row], settings: RateSettings) -> str:
    lines = ["| method | " + " | ".join(f"rate {rate:g}" for rate in settings.candidates) + " |"]
    lines.append("|---" * (len(settings.candidates) + 1) + "|")
    for method in METHODS:
        cells = []
        for rate in settings.candidates:
            own = values(select(rows, method=method, rate=rate), "validation")
            cells.append("diverges" if None in own.values() else mean(own, 3) if own else "–")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rate_experiment(data: Path = DEBIAN, settings: RateSettings | None = None) -> Experiment:
    run_one = partial(run_rate, data=data)
    return Experiment("rates", settings or RateSettings(), rate_units, run_one, rate_tables)


TINY = Settings(
    hidden=8, train=128, validation=20, test=20, epochs=1, draws=5, drawn=10,
    rates=((BASELINE, 0.1), ("DropConnect, example", 0.1)),
)  # fmt: skip
"""To see that it runs."""
