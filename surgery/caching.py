"""What is made once and kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch.utils._python_dispatch import _disable_current_modes

Function = TypeVar("Function", bound=Callable[..., Any])


def cached(function: Function) -> Function:
    """`functools.cache` with the type of what it wraps: mypy holds that classes of modules are not
    hashable."""
    return cast(Function, functools.cache(function))


@contextmanager
def lasting() -> Iterator[None]:
    """For making tensors that outlive the inference, the transform or the mode that is running. Give
    them a device: `with torch.device(...)` acts here too."""
    with torch.inference_mode(False), torch._C._DisableFuncTorch(), _disable_current_modes():
        yield
