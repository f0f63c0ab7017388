"""Products beside that of a Linear which the extension computes with masked weights: what it leaves to
Python, the gradients of its nodes where something is out of the ordinary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

How = tuple[Any, ...]
"""How an input meets a weight: `ROWS` or `COLUMNS`, or by a convolution, (stride, padding, dilation,
groups) with a number for each spatial dimension in the first three."""

ROWS: How = ()
"""`F.linear`."""
COLUMNS: How = ("columns",)
"""`torch.addmm`, of a matrix and a weight that is stored in x out."""

_convolution_backward = torch.ops.aten.convolution_backward.default


def matrix(tensor: Tensor) -> Tensor:
    """All leading dimensions as one; by `reshape`, which batches of gradients know."""
    if tensor.dim() == 2:
        return tensor
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def other_gradients(
    grad: Tensor, x: Tensor | None, used: Tensor, how: How, want: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, of the masked weight and of the bias; each None where it is not wanted.

    Args:
        grad: of the product.
        x, used: the input and the masked weight. By columns, x is None where `used` wants no gradient.
        how: not `ROWS`.
    """
    if how != COLUMNS:
        stride, padding, dilation, groups = how
        none, sizes = [0] * len(stride), [used.shape[0]]
        options = sizes, stride, padding, dilation, False, none, groups, list(want)
        found = _convolution_backward(grad, x, used, *options)
        return tuple(one if wanted else None for one, wanted in zip(found, want))  # type: ignore[return-value]
    of_x = grad.mm(used.t()) if want[0] else None
    of_used = x.t().mm(grad) if want[1] and x is not None else None
    return of_x, of_used, grad.sum(0) if want[2] else None
