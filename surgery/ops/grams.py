"""What the masks of a weight do to outputs, of which the derivatives are known."""

from __future__ import annotations

import torch
from torch import Tensor

from ..torch_private.tracing import is_traced
from .cpu import native
from .engine import has_kernels

FEW = 32
"""Outputs for which the kernel is faster than products of matrices."""


def weighted_gram(by: Tensor, x: Tensor, square: Tensor) -> Tensor:
    """Sums over the entries of a weight: of its square there, times its derivatives of two outputs.

    Args:
        by: (outputs, examples, rows, out), derivatives by what `x @ weight.T` gave.
        x: (examples, rows, in).
        square: (out, in).

    Returns:
        (examples, outputs, outputs).
    """
    few = by.dtype == torch.float32 and len(by) <= FEW and not is_traced()
    if few and by.is_cpu and has_kernels("grams"):
        by, x = by.contiguous(), x.contiguous()
        if native.takes(by, x, square):
            return native.weighted_gram(by, x, square)
    grams = [_of_example(one, own, square) for one, own in zip(by.unbind(1), x)]
    return torch.stack(grams)


def _of_example(by: Tensor, x: Tensor, square: Tensor) -> Tensor:
    """(outputs, outputs) of (outputs, rows, out) and (rows, in)."""
    of_weight = torch.matmul(by.transpose(1, 2), x)
    return (of_weight * square).flatten(1) @ of_weight.flatten(1).t()
