"""A fresh process that operates first and imports the libraries that save and load afterwards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")

SCRIPT = """
import sys
import torch
from torch import nn
from surgery import apply_dropconnect, plain_state_dict

class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.two(self.one(x))

model = apply_dropconnect(Inner(), ["*"], p=0.5)
assert "peft" not in sys.modules
assert "torch.distributed.checkpoint.state_dict" not in sys.modules

from torch.distributed.checkpoint.state_dict import set_model_state_dict

wanted = {name: value + 1 for name, value in plain_state_dict(model).items()}
set_model_state_dict(model, dict(wanted))
assert all(torch.equal(value, wanted[name]) for name, value in plain_state_dict(model).items())

from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

adapted = get_peft_model(model, LoraConfig(target_modules=["one"], modules_to_save=["two"]))
adapted.save_pretrained(sys.argv[1])
stored = load_file(sys.argv[1] + "/adapter_model.safetensors")
assert stored and not [name for name in stored if "_raw" in name], list(stored)

from accelerate import Accelerator

Accelerator(cpu=True).save_model(model, sys.argv[1])
stored = load_file(sys.argv[1] + "/model.safetensors")
assert stored and not [name for name in stored if "_raw" in name], list(stored)
print("done")
"""


def test_libraries_imported_after_surgery_save_and_load_plain(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout.strip() == "done", result.stderr
