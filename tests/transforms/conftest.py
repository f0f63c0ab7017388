"""What the tests of graphs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .models import TRANSFORMERS


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], Any]:
    """A fresh tiny transformers model by name, the same weights every time."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()

    def build(name: str) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return TRANSFORMERS[name](transformers)

    return build
