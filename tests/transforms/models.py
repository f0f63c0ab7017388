"""Tiny transformers models, made from configs, and small networks with one trait each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
T5_SIZES = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 2,
}


def bert(t: Any) -> Any:
    """The shape of all-MiniLM-L6-v2, smaller."""
    return t.BertModel(t.BertConfig(**SIZES, intermediate_size=64, max_position_embeddings=32))


def albert(t: Any) -> Any:
    """All layers are the same one."""
    config = t.AlbertConfig(**SIZES, embedding_size=16, intermediate_size=64)
    return t.AlbertModel(config)


def gpt2(t: Any) -> Any:
    config = t.GPT2Config(
        vocab_size=99,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    return t.GPT2LMHeadModel(config)


def llama(t: Any) -> Any:
    return t.LlamaForCausalLM(t.LlamaConfig(**SIZES, intermediate_size=64))


def t5(t: Any) -> Any:
    return t.T5ForConditionalGeneration(t.T5Config(**T5_SIZES, decoder_start_token_id=0))


def t5_gated(t: Any) -> Any:
    config = t.T5Config(**T5_SIZES, decoder_start_token_id=0, feed_forward_proj="gated-gelu")
    return t.T5ForConditionalGeneration(config)


def mixtral(t: Any) -> Any:
    config = t.MixtralConfig(
        **SIZES, num_key_value_heads=2, intermediate_size=64, num_local_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    return t.MixtralForCausalLM(config)


def vit(t: Any) -> Any:
    sizes = {name: value for name, value in SIZES.items() if name != "vocab_size"}
    config = t.ViTConfig(**sizes, intermediate_size=64, image_size=16, patch_size=8)
    return t.ViTForImageClassification(config)


TRANSFORMERS: dict[str, Callable[[Any], Any]] = {
    "bert": bert,
    "albert": albert,
    "gpt2": gpt2,
    "llama": llama,
    "t5": t5,
    "t5_gated": t5_gated,
    "mixtral": mixtral,
    "vit": vit,
}


class Branches(nn.Module):
    """Which branch runs depends on the data: neither traced nor exported."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.up(x)) if x.sum() > 0 else torch.tanh(self.down(x))


class WantsLabels(nn.Module):
    """A forward that cannot do without labels."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        if labels.sum() > 0:
            return F.cross_entropy(self.fc(x), labels)
        return self.fc(x)


class Restless(nn.Module):
    """Changes everything that a forward can change."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(4))
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.mean(0)
        self.kept = self.fc(x)
        self.made = torch.rand(4)
        y = self.drop(self.norm(self.kept)) + torch.rand(4)
        return F.dropout(y, training=self.training)


class Functional(nn.Module):
    """Bare parameters, read as they are, through views, and more than once."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
        self.b, self.packed = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(8, 4))
        self.stack, self.table = nn.Parameter(torch.randn(3, 4, 4)), nn.Parameter(torch.randn(7, 4))
        self.idle = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(F.linear(x, self.w))
        x = torch.relu((x @ self.v).view(-1, 4) + self.b)
        x = F.linear(x, self.w).tanh()
        first, second = self.packed.chunk(2)
        x = F.linear(x, first) * torch.sigmoid(F.linear(x, second))
        x = F.linear(x, self.stack[1]).relu()
        x = F.linear(x, torch.cat([first, second]).to(x.dtype))
        return F.glu(x) + self.table[torch.tensor([1, 2])]
