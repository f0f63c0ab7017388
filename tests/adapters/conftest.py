"""What the tests of adapters share: batches for tiny transformers models, and tiny Trainer runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def batch(model: nn.Module, rows: int = 4, length: int = 6, seed: int = 0) -> dict[str, Any]:
    """Token ids with the labels that the model's head wants."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 99, (rows, length), generator=generator)
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
