"""Run strict mypy on the three package folders as the one namespace that they install as, and on what
uses it: tests, benchmarks, examples, and the scripts of the documents."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from check_wheel import FOLDERS, ROOT

PACKAGES = {**FOLDERS, "tests": "tests", "benchmarks": "benchmarks"}
SCRIPTS = ("examples", "docs")
"""Their files import one another by bare names, as scripts do."""


def main() -> int:
    """mypy's exit status."""
    stage = ROOT / "build" / "typed"
    shutil.rmtree(stage, ignore_errors=True)
    for folder, package in PACKAGES.items():
        shutil.copytree(
            ROOT / folder, stage / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    scripts = sorted(path for folder in SCRIPTS for path in (ROOT / folder).glob("*.py"))
    for path in scripts:
        shutil.copy(path, stage)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(ROOT / ".mypy_cache")]  # the stage is new each time
    for package in dict.fromkeys(name.split("/")[0] for name in PACKAGES.values()):
        command += ["--package", package]
    for path in scripts:
        command += ["--module", path.stem]
    plugins = {**os.environ, "PYTHONPATH": str(ROOT / ".ci")}
    return subprocess.run(command, cwd=stage, env=plugins, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
