"""Language models in miniature: what AWD-LSTM's weight dropping does without the rest of AWD-LSTM."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from train_lstm import Corpus, LanguageModel, State, load_corpus, perplexity, train_epoch

from surgery import apply_dropconnect

from .runs import Experiment, Result, Row, Unit
from .tables import Column, by, select, table

LSTM, GRU, TRANSFORMER = "LSTM", "GRU", "transformer"
TARGETS: dict[str, Any] = {LSTM: nn.LSTM, GRU: nn.GRU, TRANSFORMER: "all-linear"}
"""A target that is an RNN means its hidden-to-hidden weights."""


@dataclass(frozen=True)
class Group:
    """Trainings that differ in p alone."""

    model: str
    dropout: float
    """Plain Dropout of the inputs and outputs of all layers, in all of the group."""
    drops: tuple[float, ...]


@dataclass(frozen=True)
class Settings:
    groups: tuple[Group, ...] = (
        Group(LSTM, 0.4, (0.0, 0.2, 0.5, 0.7)),
        Group(LSTM, 0.0, (0.0, 0.5)),
        Group(GRU, 0.4, (0.0, 0.2, 0.5, 0.7)),
        Group(TRANSFORMER, 0.1, (0.0, 0.1, 0.3)),
    )
    articles: int = 40
    """To learn from. Of 100 others, the first quarter chooses the epoch, the rest is tested on."""
    hidden: int = 128
    epochs: int = 14
    batch: int = 20
    window: int = 35
    rate: float = 4e-3
    transformer_rate: float = 2e-3


class GruModel(LanguageModel):
    """The LSTM's model with a GRU in its place."""

    def __init__(self, words: int, hidden: int, dropout: float) -> None:
        super().__init__(words, hidden, dropout)
        self.gru = nn.GRU(hidden, hidden, num_layers=2)
        del self.lstm

    def forward(self, words: Tensor, state: State | None) -> tuple[Tensor, State]:
        output, own = self.gru(self.dropout(self.embed(words)), None if state is None else state[0])
        return self.head(self.dropout(output)), (own, own)


class Transformer(nn.Module):
    """Two layers of GPT-2, which see one window and keep no state."""

    def __init__(self, words: int, hidden: int, dropout: float, window: int) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=words,
            n_positions=window,
            n_embd=hidden,
            n_layer=2,
            n_head=4,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
        self.gpt = GPT2LMHeadModel(config)

    def forward(self, words: Tensor, state: State | None) -> tuple[Tensor, State]:
        return self.gpt(input_ids=words.t()).logits.transpose(0, 1), (words, words)


def units(settings: Settings, seed: int) -> list[Unit]:
    return [
        {"model": group.model, "dropout": group.dropout, "p": p, "seed": seed}
        for group in settings.groups
        for p in group.drops
    ]


def run(unit: Unit, settings: Settings, device: torch.device) -> Result:
    """Train from scratch; the epoch of the lowest validation perplexity is tested."""
    text = corpus(settings)
    train, validation = text.train.to(device), text.validation.to(device)
    quarter = len(validation) // 4
    chosen_by, tested = validation[:quarter], validation[quarter:]
    torch.manual_seed(unit["seed"])
    model = build(unit, len(text.vocabulary), settings).to(device)
    if unit["p"] > 0:
        apply_dropconnect(model, TARGETS[unit["model"]], p=unit["p"])
    transformer = unit["model"] == TRANSFORMER
    rate = settings.transformer_rate if transformer else settings.rate
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    curve, best = list[float](), {}
    with tqdm(disable=True) as bar:
        for _ in range(settings.epochs):
            train_epoch(model, optimizer, train, settings.window, bar)
            curve.append(perplexity(model, chosen_by, settings.window))
            if curve[-1] == min(curve):
                best = copy.deepcopy(model.state_dict())
    last = perplexity(model, tested, settings.window)
    model.load_state_dict(best)
    return {
        "test": perplexity(model, tested, settings.window),
        "last": last,
        "train": perplexity(model, train[:quarter], settings.window),
        "epoch": 1 + curve.index(min(curve)),
    }


def build(unit: Unit, words: int, settings: Settings) -> LanguageModel:
    """What `perplexity` and `train_epoch` of the example take."""
    sizes = words, settings.hidden, unit["dropout"]
    if unit["model"] == TRANSFORMER:
        return Transformer(*sizes, settings.window)  # type: ignore[return-value]
    return (LanguageModel if unit["model"] == LSTM else GruModel)(*sizes)


@lru_cache(maxsize=1)
def corpus(settings: Settings) -> Corpus:
    return load_corpus(settings.articles, settings.batch)


COLUMNS = (
    Column("test perplexity", "test"),
    Column("after the last epoch", "last"),
    Column("training text", "train"),
    Column("best epoch", "epoch"),
)


def tables(rows: list[Row], settings: Settings) -> str:
    parts = []
    for group in settings.groups:
        names = [f"{p:g}" for p in group.drops]
        chosen = select(rows, model=group.model, dropout=group.dropout)
        own = by(chosen, names, lambda row: f"{row.unit['p']:g}")
        if own["0"]:
            title = f"#### {group.model}, plain Dropout {group.dropout:g}"
            parts.append(f"{title}\n\n{table(own, '0', COLUMNS, 'p')}")
    return "\n\n".join(parts)


def experiment(settings: Settings | None = None) -> Experiment:
    return Experiment("language", settings or Settings(), units, run, tables)


TINY = Settings(
    groups=(Group(GRU, 0.1, (0.0, 0.5)), Group(TRANSFORMER, 0.1, (0.0, 0.1))),
    articles=4,
    hidden=4,
    epochs=1,
    batch=200,
)
"""To see that it runs."""
