"""Tests that tell when torch changes what it never promised."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch


def canary(room: ModuleType, *names: str) -> Callable[[Any], Any]:
    """Mark a test of what names of torch do for a file of `surgery/torch_private`: when it fails, its
    message says which name, and where we use it."""

    def marked(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def sings(*args: Any, **kwargs: Any) -> None:
            try:
                test(*args, **kwargs)
            except Exception as error:
                file = room.__name__.replace(".", "/") + ".py"
                raise AssertionError(
                    f"torch {torch.__version__} has changed {', '.join(names)}, which {file} "
                    f"stands on: {type(error).__name__}: {error}"
                ) from error

        return sings

    return marked
