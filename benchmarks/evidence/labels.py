"""Fine-tuning on few labels: MiniLM sorts BBC news into five classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from bbc import Texts, stratified_split
from torch import Tensor

from surgery import apply_dropconnect

from .runs import Experiment, Result, Row, Unit
from .scores import all_scores
from .tables import Column, by, select, table
from .texts import Encoded, articles, classifier, encode, fine_tune, probabilities, sentences

NONE, OWN, LORA = "no dropping", "own dropout, 0.1", "LoRA"
LORA_DROPPED = "LoRA, dropped, p = 0.1"
LORAS = (LORA, LORA_DROPPED)
BEFORE = "before training"
"""The checkpoint as it comes, which is the same for all seeds and numbers of labels."""
ZERO, PRETRAINED, SEQUENCES = "toward zero", "toward pretrained", "a mask per text"

METHODS: dict[str, dict[str, Any]] = {
    NONE: {},
    OWN: {"own_dropout": True},
    **{f"{ZERO}, p = {p:g}": {"dropconnect": {"p": p}} for p in (0.1, 0.3, 0.5, 0.9)},
    **{
        f"{PRETRAINED}, p = {p:g}": {"dropconnect": {"p": p, "toward": "pretrained"}}
        for p in (0.1, 0.3, 0.5, 0.9)
    },
    f"{SEQUENCES}, p = 0.1": {"dropconnect": {"p": 0.1, "sampling": "example"}},
    LORA: {"lora": True},
    LORA_DROPPED: {"lora": True, "dropconnect": {"p": 0.1}},
}


@dataclass(frozen=True)
class Settings:
    labels: tuple[int, ...] = (50, 100, 256, 1000)
    """How many labelled texts there are to learn from."""
    tokens: int = 32
    steps: int = 64
    batch: int = 8
    rate: float = 3e-4
    lora_rate: float = 2e-3
    lora_rank: int = 8
    pool: int = 1100
    """Texts of which each seed draws its labelled ones."""
    test: int = 500
    pairs: int = 200
    """Other texts, by which is measured what was forgotten."""
    methods: tuple[str, ...] = field(default=tuple(METHODS))


def units(settings: Settings, seed: int) -> list[Unit]:
    before = [{"labels": 0, "method": BEFORE, "seed": seed}] if seed == 0 else []
    return before + [
        {"labels": labels, "method": method, "seed": seed}
        for labels in settings.labels
        for method in settings.methods
    ]


def run(unit: Unit, settings: Settings, device: torch.device) -> Result:
    """Train once, and look how it classifies and what it still knows."""
    if unit["method"] == BEFORE:
        return {"recall": recall(*before(settings)), "kept": 1.0}
    pool, test, halves = load(settings)
    train = stratified_split(pool, unit["labels"], seed=unit["seed"])[0]
    learned = encode(train.texts, train.labels, settings.tokens).to(device)
    method = METHODS[unit["method"]]
    model, encoder = build(pool.classes, unit["seed"], method, settings)
    model.to(device)
    rate = settings.lora_rate if "lora" in method else settings.rate
    fine_tune(model, learned, settings.steps, settings.batch, rate, unit["seed"])
    found = all_scores(probabilities(model, test.to(device)), test.labels.to(device))
    first, second = (sentences(encoder, half.to(device)).cpu() for half in halves)
    return {**found, "recall": recall(first, second), "kept": kept(first, before(settings)[0])}


def build(classes: list[str], seed: int, method: dict[str, Any], settings: Settings) -> Any:
    """The model to train, and its encoder."""
    model = classifier(classes, seed, method.get("own_dropout", False))
    encoder, targets = model.bert, "all-linear"
    if "lora" in method:
        from peft import LoraConfig, TaskType, get_peft_model

        config = LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=settings.lora_rank,
            lora_alpha=2 * settings.lora_rank,
            target_modules=["query", "key", "value", "dense"],
        )
        model, targets = get_peft_model(model, config), "*.lora_*"
    if "dropconnect" in method:
        apply_dropconnect(model, targets, **method["dropconnect"])
    return model, encoder


@lru_cache(maxsize=1)
def load(settings: Settings) -> tuple[Texts, Encoded, tuple[Encoded, Encoded]]:
    """Texts to draw labelled ones from, test texts, and other texts in two parts; the same for all."""
    pool, test, other, _ = stratified_split(
        articles(), settings.pool, settings.test, settings.pairs
    )
    first, second = (encode(other.texts, other.labels, settings.tokens, part) for part in (0, 1))
    return pool, encode(test.texts, test.labels, settings.tokens), (first, second)


@lru_cache(maxsize=1)
def before(settings: Settings) -> tuple[Tensor, Tensor]:
    """Sentence embeddings of both parts by the checkpoint as it comes."""
    *_, halves = load(settings)
    encoder = classifier(articles().classes, 0).bert.eval()
    return sentences(encoder, halves[0]), sentences(encoder, halves[1])


def recall(first: Tensor, second: Tensor) -> float:
    """Of how many texts, in percent, the next words are nearer to the first words than those of all
    other texts."""
    nearest = (first @ second.T).argmax(-1)
    return 100 * float((nearest == torch.arange(len(first))).double().mean())


def kept(own: Tensor, other: Tensor) -> float:
    """Correlation of the similarities of all pairs of texts: 1 if nothing has moved."""
    rows, columns = torch.triu_indices(len(own), len(own), 1)
    pairs = torch.stack([(e @ e.T)[rows, columns] for e in (own, other)])
    return float(torch.corrcoef(pairs)[0, 1])


COLUMNS = (
    Column("accuracy, %", "accuracy"),
    Column("NLL, nats", "nll", 3),
    Column("ECE, %", "ece"),
    Column("retrieval, %", "recall"),
    Column("kept", "kept", 3),
)


def tables(rows: list[Row], settings: Settings) -> str:
    parts = []
    for labels in settings.labels:
        own = by(select(rows, labels=labels), settings.methods, lambda row: str(row.unit["method"]))
        if own[NONE]:
            lora = {name: own.pop(name) for name in LORAS if own.get(name)}
            before = select(rows, method=BEFORE)
            parts.append(f"#### {labels} labelled texts")
            parts.append(table({**own, **lora_alone(lora), BEFORE: before}, NONE, COLUMNS))
            if len(lora) == len(LORAS):
                parts.append(table(lora, LORA, COLUMNS))
    return "\n\n".join(parts)


def lora_alone(lora: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Plain LoRA stands beside the other methods; what is dropped in it beside plain LoRA."""
    return {LORA: lora[LORA]} if LORA in lora else {}


def experiment(settings: Settings | None = None) -> Experiment:
    return Experiment("labels", settings or Settings(), units, run, tables)


TINY = Settings(
    labels=(8,), tokens=8, steps=1, batch=2, pool=20, test=10, pairs=10, methods=(NONE, LORA)
)
"""To see that it runs."""
