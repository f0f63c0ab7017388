"""Every kernel compiles for real GPUs; none is needed for that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from surgery.ops.gpu import expectations, gaussians, launch, masks, products


def compile_all(which: str) -> list[str]:
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("compile_all.py")
    run = subprocess.run(
        [sys.executable, str(program), which], env=env, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.split()[1:]


def kernels() -> set[str]:
    files = expectations, gaussians, masks, products
    values = [value for file in files for value in vars(file).values()]
    return {value.name for value in values if isinstance(value, launch.Kernel)}


def test_each_kernel_compiles() -> None:
    assert set(compile_all("few")) == kernels()


@pytest.mark.slow
def test_each_kernel_compiles_for_every_dtype_and_more_gpus() -> None:
    assert set(compile_all("all")) == kernels()
