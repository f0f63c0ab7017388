"""Run strict mypy on the three package folders as the one namespace that they install as."""

from __future__ import annotations

import shutil
import subprocess
import sys

from check_wheel import FOLDERS, ROOT


def main() -> int:
    """mypy's exit status."""
    stage = ROOT / "build" / "typed"
    shutil.rmtree(stage, ignore_errors=True)
    for folder, package in FOLDERS.items():
        shutil.copytree(
            ROOT / folder, stage / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    config = str(ROOT / "pyproject.toml")
    command = [sys.executable, "-m", "mypy", "--config-file", config, "-p", "surgery"]
    return subprocess.run(command, cwd=stage, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
