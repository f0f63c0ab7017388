"""What stands behind `torch.func.functional_call`, and behind the `apply` of an autograd Function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils import stateless


def wrap_functional_call(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace what every functional call runs in the end, `call(module, tensors, args, ...)`, by
    `wrap(call)`. The public functions look it up when they are called; these are bound to other names
    by whoever imports them. Without it, functional calls of operated models would take raw names only.
    """
    stateless._functional_call = wrap(stateless._functional_call)


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` outside of every transform of `torch.func`, where `forward` takes `ctx`.

    That one looks for transforms, and for what is left of past ones, by eight calls of Python; without
    this, use it.
    """
    applied: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return applied
