"""`torch.compile` before anything has run: users compile first, and a warm test hides faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ENVIRONMENT = {**os.environ, "TORCHINDUCTOR_VEC_ISA_OK": "0"}
"""torch 2.9 compiles guards of shapes, and before that takes ten seconds to ask for vectors."""


@pytest.mark.parametrize("cases", ["few", pytest.param("all", marks=pytest.mark.slow)])
def test_compiled_first_the_life_of_a_model_is_the_eager_one(cases: str) -> None:
    """A step, no_grad, another batch size, eval, train, set_p (no new graph), set_inference."""
    command = [sys.executable, "-m", "tests.survive.cold_worker", cases]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env=ENVIRONMENT, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout)
    assert found["cases"] >= (5 if cases == "few" else 200)
    assert not found["wrong"], "\n".join(f"{case}: {text}" for case, text in found["wrong"])


def test_threads_share_a_graph() -> None:
    """Whichever thread compiles first."""
    code = """
import threading, torch
from torch._dynamo.testing import CompileCounterWithBackend
from surgery import apply_dropconnect
model = apply_dropconnect(torch.nn.Linear(6, 4), torch.nn.Linear, p=0.5, sampling="example")
backend = CompileCounterWithBackend("eager")
run = torch.compile(model, backend=backend, fullgraph=True)
def go():
    for rows in (4, 4, 5):
        run(torch.randn(rows, 6)).sum().backward()
thread = threading.Thread(target=go)
thread.start()
thread.join()
assert backend.frame_count == 2
go()
assert backend.frame_count == 2
"""
    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT).returncode == 0


@pytest.mark.compiler
@pytest.mark.parametrize("layer", ["Linear(6, 4)", "Conv1d(6, 4, 1)"])
def test_a_training_that_is_compiled_takes_the_extension_into_use(layer: str) -> None:
    """Nothing of it runs eagerly, where products are counted as well."""
    code = f"""
import torch
from surgery import apply_dropconnect
from tests.internals import extension_is_used
model = apply_dropconnect(torch.nn.{layer}, torch.nn.Module, p=0.5)
run = torch.compile(model, backend="aot_eager", fullgraph=True)
for _ in range(2):
    run(torch.randn(3, 6, 6)).sum().backward()
assert extension_is_used()
"""
    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, cwd=ROOT).returncode == 0
