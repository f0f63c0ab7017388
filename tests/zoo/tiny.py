"""Tiny models of transformers, made from configs: with the same weights every time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

HIDDEN = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
T5 = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
GPT2 = {
    "vocab_size": 99,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
BERT = {**HIDDEN, "max_position_embeddings": 32}
MIXTRAL = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}

TINY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", BERT),
    "minilm": ("BertModel", "BertConfig", BERT),  # the shape of all-MiniLM-L6-v2
    "albert": ("AlbertModel", "AlbertConfig", {**HIDDEN, "embedding_size": 16}),  # one layer, twice
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", HIDDEN),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5_gated": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu"},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**HIDDEN, **MIXTRAL}),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {**HIDDEN, "image_size": 16, "patch_size": 8},
    ),
}
"""Class of the model, class of its config, and the config."""


def tiny(name: str, **changes: Any) -> Any:
    """A fresh model; `changes` are of its config."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, config, sizes = TINY[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, model)(getattr(transformers, config)(**{**sizes, **changes}))
