"""Every kernel compiles for real GPUs; none is needed for that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from surgery.ops.gpu import expectations, gaussians, launch, masks, products


def compile_all(which: str) -> tuple[set[str], set[str]]:
    """The kernels that were compiled, and those whose parameters were found to be what the extension
    gives."""
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("compile_all.py")
    run = subprocess.run(
        [sys.executable, str(program), which], env=env, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stderr[-3000:]
    compiled, planned = run.stdout.splitlines()
    return set(compiled.split()[1:]), set(planned.split())


def kernels() -> set[str]:
    files = expectations, gaussians, masks, products
    values = [value for file in files for value in vars(file).values()]
    values += [*products.KERNELS.values(), *gaussians.KERNELS.values()]
    return {value.name for value in values if isinstance(value, launch.Kernel)}


PLANNED = {
    *("product", "input_gradient", "weight_gradient", "masked_weights", "masked_sum"),
    *("factors", "draw", "add_twice"),
}


def test_each_kernel_compiles() -> None:
    assert compile_all("few") == (kernels(), PLANNED)


@pytest.mark.slow
def test_each_kernel_compiles_for_every_dtype_and_more_gpus() -> None:
    assert compile_all("all") == (kernels(), PLANNED)
