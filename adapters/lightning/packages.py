"""The two packages in which Lightning comes, `lightning` and `pytorch-lightning`: the same code twice,
with classes of its own in each."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def imported() -> list[str]:
    """Those that the process has imported."""
    return [name for name in PACKAGES if name in sys.modules]


def imported_or_installed() -> list[str]:
    """The same; where there is none, the first one that is installed.

    Raises:
        ImportError: none is.
    """
    return imported() or [_installed()]


def part(package: str, name: str) -> ModuleType:
    """A module of such a package."""
    return importlib.import_module(f"{package}.{name}")


def _installed() -> str:
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
            continue
        return name
    raise ImportError("Lightning is not installed: pip install lightning (or pytorch-lightning)")
