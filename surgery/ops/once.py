"""Gradients that have none themselves, and say so to whoever differentiates them.

`torch.autograd.function.once_differentiable` cuts such gradients off. Then `torch.autograd.grad(...,
inputs)` does not come by the cut, and leaves out what would flow there, without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


class _Once(torch.autograd.Function):
    """Tensors as they are, with a backward that raises."""

    @staticmethod
    def forward(ctx: Any, what: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.what = what
        return tuple(tensor.detach() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{ctx.what} is differentiable once in eager code, and this differentiates its gradient: "
            "torch.func.grad and its like can, and so can other samplings"
        )


def differentiable_once(what: str, gradients: Gradients, sources: Sequence[Tensor]) -> Gradients:
    """What a backward returns that computed without recording.

    Args:
        what: of which they are the gradients, for the error.
        gradients: in any number, each None where it is not wanted.
        sources: what they depend on, as autograd knows it. Their values are not read.
    """
    if not torch.is_grad_enabled():
        return gradients
    known = [one for one in gradients if one is not None]
    handed = iter(_Once.apply(what, len(known), *known, *sources))  # type: ignore[no-untyped-call]
    return tuple(None if one is None else next(handed) for one in gradients)
