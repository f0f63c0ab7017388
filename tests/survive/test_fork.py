"""Processes forked after the import: torch hangs in them if threads of OpenMP have run before."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

IMPORTED_AND_FORKED = """
import os, signal, sys
import torch
import surgery
surgery.apply_dropconnect(torch.nn.Sequential(torch.nn.Linear(4, 4)), ["*"], p=0.5)
import surgery.ops, surgery.travel, surgery.transforms
if os.fork() == 0:
    signal.alarm(30)
    torch.randn(1 << 20).exp().sum()
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_torch_works_in_a_process_that_is_forked_after_the_import() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    result = subprocess.run(
        [sys.executable, "-c", IMPORTED_AND_FORKED],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
