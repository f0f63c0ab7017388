"""Commands in this process."""

from __future__ import annotations

import inspect
from typing import Any

from typer.testing import CliRunner

from surgery.cli.app import app


def call(*args: object) -> Any:
    """What a command prints, stdout and stderr apart: click before 8.2 mixes them unless told."""
    told = inspect.signature(CliRunner.__init__).parameters
    options: dict[str, Any] = {"mix_stderr": False} if "mix_stderr" in told else {}
    return CliRunner(**options).invoke(app, [*map(str, args)])
