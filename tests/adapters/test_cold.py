"""Fresh processes, where surgery is there before the libraries that save and load."""

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


IMPORTS = """
import importlib, importlib.util, sys
import torch, surgery
from surgery.base import plugins

surgery.plan_dropconnect  # the rooms are there, and no verb was used
for entry in plugins._entries():
    name = entry.name
    if name in sys.modules or importlib.util.find_spec(name.partition(".")[0]) is None:
        continue  # it waits for a verb, or is not installed
    importlib.import_module(name)
    if entry.value not in plugins._loaded:
        print("not taught:", name)
"""


def test_an_import_alone_teaches_a_library() -> None:
    """The plugin of a library is imported when not all of that is there."""
    result = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "not taught" not in result.stdout  # libraries print lines of their own


LOADS = """
import sys
import torch, surgery
from safetensors.torch import save_file
from torch import nn

raw = {"0.weight_raw": torch.randn(4, 4), "0.bias": torch.randn(4)}
save_file(raw, f"{sys.argv[1]}/raw.safetensors", {"format": "pt"})
torch.save(raw, f"{sys.argv[1]}/raw.bin")

import accelerate

for name in ("raw.safetensors", "raw.bin"):
    model = nn.Sequential(nn.Linear(4, 4))
    accelerate.load_checkpoint_in_model(model, f"{sys.argv[1]}/{name}")
    assert torch.equal(model[0].weight, raw["0.weight_raw"]), name

import huggingface_hub.hub_mixin

for name in ("raw.safetensors", "raw.bin"):
    model = nn.Sequential(nn.Linear(4, 4))
    file = f"{sys.argv[1]}/{name}"
    huggingface_hub.load_torch_model(model, file, safe=name != "raw.bin")
    assert torch.equal(model[0].weight, raw["0.weight_raw"]), name
print("done")
"""


def test_a_process_that_uses_no_verb_loads_raw_keys(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOADS, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout.strip() == "done", result.stderr
