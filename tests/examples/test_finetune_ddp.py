"""The distributed example: its helpers, and the whole script in two processes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finetune_ddp import digest, keep_mask, main
from torch import nn

from surgery import apply_dropconnect


def test_keep_mask_is_what_the_forward_used() -> None:
    model = apply_dropconnect(nn.Sequential(nn.Linear(40, 30)), "0", p=0.3)
    mask = keep_mask(model[0])
    assert mask.shape == (30, 40)
    torch.manual_seed(0)
    used = torch.where(mask, model[0].weight / 0.7, 0)
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(x), nn.functional.linear(x, used, model[0].bias))


def test_digest_sees_every_bit() -> None:
    model = nn.Linear(3, 2)
    before = digest(model)
    assert digest(model) == before
    with torch.no_grad():
        model.bias[1] = torch.nextafter(model.bias[1], torch.tensor(9.0))
    assert digest(model) != before


def test_one_process_alone_says_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr("sys.argv", ["finetune_ddp.py"])
    with pytest.raises(SystemExit, match="torchrun --nproc-per-node 2"):
        main()


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        "torch.distributed.run --nproc-per-node 2 --master-port 29531",
        "accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port 29532",
    ],
    ids=["torchrun", "accelerate"],
)
def test_script(
    launcher: str, run_example: Callable[[str], subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Judged by what is printed: gloo sometimes aborts when the interpreter shuts down."""
    size = "--steps 2 --train-size 32 --test-size 32"
    done = run_example(f"-m {launcher} examples/finetune_ddp.py {size}")
    assert "bit for bit the same on all ranks: True" in done.stdout, done.stderr
    assert "rank 0: keeps 9" in done.stdout
    assert "equal to rank 0's in 100.0 %" in done.stdout  # itself
    other = done.stdout.split("rank 1: keeps ")[1].split("rank 0's in ")[1].split(" %")[0]
    assert 81.0 < float(other) < 83.0  # 147,456 entries: standard error 0.1 points around 82.0
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert not (tmp_path / "model" / "dropconnect.json").exists()
