"""Uncertainty on texts: MiniLM learns four classes of BBC news, and reads a fifth and shuffled ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from bbc import Texts, stratified_split
from torch import Tensor
from torch.utils.data import DataLoader
from uncertainty import drop_class, shuffled_letters, shuffled_words

from surgery import apply_dropconnect

from .foreign import (
    BATCH,
    DROPOUT,
    EXAMPLE,
    INSIDE,
    Task,
    run,
    shuffled,
    tables,
    units,
)
from .runs import Experiment, Row
from .texts import TOGETHER, Encoded, articles, classifier, encode, fine_tune

HELD_OUT, WORDS, LETTERS = "a fifth class", "shuffled words", "shuffled letters"
SAMPLINGS = {BATCH: "batch", EXAMPLE: "example"}


@dataclass(frozen=True)
class Settings:
    held_out: str = "tech"
    labels: int = 128
    tokens: int = 32
    steps: int = 64
    batch: int = 8
    rate: float = 3e-4
    p: float = 0.1
    """For DropConnect of all linear layers but the head; Dropout is the model's own, 0.1."""
    pool: int = 800
    test: int = 80
    """Texts of each kind; all are of different articles."""
    samples: int = 16
    members: int = 5


@lru_cache(maxsize=1)
def load(settings: Settings) -> tuple[Texts, dict[str, Encoded]]:
    """Texts to draw labelled ones from, and to look at; the same for all seeds."""
    every = articles()
    foreign = every.classes.index(settings.held_out)
    size = settings.test
    pool, inside, words, letters, _ = stratified_split(
        drop_class(every, foreign), settings.pool, size, size, size
    )
    held_out = [text for text, label in zip(every.texts, every.labels) if label == foreign][:size]
    kinds = {
        INSIDE: inside.texts,
        HELD_OUT: held_out,
        WORDS: shuffled(words.texts, shuffled_words),
        LETTERS: shuffled(letters.texts, shuffled_letters),
    }
    return pool, {
        kind: encode(own, inside.labels if kind == INSIDE else [0] * len(own), settings.tokens)
        for kind, own in kinds.items()
    }


def prepare(settings: Settings, seed: int, device: torch.device) -> Task:
    pool, kinds = load(settings)
    labelled = stratified_split(pool, settings.labels, seed=seed)[0]
    learned = encode(labelled.texts, labelled.labels, settings.tokens).to(device)

    def train(training: str, seed: int) -> Any:
        model = classifier(pool.classes, seed, own_dropout=training == DROPOUT).to(device)
        if training in SAMPLINGS:
            apply_dropconnect(model, "all-linear", p=settings.p, sampling=SAMPLINGS[training])
        return fine_tune(model, learned, settings.steps, settings.batch, settings.rate, seed)

    return Task(
        {kind: own.to(device) for kind, own in kinds.items()},
        kinds[INSIDE].labels,
        train,
        logits,
        batches,
        settings.samples,
        settings.members,
    )


@torch.no_grad()
def logits(model: Any, data: Encoded) -> Tensor:
    rows = torch.arange(len(data)).split(TOGETHER)
    return torch.cat([model(**data.inputs(own)).logits for own in rows])


def batches(data: Encoded) -> Any:
    """As a loader gives them."""
    rows = [{"input_ids": i, "attention_mask": m} for i, m in zip(data.ids, data.mask)]
    return DataLoader(rows, TOGETHER)  # type: ignore[arg-type]


def experiment(settings: Settings | None = None) -> Experiment:
    run_one: Any = partial(run, prepare=prepare)
    return Experiment("uncertainty", settings or Settings(), units, run_one, show)


def show(rows: list[Row], settings: Settings) -> str:
    return tables(rows, settings, (HELD_OUT, WORDS, LETTERS))


TINY = Settings(labels=8, tokens=8, steps=1, batch=2, pool=20, test=10, samples=2, members=2)
"""To see that it runs."""
