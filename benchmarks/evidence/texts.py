"""Fine-tuning MiniLM on texts: what the experiments with texts share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from bbc import Texts, load_bbc
from minilm import load_classifier, minilm, quiet
from torch import Tensor, nn

TOGETHER = 50
"""Texts that are read together when nothing is learned."""


@dataclass(frozen=True)
class Encoded:
    """Texts as numbers."""

    ids: Tensor
    """(texts, tokens), int64."""
    mask: Tensor
    """1 where a token is, 0 where padding is."""
    labels: Tensor
    """(texts,), int64."""

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Encoded:
        return Encoded(self.ids.to(device), self.mask.to(device), self.labels.to(device))

    def inputs(self, rows: Any = slice(None)) -> dict[str, Tensor]:
        return {"input_ids": self.ids[rows], "attention_mask": self.mask[rows]}


@lru_cache(maxsize=1)
def articles() -> Texts:
    return load_bbc()


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    quiet()
    return AutoTokenizer.from_pretrained(minilm())


def encode(texts: Sequence[str], labels: Sequence[int], tokens: int, part: int = 0) -> Encoded:
    """The texts with that many tokens at most. Part 0 has the first tokens of each, part 1 the next."""
    made, size = tokenizer(), tokens - 2
    known = made(list(texts), add_special_tokens=False, truncation=True, max_length=2 * size)
    ids = torch.full((len(texts), tokens), made.pad_token_id)
    for row, own in zip(ids, known["input_ids"]):
        own = [made.cls_token_id, *own[part * size : (part + 1) * size], made.sep_token_id]
        row[: len(own)] = torch.tensor(own)
    mask = (ids != made.pad_token_id).long()
    return Encoded(ids, mask, torch.tensor(labels))


def classifier(classes: Sequence[str], seed: int, own_dropout: bool = False) -> Any:
    """MiniLM with a new head, which is the same for the same seed. Its embeddings are not trained; its
    own dropout (0.1) is there if that is asked for."""
    quiet()
    model = load_classifier(minilm(), classes, seed)
    model.bert.embeddings.requires_grad_(False)
    if not own_dropout:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return model


def fine_tune(model: Any, data: Encoded, steps: int, batch: int, rate: float, seed: int) -> Any:
    """AdamW and a linear schedule. The order of the texts is that of the seed, whatever else draws."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    batches = batches_of(len(data), batch, seed)
    model.train()
    for _ in range(steps):
        rows = next(batches)
        loss = model(**data.inputs(rows), labels=data.labels[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def batches_of(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Random batches without end; every example comes once an epoch."""
    order = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=order).split(size)


@torch.no_grad()
def probabilities(model: Any, data: Encoded) -> Tensor:
    """Of one forward, (texts, classes)."""
    rows = torch.arange(len(data)).split(TOGETHER)
    return torch.cat([model(**data.inputs(own)).logits for own in rows]).double().softmax(-1)


@torch.no_grad()
def sentences(encoder: Any, data: Encoded) -> Tensor:
    """Mean-pooled embeddings of length one, (texts, features): what this checkpoint is made for."""
    found = []
    for rows in torch.arange(len(data)).split(TOGETHER):
        states = encoder(**data.inputs(rows)).last_hidden_state
        mask = data.mask[rows].unsqueeze(-1)
        found.append((states * mask).sum(1) / mask.sum(1))
    return nn.functional.normalize(torch.cat(found).double(), dim=-1)
