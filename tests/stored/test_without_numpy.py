"""torch and safetensors are all that the core needs: numpy is not there in these processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from surgery.verbs.raw_files import quiet

WITHOUT = """
import sys, warnings
warnings.simplefilter("ignore")  # torch says that it has none
sys.modules["numpy"] = None
import torch
from torch import nn
from surgery import *
"""

SAVED = """
def made():
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))

torch.manual_seed(0)
generator = torch.Generator().manual_seed(3)
model = apply_dropconnect(made(), "*", p=0.3, toward="pretrained", generator=generator)
with torch.no_grad():
    model[0].weight_raw.add_(1)
save_dropconnect(model, "out")
again = load_dropconnect(made(), "out")
again.load_state_dict(model.state_dict())
x = torch.ones(2, 6)
assert torch.equal(model(x), again(x))
torch.save(model.state_dict(), "raw.pt")
convert_checkpoint("raw.pt", "out/model.safetensors", "surgery")
bake_checkpoint("out", "baked", 1)
bake_checkpoint("out", "dare", 1, p=0.5, toward="baked")
strip_checkpoint("anchored.safetensors", "plain.safetensors")
assert inspect_checkpoint("plain.safetensors").count("plain") == 1
bake_dropconnect(model, seed=1)
assert sorted(model.state_dict()) == sorted(one.key for one in inspect_checkpoint("baked").tensors)
"""

TRAINED = """
for options in ({}, {"sampling": "example"}, {"sampling": "gaussian"}, {"inference": "moments"},
                {"inference": "sample"}, {"unit": "output", "bias": True}):
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    apply_dropconnect(model, "*", p=0.3, **options)
    model(torch.randn(3, 6)).sum().backward()
    model.eval()(torch.randn(3, 6))
    set_p(model, 0.1)
    if options == {"inference": "sample"}:
        mc_predict(model, [torch.randn(3, 6)], samples=3)
    strip_dropconnect(model)
for module, x in ((nn.LSTM(4, 4), torch.randn(3, 2, 4)), (nn.Embedding(9, 4), torch.arange(5)),
                  (nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8))):
    out = apply_dropconnect(module, type(module), p=0.3)(x)
    (out if isinstance(out, torch.Tensor) else out[0]).sum().backward()
graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
apply_dropconnect(graph, "*", p=0.3)(torch.randn(2, 6)).sum().backward()
"""


@pytest.mark.parametrize("code", [SAVED, TRAINED], ids=["files", "training"])
def test_the_core_needs_no_numpy(code: str, tmp_path: Path) -> None:
    with quiet():
        anchored = {"w_raw": torch.ones(3), "w_anchor": torch.ones(3)}
        save_file(anchored, tmp_path / "anchored.safetensors")
    command = [sys.executable, "-c", WITHOUT + code]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
