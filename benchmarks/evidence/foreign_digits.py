"""Uncertainty on digits: scikit-learn's, against the same turned by 90 degrees and against letters."""

from __future__ import annotations

import string
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits import Digits, load_digits, random_split
from paper_mlp import METHODS, MOMENTUM, mlp, rate_factor, train_epoch
from torch import Tensor, nn

from surgery import apply_dropconnect

from .foreign import BATCH, DROPOUT, EXAMPLE, INSIDE, PLAIN, Task, run, tables, units
from .runs import Experiment, Row

ROTATED, LETTERS = "turned digits", "letters"
CONFIGS = {
    PLAIN: METHODS["No-Drop"],
    DROPOUT: METHODS["Dropout"],
    BATCH: METHODS["DropConnect, batch"],
    EXAMPLE: METHODS["DropConnect, example"],
}
FACES = ("Sans", "Sans-Bold", "SansMono", "SansMono-Bold", "Serif", "Serif-Bold")
SHOWN = [letter for letter in string.ascii_uppercase if letter not in "IO"]
"""Those that are no digits too."""


@dataclass(frozen=True)
class Settings:
    hidden: int = 200
    epochs: int = 150
    rate: float = 0.03
    p: float = 0.5
    train: int = 500
    test: int = 600
    """Digits inside, and as many others that are turned."""
    samples: int = 32
    members: int = 5


def prepare(settings: Settings, seed: int, device: torch.device) -> Task:
    learned, inside, other = (
        Digits(part.images.to(device), part.labels.to(device))
        for part in random_split(
            load_digits(), settings.train, settings.test, settings.test, seed=seed
        )
    )
    turned = other.images.view(-1, 8, 8).rot90(1, (1, 2)).flatten(1)
    kinds = {INSIDE: inside.images, ROTATED: turned, LETTERS: letters().to(device)}

    def train(training: str, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = mlp(64, settings.hidden).to(device)
        targets, config = CONFIGS[training]
        if targets:
            apply_dropconnect(model, targets, p=settings.p, **config)
        optimizer = torch.optim.SGD(model.parameters(), lr=settings.rate, momentum=MOMENTUM)
        for epoch in range(settings.epochs):
            factor = rate_factor((epoch + 0.5) / settings.epochs)
            optimizer.param_groups[0]["lr"] = settings.rate * factor
            train_epoch(model, optimizer, learned)
        return model.eval()

    return Task(
        kinds,
        inside.labels.cpu(),
        train,
        logits,
        lambda own: own,
        settings.samples,
        settings.members,
    )


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    found: Tensor = model(images)
    return found


@lru_cache(maxsize=1)
def letters() -> Tensor:
    """Capital letters in six faces of DejaVu, which matplotlib brings along: (letters, 64), as large
    as the digits are."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    found = []
    for face in FACES:
        font = ImageFont.truetype(str(fonts / f"DejaVu{face}.ttf"), 36)
        for letter in SHOWN:
            image = Image.new("L", (32, 32))
            ImageDraw.Draw(image).text((16, 16), letter, 255, font, anchor="mm")
            small = np.asarray(image, np.float32).reshape(8, 4, 8, 4).mean((1, 3)) / 255
            found.append(torch.from_numpy(small).flatten())
    return torch.stack(found)


def experiment(settings: Settings | None = None) -> Experiment:
    run_one: Any = partial(run, prepare=prepare)
    return Experiment("digits", settings or Settings(), units, run_one, show)


def show(rows: list[Row], settings: Settings) -> str:
    return tables(rows, settings, (ROTATED, LETTERS))


TINY = Settings(hidden=8, epochs=1, train=20, test=10, samples=2, members=2)
"""To see that it runs."""
