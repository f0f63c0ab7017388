"""What adapters use of others, and these do not promise to keep: `Trainer._save` of transformers, which
adapters/transformers/trainer.py gives plain names. (test_raw_keys.py runs its loader for ZeRO-3.)"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import transformers
from transformers.trainer import Trainer

from .test_trainer_saves import Classifier

FILE = f"adapters/transformers/trainer.py stands on it (transformers {transformers.__version__})"


def test_trainer_saves_by_one_method(trainer: Any, tmp_path: Path) -> None:
    """`save_model` calls it with the folder, and with a state dict if one was gathered."""
    parameters = list(inspect.signature(Trainer._save).parameters)
    assert parameters == ["self", "output_dir", "state_dict"], f"Trainer._save: {FILE}"
    run, seen = trainer(Classifier(), []), []

    class Watched(type(run)):
        def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
            seen.append((output_dir, state_dict))

    run.__class__ = Watched
    run.save_model(str(tmp_path))
    assert seen == [(str(tmp_path), None)], f"Trainer.save_model calls _save: {FILE}"
