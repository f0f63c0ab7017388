"""What TensorBoard and wandb see of a Trainer's run, and TRL's Trainers with `with_dropconnect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from surgery import dropconnect_sites, plain_state_dict
from surgery.adapters.transformers import with_dropconnect

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
WORDS = ["a", "b", "c", "d", "[UNK]", "[PAD]", "[EOS]"]


def model() -> Any:
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_positions=32, n_embd=8, n_layer=1, n_head=2,
        bos_token_id=6, eos_token_id=6, pad_token_id=5,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


def tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "[EOS]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names)


def settings(path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(path / "run"), "max_steps": 4, "logging_steps": 1, "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", "report_to": [], "seed": 3,
        "per_device_train_batch_size": 2, **changes,
    }  # fmt: skip


def run(path: Path, report_to: str, **changes: Any) -> Any:
    """A run whose p falls to 0, reported."""
    Arguments = with_dropconnect(transformers.TrainingArguments)
    args = Arguments(
        **settings(path, report_to=[report_to]),
        dropconnect_p=0.3, dropconnect_schedule="linear", **changes,
    )  # fmt: skip
    rows = [{"input_ids": [0, 1, 2, 3], "labels": [0, 1, 2, 3]} for _ in range(8)]
    trainer = transformers.Trainer(model=model(), args=args, train_dataset=rows)
    trainer.train()
    return trainer


def logged(trainer: Any, name: str) -> list[float]:
    return [log[name] for log in trainer.state.log_history if "loss" in log]


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = run(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    for name in ("dropconnect_p", "dropconnect_fraction"):
        seen = [scalar.value for scalar in events.Scalars(f"train/{name}")]
        assert seen == pytest.approx(logged(trainer, name))
    assert logged(trainer, "dropconnect_p") == pytest.approx([0.3, 0.2, 0.1, 0.0], abs=1e-12)


def test_the_fraction(tmp_path: Path) -> None:
    """Of all parameters: p times the size of what drops, which for GPT-2 is four matrices a layer."""
    trainer = run(tmp_path, "none")
    size = 8 * 24 + 8 * 8 + 8 * 32 + 32 * 8
    total = sum(one.numel() for one in trainer.model.parameters())
    assert logged(trainer, "dropconnect_fraction")[0] == pytest.approx(0.3 * size / total)


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    seen: list[dict[str, Any]] = []
    with wandb.init(project="test", dir=tmp_path, mode="offline") as its:
        log = its.log
        monkeypatch.setattr(
            its, "log", lambda data, *a, **k: (seen.append(data), log(data, *a, **k))
        )
        monkeypatch.setattr(wandb, "log", its.log)
        trainer = run(tmp_path, "wandb")
    for name in ("dropconnect_p", "dropconnect_fraction"):
        assert [one[f"train/{name}"] for one in seen if "train/loss" in one] == logged(
            trainer, name
        )


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trl(tmp_path: Path, kind: str) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    Arguments = with_dropconnect(getattr(trl, f"{kind}Config"))
    args = Arguments(
        **settings(tmp_path, save_strategy="steps", save_steps=4), max_length=16,
        dropconnect_p=0.3, dropconnect_targets=["*.mlp.*"],
    )  # fmt: skip
    if kind == "SFT":
        rows, more = {"text": ["a b c d", "b c d a"] * 4}, {}
    else:
        rows = {"prompt": ["a b "] * 8, "chosen": ["c d"] * 8, "rejected": ["d c"] * 8}
        more = {"ref_model": model()}
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model(), args=args, train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer(), **more,
    )  # fmt: skip
    trainer.train()
    assert len(dropconnect_sites(trainer.model)) == 2
    assert logged(trainer, "dropconnect_p") == [0.3] * 4
    stored = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    plain = plain_state_dict(trainer.model)
    assert set(plain) - set(stored) <= {"lm_head.weight"}
    assert [name for name in stored if not torch.equal(stored[name], plain[name])] == []
