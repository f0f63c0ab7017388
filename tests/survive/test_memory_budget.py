"""Compiled graphs that keep little for backward do not draw other masks there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).with_name("budget_worker.py")


def test_gradients_are_right_at_any_memory_budget() -> None:
    """In a process of its own: the budget counts when a graph is compiled first."""
    done = subprocess.run([sys.executable, str(WORKER), "0"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
