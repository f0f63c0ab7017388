"""Tiny transformers models, made from configs, and tiny Trainer runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCABULARY = 99
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}


def _bert() -> Any:
    config = transformers.BertConfig(
        **SIZES, num_attention_heads=2, intermediate_size=64, max_position_embeddings=32
    )
    return transformers.BertForSequenceClassification(config)


def _gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=32,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _t5() -> Any:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def _llama() -> Any:
    config = transformers.LlamaConfig(**SIZES, num_attention_heads=2, intermediate_size=64)
    return transformers.LlamaForCausalLM(config)


def _mixtral() -> Any:
    config = transformers.MixtralConfig(
        **SIZES, num_attention_heads=2, num_key_value_heads=2, intermediate_size=64,
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def _mamba() -> Any:
    return transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES, state_size=4))


MODELS: dict[str, Callable[[], Any]] = {
    "bert": _bert,
    "gpt2": _gpt2,
    "t5": _t5,
    "llama": _llama,
    "mixtral": _mixtral,
    "mamba": _mamba,
}


@pytest.fixture
def make() -> Callable[[str], Any]:
    """A fresh tiny model by name, the same weights every time."""

    def build(name: str) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return MODELS[name]()

    return build


def batch(model: nn.Module, rows: int = 4, length: int = 6, seed: int = 0) -> dict[str, Any]:
    """Token ids with the labels that the model's head wants."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    classifies = type(inner).__name__.endswith("SequenceClassification")
    return {"input_ids": ids, "labels": ids[:, 0] % 2 if classifies else ids}


@pytest.fixture
def logits() -> Callable[..., torch.Tensor]:
    """Evaluation-mode logits on a fixed batch."""

    def compute(model: nn.Module) -> torch.Tensor:
        was_training = model.training
        model.eval()
        with torch.no_grad():
            out = model(**batch(model)).logits
        model.train(was_training)
        return out

    return compute


@pytest.fixture
def inputs() -> Callable[..., dict[str, Any]]:
    return batch


@pytest.fixture
def trainer(tmp_path: Any) -> Callable[..., Any]:
    """A Trainer for a tiny model that writes below `tmp_path`."""

    def build(model: nn.Module, callbacks: list[Any] | None = None, **changes: Any) -> Any:
        rows = batch(model, rows=32, seed=1)
        data = [{name: value[i] for name, value in rows.items()} for i in range(32)]
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 3,
            **changes,
        }
        return transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(**settings),
            train_dataset=data,
            eval_dataset=data[:8],
            callbacks=callbacks,
        )

    return build
