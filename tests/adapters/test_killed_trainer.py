"""A Trainer run that is killed again and again, and resumed from its last whole checkpoint."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from surgery.adapters.transformers import DropConnectCallback

from ..forks import fork

STEPS = 60


def last_checkpoint(folder: Path) -> str | None:
    """The newest that Trainer has ended: the state is what it writes last."""
    whole = [state.parent for state in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda one: int(one.name.split("-")[1]))) if whole else None


def train(tiny: Any, trainer: Any, folder: Path) -> None:
    """To the end, from wherever it is."""
    torch.set_num_threads(1)
    callback = DropConnectCallback("all-linear", p=0.3, toward="pretrained", schedule="cosine")
    options = {"output_dir": str(folder), "max_steps": STEPS, "save_steps": 5}
    run = trainer(tiny("bert"), [callback], save_strategy="steps", **options)
    run.train(resume_from_checkpoint=last_checkpoint(folder))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork")
def test_it_ends_with_the_bits_of_a_run_that_was_left_alone(
    tiny: Any, trainer: Any, tmp_path: Path
) -> None:
    began = time.monotonic()
    train(tiny, trainer, tmp_path / "alone")
    longest, rng, kills = time.monotonic() - began, random.Random(5), 0
    for _ in range(40):
        child = fork()
        if child == 0:
            code = 1
            try:
                train(tiny, trainer, tmp_path / "killed")
                code = 0
            finally:
                os._exit(code)
        if kills < 6:
            time.sleep(rng.uniform(0.02, 0.25) * longest)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        kills += os.WIFSIGNALED(status)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
    assert kills >= 2
    ends = [f"{run}/checkpoint-{STEPS}/model.safetensors" for run in ("alone", "killed")]
    alone, killed = (load_file(tmp_path / end) for end in ends)
    assert alone.keys() == killed.keys()
    assert all(torch.equal(value, killed[name]) for name, value in alone.items())
