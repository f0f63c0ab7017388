"""What stands behind `torch.func.functional_call`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn.utils import stateless


def wrap_functional_call(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace what every functional call runs in the end, `call(module, tensors, args, ...)`, by
    `wrap(call)`. The public functions look it up when they are called; these are bound to other names
    by whoever imports them. Without it, functional calls of operated models would take raw names only.
    """
    stateless._functional_call = wrap(stateless._functional_call)
